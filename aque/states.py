"""The life cycle of a task: one table of moves, and the named sets that everything else asks."""

from enum import StrEnum


class State(StrEnum):
    """Where a task is. The values are what the `state` column holds."""

    CREATING = "creating"  #: its graph or stream is still open
    PENDING = "pending"  #: waits for dependencies or for a time
    HELD = "held"  #: a person holds it back
    READY = "ready"  #: may be claimed
    CLAIMED = "claimed"  #: in a worker's local buffer, not started
    RUNNING = "running"
    WAITING = "waiting"  #: its process is done, its children are not
    SUCCESS = "success"
    ERROR = "error"
    KILLED = "killed"  #: a person signalled it while it ran
    CANCELLED = "cancelled"  #: a person withdrew it before it ran
    SKIPPED = "skipped"  #: a dependency made it impossible


class Event(StrEnum):
    """What can happen to a task."""

    SEAL = "seal"  #: its graph is complete
    RELEASE = "release"  #: its last dependency is met
    HOLD = "hold"
    UNHOLD = "unhold"
    CLAIM = "claim"  #: a worker takes it into its buffer
    START = "start"
    GIVE_BACK = "give back"  #: its worker stops or needs the place
    LOSE = "lose"  #: its worker died
    REPEAT = "repeat"  #: the attempt failed, another is allowed
    PART = "part"  #: its process is done, children are open
    POSTPONE = "postpone"  #: the attempt asks for another one later, or leaves its place to a graph
    SUCCEED = "succeed"
    FAIL = "fail"
    KILL = "kill"
    CANCEL = "cancel"
    WITHDRAW = "withdraw"  #: the task itself says that nothing is to come of it
    SKIP = "skip"
    RETRY = "retry"  #: a person wants a finished task to run again


class Reason(StrEnum):
    """Why a task is in the state it is in: a closed set, so that programs can ask."""

    EXIT = "exit"  #: the command ended with a status other than 0
    SIGNAL = "signal"  #: a signal that Aque did not send ended the command
    EXCEPTION = "exception"
    TIME_LIMIT = "time_limit"
    DEPENDENCY = "dependency"  #: a dependency's outcome made it impossible, or a member of the group failed
    WORKER_LOST = "worker_lost"
    CANNOT_EXECUTE = "cannot_execute"
    NOT_FOUND = "not_found"  #: there is no such command
    CANNOT_ENTER_CWD = "cannot_enter_cwd"
    CANNOT_BECOME_USER = "cannot_become_user"
    CANNOT_OPEN = "cannot_open"  #: a file in place of stdin, stdout or stderr
    CANNOT_IMPORT = "cannot_import"
    NOT_STORABLE = "not_storable"  #: the result cannot be written as JSON, or is too large
    INPUTS_TOO_LARGE = "inputs_too_large"
    EXPIRED = "expired"  #: it was not started in time
    IGNORED = "ignored"  #: the task raised Celery's Ignore
    REJECTED = "rejected"  #: the task raised Celery's Reject
    CHILD = "child"  #: its own process succeeded, a task that it has submitted did not
    REQUEST = "request"  #: a person asked for it


S, E = State, Event

#: Every move there is: (from, event) -> to. The diagram in docs/states.md is printed from it.
MOVES: dict[tuple[State, Event], State] = {
    (S.CREATING, E.SEAL): S.PENDING,
    (S.PENDING, E.RELEASE): S.READY,
    (S.PENDING, E.HOLD): S.HELD,
    (S.READY, E.HOLD): S.HELD,
    (S.HELD, E.UNHOLD): S.PENDING,
    (S.READY, E.CLAIM): S.CLAIMED,
    (S.READY, E.START): S.RUNNING,
    (S.CLAIMED, E.START): S.RUNNING,
    (S.CLAIMED, E.GIVE_BACK): S.READY,
    (S.RUNNING, E.GIVE_BACK): S.READY,
    (S.CLAIMED, E.LOSE): S.READY,
    (S.RUNNING, E.LOSE): S.READY,
    (S.RUNNING, E.REPEAT): S.READY,
    (S.RUNNING, E.POSTPONE): S.PENDING,
    (S.RUNNING, E.PART): S.WAITING,
    (S.WAITING, E.SUCCEED): S.SUCCESS,
    (S.WAITING, E.FAIL): S.ERROR,
    (S.WAITING, E.KILL): S.KILLED,
    (S.RUNNING, E.SUCCEED): S.SUCCESS,
    (S.RUNNING, E.FAIL): S.ERROR,
    (S.RUNNING, E.KILL): S.KILLED,
    (S.PENDING, E.SUCCEED): S.SUCCESS,  # a group: it needs no worker, its members' ends are its own
    (S.PENDING, E.FAIL): S.ERROR,
    (S.CREATING, E.CANCEL): S.CANCELLED,
    (S.PENDING, E.CANCEL): S.CANCELLED,
    (S.HELD, E.CANCEL): S.CANCELLED,
    (S.READY, E.CANCEL): S.CANCELLED,
    (S.CLAIMED, E.CANCEL): S.CANCELLED,
    (S.RUNNING, E.WITHDRAW): S.CANCELLED,
    (S.CREATING, E.SKIP): S.SKIPPED,
    (S.PENDING, E.SKIP): S.SKIPPED,
    (S.HELD, E.SKIP): S.SKIPPED,
    (S.SUCCESS, E.RETRY): S.PENDING,
    (S.ERROR, E.RETRY): S.PENDING,
    (S.KILLED, E.RETRY): S.PENDING,
    (S.CANCELLED, E.RETRY): S.PENDING,
    (S.SKIPPED, E.RETRY): S.PENDING,
}

#: May be claimed now. (Celery's `states.READY_STATES` means *finished*: here that is COMPLETE_STATES.)
READY_STATES = frozenset({S.READY})
#: Cannot be claimed yet.
UNREADY_STATES = frozenset({S.CREATING, S.PENDING, S.HELD})
#: A worker has it.
ACTIVE_STATES = frozenset({S.CLAIMED, S.RUNNING, S.WAITING})
#: Final, but for a retry.
COMPLETE_STATES = frozenset({S.SUCCESS, S.ERROR, S.KILLED, S.CANCELLED, S.SKIPPED})

#: What Celery calls it.
CELERY_STATE: dict[State, str] = {
    S.CREATING: "PENDING",
    S.PENDING: "PENDING",
    S.HELD: "PENDING",
    S.READY: "PENDING",
    S.CLAIMED: "RECEIVED",
    S.RUNNING: "STARTED",
    S.WAITING: "STARTED",
    S.SUCCESS: "SUCCESS",
    S.ERROR: "FAILURE",
    S.KILLED: "REVOKED",
    S.CANCELLED: "REVOKED",
    S.SKIPPED: "REVOKED",
}

#: Signals with which `aque kill` ends a task; any other is only delivered, and the exit decides.
ENDING_SIGNALS = frozenset({1, 2, 3, 6, 9, 15})  # HUP INT QUIT ABRT KILL TERM


def sources(event: Event) -> frozenset[State]:
    """The states from which `event` is possible."""
    return frozenset(state for state, happening in MOVES if happening is event)


def diagram() -> str:
    """The life cycle as a Mermaid state diagram, one line per move."""
    lines = ["stateDiagram-v2"]
    lines += [f"    {source} --> {target}: {event}" for (source, event), target in MOVES.items()]
    return "\n".join(lines)
