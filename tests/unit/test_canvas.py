"""Canvases as rows and edges, without a worker: what becomes a row, what waits for what, what is refused."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signature
from celery.canvas import Signature, _chain

import aque
from aque import canvas
from aque.errors import BadInput, NotSubmittable
from aque.farm import farm_of
from aque.handles import GroupHandle, Handle
from tests.worker.canvas_tasks import add, echo, fail, new_errback, old_errback, plain_add, same, total

NAME = "tests.worker.canvas_tasks."


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AQUE_BROKER", f"sqlite:///{tmp_path / 'aque.db'}")
    monkeypatch.setenv("AQUE_STATE_DIR", str(tmp_path))
    store = farm_of(add._get_app()).store
    yield store
    with store.connect() as connection:
        assert store.doctor(connection) == []


class Rows:
    """What is in the table, by short names that are unique in a test: `add`, `add2`, ..."""

    def __init__(self, store: Any) -> None:
        self.ids: dict[str, int] = {}
        self.names: dict[int, str] = {}
        with store.connect() as connection:
            self.rows = {row["id"]: row for row in store.tasks(connection)}
            self.edges = connection.exec_driver_sql("SELECT upstream, downstream, condition FROM aque_edge").all()
            payloads = connection.exec_driver_sql("SELECT task_id, function, arguments, extra FROM aque_payload").all()
        counts: Counter[str] = Counter()
        for task_id, row in self.rows.items():
            short = row["name"].removeprefix(NAME)
            counts[short] += 1
            name = short if counts[short] == 1 else f"{short}{counts[short]}"
            self.ids[name], self.names[task_id] = task_id, name
        self.functions = {self.names[i]: function for i, function, _, _ in payloads}
        self.arguments = {self.names[i]: self._shown(json.loads(text)) for i, _, text, _ in payloads if text}
        self.extra = {self.names[i]: json.loads(extra) if extra else {} for i, _, _, extra in payloads}

    def _shown(self, value: Any) -> Any:
        if isinstance(value, dict) and value.get("__type__") == "aque.result":
            return f"<{self.names[value['__value__']]}>"
        if isinstance(value, dict) and value.get("__type__") == "aque.failure":
            return f"<{value['__value__'][1]} of {self.names[value['__value__'][0]]}>"
        if isinstance(value, list):
            return [self._shown(item) for item in value]
        return value

    def edges_shown(self) -> set[str]:
        return {f"{self.names[up]} {condition} {self.names[down]}" for up, down, condition in self.edges}


@pytest.fixture
def rows(store: Any) -> Callable[[], Rows]:
    return lambda: Rows(store)


# -- what waits for what ----------------------------------------------------------------------------------------------------


def test_each_step_of_a_chain_waits_for_the_one_before_and_gets_its_result_first(rows: Any) -> None:
    result = chain(add.s(1, 2), add.s(4), echo.s(5, key=6))()
    found = rows()
    assert found.edges_shown() == {"add ok add2", "add2 ok echo"}
    assert found.arguments == {"add": [[1, 2], {}], "add2": [["<add>", 4], {}], "echo": [["<add2>", 5], {"key": 6}]}
    assert [result.number, result.parent.number, result.parent.parent.number] == [
        found.ids[name] for name in ("echo", "add2", "add")
    ]


def test_an_immutable_signature_waits_and_gets_nothing(rows: Any) -> None:
    chain(add.s(1, 2), add.si(3, 4))()
    assert rows().edges_shown() == {"add ok add2"}
    assert rows().arguments["add2"] == [[3, 4], {}]


def test_partial_arguments_come_first_and_go_to_the_first_task_of_a_chain_and_to_all_of_a_group(rows: Any) -> None:
    chain(echo.s(2), same.s())(1)
    group(echo.s(3), echo.s(4)).apply_async((0,), {"key": 5})
    assert [rows().arguments[name] for name in ("echo", "echo2", "echo3")] == [
        [[1, 2], {}],
        [[0, 3], {"key": 5}],
        [[0, 4], {"key": 5}],
    ]


def test_a_group_is_a_row_that_waits_for_its_members_however_they_end(rows: Any) -> None:
    result = group(add.s(1, 1), add.s(2, 2))()
    found = rows()
    assert found.edges_shown() == {"add any group", "add2 any group"}
    assert isinstance(result, GroupHandle)
    assert result.number == found.ids["group"]
    assert [r.number for r in result.results] == [found.ids["add"], found.ids["add2"]]
    members = [found.rows[r.number] for r in result.results]
    assert [(row["job_id"], row["seq"]) for row in members] == [(result.number, 0), (result.number, 1)]


def test_a_body_has_one_edge_however_wide_its_header_is(rows: Any) -> None:
    chord([add.s(i, i) for i in range(50)])(total.s())
    found = rows()
    assert [edge for edge in found.edges_shown() if edge.endswith(" total")] == ["group ok total"]
    assert found.arguments["total"] == [["<group>"], {}]
    assert len(found.rows) == 52


def test_layers_of_groups_have_as_many_edges_as_members_and_each_task_is_one_row(rows: Any) -> None:
    layer = [same.s() for _ in range(10)]
    chain(group(same.s(0) for _ in range(10)), group(layer), group(layer))()
    found = rows()
    assert len(found.rows) == 33
    assert Counter(condition for _, _, condition in found.edges) == {"any": 30, "ok": 20}


def test_the_last_group_of_a_chain_is_its_result_and_the_groups_before_are_its_parents(rows: Any) -> None:
    result = chain(add.s(1, 2), group(add.s(1), add.s(2)), group(total.s(), echo.s()))()
    assert isinstance(result, GroupHandle)
    assert isinstance(result.parent, GroupHandle)
    assert isinstance(result.parent.parent, Handle)
    (identity, (_, before)), members = result.as_tuple()[0], result.as_tuple()[1]
    assert identity == result.id
    assert len(members) == len(before) == 2


def test_groups_in_groups_are_one_group_in_order(rows: Any) -> None:
    result = group(group(same.s(1), group(same.s(2))), same.s(3))()
    assert [rows().arguments[name][0] for name in ("same", "same2", "same3")] == [[1], [2], [3]]
    assert len(result.results) == 3


def test_a_member_that_ends_in_a_group_is_a_group_among_the_members(rows: Any) -> None:
    result = group(chain(add.s(1, 2), group(same.s(), same.s())), add.s(3, 4))()
    assert [type(r) for r in result.results] == [GroupHandle, Handle]
    assert "group2 any group" in rows().edges_shown()


def test_a_group_of_one_is_a_step_like_another_within_a_chain_and_a_list_before_a_body(rows: Any) -> None:
    chain(add.s(1, 2), group(same.s()), same.s())()
    assert rows().edges_shown() == {"add ok same", "same ok same2"}
    (group(add.s(1, 2)) | total.s())()
    assert rows().arguments["total"] == [["<group>"], {}]


def test_empty_groups_and_chains_are_nothing(rows: Any) -> None:
    empty = group([])()
    assert (empty.results, empty.get(), empty.ready(), empty.successful()) == ([], [], True, True)
    assert chain()() is None
    assert rows().rows == {}
    _chain([add.s(1, 2), group([]), same.s(), _chain([])])()
    assert rows().edges_shown() == {"add ok same"}


def test_the_body_of_a_chord_without_a_header_gets_an_empty_list_when_its_turn_comes(rows: Any) -> None:
    chord([])(total.s())
    _chain([add.s(1, 2), chord([], total.s())])()
    assert rows().arguments == {"total": [[[]], {}], "add": [[1, 2], {}], "total2": [[[]], {}]}
    assert rows().edges_shown() == {"add ok total2"}


def test_a_chain_of_five_thousand_and_a_canvas_nested_two_hundred_deep_need_no_stack(rows: Any) -> None:
    last = _chain([same.si(i) for i in range(5000)])()
    assert len(rows().edges) == 4999
    depth = 0
    (_, above), _ = last.as_tuple()
    while above is not None:
        depth += 1
        (_, above), _ = above
    assert depth == 4999
    deep: Any = same.si(0)
    for _ in range(200):
        deep = chord([same.si(0)], _chain([total.s(), deep]))
    canvas.submit(deep, app=aque.celery_app.app)
    assert len(rows().rows) == 5000 + 3 * 200 + 1


def test_plain_dictionaries_and_signatures_by_name_are_signatures(rows: Any) -> None:
    plain = json.loads(json.dumps(chain(group(add.s(1, 1), add.s(2, 2)), total.s())))
    signature(plain, app=add.app)()
    Signature("elsewhere.known", (1,), app=add.app)
    chain(add.s(1, 1), Signature("elsewhere.known", app=add.app))()
    assert rows().functions["elsewhere.known"] == "@elsewhere.known"
    assert rows().arguments["total"] == [["<group>"], {}]


def test_chunks_are_a_group_and_maps_one_task(rows: Any) -> None:
    add.chunks(zip(range(5), range(5), strict=True), 2)()
    add.starmap([(1, 2), (3, 4)]).apply_async()
    found = rows()
    assert Counter(row["name"] for row in found.rows.values()) == {"group": 1, "celery.starmap": 4}
    assert found.functions["celery.starmap"] == "@celery.starmap"


def test_a_whole_canvas_is_refused_if_one_of_its_tasks_is(rows: Any) -> None:
    @aque.task
    def hidden() -> None:
        """Nobody could find it."""

    for bad, error in (
        (add.s(1, 2, 3), TypeError),
        (hidden.si(), NotSubmittable),
        (same.si(object()), NotSubmittable),
        (same.si(1).set(no_such_option=1), BadInput),
        (same.si(1).set(task_id="123"), BadInput),
    ):
        with pytest.raises(error):
            chord([same.s(1), bad], total.s())()
    with pytest.raises(BadInput, match="body"):
        chord([same.s(1)])()
    assert rows().rows == {}


# -- ids ------------------------------------------------------------------------------------------------------------------


def test_the_ids_that_freeze_gave_are_the_ids_of_the_rows(rows: Any) -> None:
    whole = chain(add.s(1, 2), group(add.s(1), add.s(2)), total.s())
    promised = whole.freeze()
    result = whole.apply_async()
    assert result.id == promised.id
    assert [r.id for r in result.parent.results] == [r.id for r in promised.parent.results]
    found = rows()
    assert found.rows[found.ids["total"]]["celery_id"] == promised.id
    assert result.parent.parent.id == promised.parent.parent.id


def test_a_task_id_is_that_of_the_last_task_of_the_group_or_of_the_body(rows: Any) -> None:
    assert chain(add.s(1, 2), same.s()).apply_async(task_id="chain").id == "chain"
    assert group(add.s(1, 2), add.s(3, 4)).apply_async(task_id="group").id == "group"
    result = chord([add.s(1, 2)], total.s()).apply_async(task_id="chord")
    found = {row["celery_id"]: row["name"].removeprefix(NAME) for row in rows().rows.values() if row["celery_id"]}
    assert result.id == "chord"
    assert found == {"chain": "same", "group": "group", "chord": "total"}


def test_a_frozen_task_in_several_places_is_one_row(rows: Any) -> None:
    load, left, right, join = add.s(1, 2), same.s(), same.s(), echo.s("own")
    for shared in (load, join):
        shared.freeze()
    result = group(chain(load, left, join), chain(load, right, join))()
    found = rows()
    assert found.edges_shown() == {"add ok same", "add ok same2", "same ok echo", "same2 ok echo", "echo any group"}
    assert found.arguments["echo"] == [["<same>", "<same2>", "own"], {}]
    assert [r.number for r in result.results] == [found.ids["echo"]] * 2


def test_the_same_signature_twice_is_two_tasks_unless_it_was_frozen(rows: Any) -> None:
    once = add.s(1, 2)
    group([once] * 3)()
    assert len(rows().rows) == 4


# -- callbacks ------------------------------------------------------------------------------------------------------------


def test_callbacks_get_the_result_and_may_be_canvases(rows: Any) -> None:
    add.apply_async((1, 2), link=[echo.s(3), chain(same.si(4), same.s())])
    assert rows().edges_shown() == {"add ok echo", "add ok same", "same ok same2"}
    assert rows().arguments["echo"] == [["<add>", 3], {}]


def test_callbacks_of_a_chain_and_of_a_chord_are_those_of_the_last_task(rows: Any) -> None:
    chain(add.s(1, 2), same.s()).apply_async(link=echo.s())
    assert "same ok echo" in rows().edges_shown()
    body = chord([add.s(1, 2)], total.s())
    body.link(echo.s())
    body()
    assert "total ok echo2" in rows().edges_shown()


def test_an_error_callback_waits_for_an_error_and_gets_what_its_function_takes(rows: Any) -> None:
    failing = fail.apply_async(link_error=[old_errback.s(), new_errback.s()])
    found = rows()
    assert found.edges_shown() == {"fail error old_errback", "fail error new_errback"}
    assert found.arguments["old_errback"] == [[failing.id], {}]
    assert found.arguments["new_errback"] == [
        ["<request of fail>", "<exception of fail>", "<traceback of fail>"],
        {},
    ]


def test_the_error_callback_of_a_chain_is_there_for_each_step(rows: Any) -> None:
    chain(add.s(1, 2), same.s()).on_error(old_errback.s()).apply_async()
    assert {"add error old_errback", "same error old_errback2"} <= rows().edges_shown()


def test_the_error_callback_of_a_body_hears_of_its_header_too_but_not_of_what_was_before(rows: Any) -> None:
    _chain([same.s(1), chord([add.s(1), add.s(2)], total.s().on_error(new_errback.s()))])()
    edges = rows().edges_shown()
    assert {"total error new_errback", "group failed new_errback2", "same ok new_errback2"} <= edges


def test_a_group_refuses_callbacks_as_celery_does(rows: Any) -> None:
    for name in ("link", "link_error"):
        with pytest.raises(TypeError, match="group"):
            group(add.s(1, 2), add.s(3, 4)).apply_async(**{name: echo.s()})
    assert rows().rows == {}


# -- options ----------------------------------------------------------------------------------------------------------------


def test_options_go_where_celery_lets_them_go(rows: Any) -> None:
    chain(add.s(1, 2), same.s()).apply_async(priority=5)
    group(echo.s(1), echo.s(2)).apply_async(queue="wide")
    chord([fail.s()], total.s()).apply_async(priority=7)
    found = {name: rows().rows[task_id] for name, task_id in rows().ids.items()}
    assert (found["add"]["priority"], found["same"]["priority"]) == (5, 0)
    assert (found["echo"]["queue"], found["echo2"]["queue"]) == ("wide", "wide")
    assert (found["fail"]["priority"], found["total"]["priority"]) == (7, 7)


def test_stamps_and_headers_are_kept_with_the_row(rows: Any) -> None:
    whole = group(same.s(1), same.s(2))
    whole.stamp(color="red")
    whole.apply_async(headers={"trace": "x"})
    assert rows().extra["same"]["stamps"] == {"color": "red"}
    assert rows().extra["same2"]["headers"] == {"trace": "x"}


def test_a_graph_takes_canvases_and_succeeds_without_error_callbacks(rows: Any) -> None:
    with aque.graph("report") as job:
        parts = group(add.s(i, i).on_error(old_errback.s()) for i in range(2))()
        late = total.delay(parts)
    found = rows()
    assert "group ok total" in found.edges_shown()
    assert found.rows[late.number]["depends_on"] == [parts.number]
    jobs = {up for up, down, _ in found.edges if down == job.id}
    assert jobs == set(found.rows) - {job.id} - {found.ids["old_errback"], found.ids["old_errback2"]}


# -- whose canvas it is -----------------------------------------------------------------------------------------------------


def test_a_canvas_with_a_task_of_ours_is_a_graph_and_one_without_goes_celerys_way() -> None:
    app = Celery("project", set_as_current=False)
    plain = app.task(plain_add.run, name="plain.add")
    assert not canvas.is_graph(chain(plain.s(1), group(plain.s(), plain.s())), app)
    assert canvas.is_graph(chord([plain.s(1), chain(plain.s(), add.s(1))], plain.s()), app)
    assert canvas.is_graph(add.map([1, 2]), app)
    assert canvas.is_graph(chord([plain.s(1)], plain.s() | total.s()), app)


def test_a_plain_task_in_a_graph_is_a_row_like_another(rows: Any) -> None:
    chain(plain_add.s(1, 2), add.s(3))()
    assert rows().functions["plain_add"] == "tests.worker.canvas_tasks:plain_add"


def test_eager_tasks_run_here(rows: Any) -> None:
    add.app.conf.task_always_eager = True
    try:
        assert chain(add.s(1, 2), add.s(3))().get() == 6
        assert group(add.s(1, 1), add.s(2, 2))().get() == [2, 4]
        assert chord([add.s(1, 1), add.s(2, 2)])(total.s()).get() == 6
    finally:
        add.app.conf.task_always_eager = False
    assert rows().rows == {}
