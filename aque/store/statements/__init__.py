"""Every statement on the tables, one function each. They are built once per database and take only parameters after that.

Sets of rows travel as one JSON parameter (see `engine.row_set`). PostgreSQL locks rows in id order wherever a statement
touches several, so that two workers cannot wait for each other; SQLite has one writer at a time and leaves the locks out.
"""

from aque.store.statements.claims import *  # noqa: F403
from aque.store.statements.finishes import *  # noqa: F403
from aque.store.statements.groups import *  # noqa: F403
from aque.store.statements.invariants import *  # noqa: F403
from aque.store.statements.kills import *  # noqa: F403
from aque.store.statements.leases import *  # noqa: F403
from aque.store.statements.questions import *  # noqa: F403
from aque.store.statements.refusals import *  # noqa: F403
from aque.store.statements.results import *  # noqa: F403
from aque.store.statements.retention import *  # noqa: F403
from aque.store.statements.run_times import *  # noqa: F403
from aque.store.statements.submissions import *  # noqa: F403
from aque.store.statements.times import *  # noqa: F403
from aque.store.statements.tokens import *  # noqa: F403
from aque.store.statements.transitions import *  # noqa: F403
