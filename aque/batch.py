"""What a scheduler has to write with its next transaction: outcomes, starts, output and what tasks tell of themselves."""

from dataclasses import dataclass, field

from aque.states import State
from aque.store import Kill
from aque.values import Outcome

#: Output of running commands is written this often, and at most so much of it in one transaction.
OUTPUT_SECONDS = 0.2
OUTPUT_BYTES = 1 << 20
#: With this much output waiting for the table, who writes more has to wait a moment.
OUTPUT_LIMIT_BYTES = 32 << 20

#: Of captured output: task, attempt, file descriptor, offset in bytes, data.
Piece = tuple[int, int, int, int, bytes]


@dataclass(slots=True)
class Batch:
    """What one transaction writes. A claim is a task's id with its token."""

    outcomes: list[Outcome] = field(default_factory=list)
    started: list[tuple[int, int, float]] = field(default_factory=list)  #: id, token, when (monotonic)
    output: list[Piece] = field(default_factory=list)
    delivered: list[Kill] = field(default_factory=list)
    blocked: dict[tuple[int, int], bool] = field(default_factory=dict)  #: by claim: it waits for others, or goes on
    told: dict[tuple[int, int], tuple[str, bytes]] = field(default_factory=dict)  #: by claim: what it tells of itself
    returned: list[tuple[int, int]] = field(default_factory=list)  #: claims to be given back
    lone: set[int] = field(default_factory=set)  #: of the outcomes' tasks, those without dependents at the claim

    def __bool__(self) -> bool:
        return bool(self.outcomes or self.output or self._more())

    def put_back(self, older: "Batch") -> None:
        """What could not be written goes before what has come since."""
        self.outcomes = older.outcomes + self.outcomes
        self.started = older.started + self.started
        self.output = older.output + self.output
        self.delivered = older.delivered + self.delivered
        self.blocked = older.blocked | self.blocked
        self.told = older.told | self.told
        self.returned = older.returned + self.returned
        self.lone |= older.lone

    def is_lone_success(self) -> bool:
        """True if all there is to write is that one task, for which nothing waited, has succeeded."""
        if len(self.outcomes) != 1 or self.output or self._more():
            return False
        return self.outcomes[0].state is State.SUCCESS and self.outcomes[0].id in self.lone

    def _more(self) -> bool:
        return bool(self.started or self.delivered or self.returned or self.blocked or self.told)


class Unwritten:
    """The batch that is being collected, and the one that is being written. Not safe for threads: the scheduler's lock guards
    it. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self.batch = Batch()
        self._writing = Batch()
        self._output_bytes = 0
        self._output_since: float | None = None

    @property
    def output_due_at(self) -> float | None:
        """When output is to be written at the latest; None without any."""
        return None if self._output_since is None else self._output_since + OUTPUT_SECONDS

    @property
    def is_flooded(self) -> bool:
        """So much output waits that who writes more has to wait."""
        return self._output_bytes > OUTPUT_LIMIT_BYTES

    def add_output(self, piece: Piece, now: float) -> bool:
        """True if it changes when output is due."""
        self.batch.output.append(piece)
        self._output_bytes += len(piece[4])
        is_first = self._output_since is None
        if is_first:
            self._output_since = now
        return is_first or self._output_bytes > OUTPUT_BYTES

    def take(self, now: float, all_output: bool) -> Batch:
        """What is to be written now, until `written` or `failed` is called. Output of what goes on is left for later unless it
        is due, there is much of it, or `all_output`."""
        batch, self.batch = self.batch, Batch()
        self._writing = batch
        ended = {outcome.id for outcome in batch.outcomes} | {task_id for task_id, _ in batch.returned}
        due = all_output or (self.output_due_at is not None and now >= self.output_due_at)
        room = OUTPUT_BYTES if due or self._output_bytes > OUTPUT_BYTES else 0
        written, later = [], []
        for piece in batch.output:
            if piece[0] in ended or room > 0:
                written.append(piece)
                room -= len(piece[4])
            else:
                later.append(piece)
        batch.output, self.batch.output = written, later
        self._count_output(now if self._output_since is None else self._output_since)
        batch.started = [start for start in batch.started if start[0] not in ended]
        batch.blocked = {claim: waits for claim, waits in batch.blocked.items() if claim[0] not in ended}
        return batch

    def written(self) -> None:
        """What was taken is in the table."""
        self._writing = Batch()

    def failed(self, now: float) -> None:
        """What was taken could not be written, or nobody knows: it is to be written again."""
        self.batch.put_back(self._writing)
        self._writing = Batch()
        self._count_output(now if self._output_since is None else self._output_since)

    def adopt(self, batch: Batch, now: float) -> None:
        """Begin with what another image of the process could not write."""
        self.batch = batch
        self._count_output(now)

    def _count_output(self, since: float) -> None:
        self._output_bytes = sum(len(piece[4]) for piece in self.batch.output)
        self._output_since = since if self.batch.output else None
