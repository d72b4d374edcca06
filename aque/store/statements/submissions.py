"""submit: new tasks, their edges, and what they share."""

from functools import cache

import sqlalchemy as sa

from aque.states import COMPLETE_STATES
from aque.store.engine import one_of, row_set, wall_clock
from aque.store.statements.claims import ready_classes
from aque.store.statements.common import (
    Statement,
    in_states,
    insert_into,
    is_not_being_ended,
    locked_in_order,
)
from aque.store.tables import environment, payload, requirement, sequence, task
from aque.values import Children


@cache
def reserve_ids(dialect: str) -> Statement:
    """`count` new ids: the last of them on SQLite, all of them on PostgreSQL."""
    if dialect == "sqlite":
        return (
            sa.update(sequence)
            .where(sequence.c.name == "id")
            .values(value=sequence.c.value + sa.bindparam("count", type_=sa.Integer))
            .returning(sequence.c.value)
        )
    series = sa.func.generate_series(1, sa.bindparam("count", type_=sa.Integer)).alias("n")
    return sa.select(sa.func.nextval("aque_id")).select_from(series)


@cache
def add_requirement(dialect: str) -> Statement:
    """Insert a requirement class unless there is an equal one."""
    return insert_into(dialect, requirement).on_conflict_do_nothing()


@cache
def find_requirement() -> Statement:
    return sa.select(requirement.c.id).where(requirement.c.digest == sa.bindparam("digest"))


@cache
def known_digests() -> Statement:
    """How many of these requirement classes there are."""
    digests: sa.BindParameter[str] = sa.bindparam("digests", expanding=True)
    return sa.select(sa.func.count()).select_from(requirement).where(requirement.c.digest.in_(digests))


@cache
def ready_classes_with_places(dialect: str) -> Statement:
    """How many requirement classes with places have ready tasks."""
    found = ready_classes()
    return (
        sa.select(sa.func.count())
        .select_from(requirement)
        .join(found, found.c.id == requirement.c.id)
        .where(requirement.c.places != sa.literal(b"", sa.LargeBinary))
    )


@cache
def requirements(dialect: str) -> Statement:
    """The requirement classes with these `ids`."""
    return sa.select(requirement).where(one_of(dialect, requirement.c.id, "ids"))


@cache
def add_environment(dialect: str) -> Statement:
    return insert_into(dialect, environment).on_conflict_do_nothing()


@cache
def add_task() -> Statement:
    """PostgreSQL: insert a task and its payload (parameters `t_` and `p_` before the names of their columns)."""
    columns = {column.name: sa.bindparam(f"t_{column.name}", type_=column.type) for column in task.c}
    new = sa.insert(task).values(columns).returning(task.c.id).cte("new")
    names = [column.name for column in payload.c]
    values = [sa.bindparam(f"p_{column.name}", type_=column.type) for column in payload.c]
    return sa.insert(payload).from_select(names, sa.select(*values).select_from(new))


@cache
def add_dependents(dialect: str) -> Statement:
    """Count `n` more dependents for each task in `rows` (id, n); returns their states. The row stays locked until the
    submission has committed: a worker that finishes it waits, and then reads the count and sees the new edges."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), n=sa.Integer())
    locked = locked_in_order(task.c.id.in_(sa.select(rows.c.id)))
    return (
        sa.update(task)
        .where(task.c.id == locked.c.id, rows.c.id == locked.c.id)
        .values(dependents=task.c.dependents + rows.c.n)
        .returning(task.c.id, task.c.state)
    )


@cache
def add_children(dialect: str) -> Statement:
    """Count `n` more children for each task in `rows` (id, n) that has not ended and is not being killed; their ids. The row
    stays locked until the submission has committed: its worker finishes it before that, or with these children."""
    rows = row_set(dialect, "rows", id=sa.BigInteger(), n=sa.Integer())
    locked = locked_in_order(task.c.id.in_(sa.select(rows.c.id)))
    return (
        sa.update(task)
        .where(
            task.c.id == locked.c.id,
            rows.c.id == locked.c.id,
            sa.not_(in_states(COMPLETE_STATES)),
            is_not_being_ended(),
        )
        .values(
            children_left=task.c.children_left + sa.case((task.c.children == Children.DETACH, 0), else_=rows.c.n),
        )
        .returning(task.c.id)
    )


@cache
def now() -> Statement:
    """Seconds since 1970 on the database's clock."""
    return sa.select(wall_clock())


@cache
def calls_of() -> Statement:
    """What the tasks with these `celery_ids` call."""
    return (
        sa.select(task.c.celery_id, task.c.id, task.c.state, payload.c.function, payload.c.arguments, payload.c.argv)
        .select_from(task.outerjoin(payload, payload.c.task_id == task.c.id))
        .where(task.c.celery_id.in_(sa.bindparam("celery_ids", expanding=True)))
    )


@cache
def inherited() -> Statement:
    """What the children of `which` have of it."""
    return sa.select(task.c.requirement_id, task.c.priority).where(
        task.c.id == sa.bindparam("which"), task.c.requirement_id.is_not(None)
    )


@cache
def ids_of_celery_ids() -> Statement:
    return sa.select(task.c.celery_id, task.c.id).where(
        task.c.celery_id.in_(sa.bindparam("celery_ids", expanding=True))
    )
