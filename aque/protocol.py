"""What a worker, its supervisors' server and its supervisors say to each other. Standard library alone.

    worker ---- control socket ----> server ---- fork ----> supervisor ---- spawn ----> the command
       \\------------------- channel, one per supervisor -------/

Control socket, messages of kind and number (`ORDER`) from the worker:
    FORK    how many supervisors are wanted. Answered by one message for each (`NUMBER`): its pid with the channel attached,
            or a negated errno with nothing attached
    ABANDON the pid of a supervisor that does not answer: it is killed, and what it was about to start
    WATCH   the pid of a process of the worker's pool
and to the worker:
    GONE    the pid of a supervisor that has ended, once nothing lives of what it ran
Channel, frames of kind and length (`FRAME`), then the body:
    to the supervisor   RUN     a marshalled dict, see `Supervisor.start`; `stdin_bytes` of stdin follow it unframed
                        SIGNAL  number (`NUMBER`): to the command's process group
                        KILL    number, seconds (`KILLING`): to the whole tree; what is left after the seconds gets SIGKILL
                        LEASE   until when (`MOMENT`, see `lease_clock`) the command may run, unless another such frame comes
    to the worker       STARTED pid (`NUMBER`) of the command
                        STDOUT, STDERR, RESULT  bytes as written, in order
                        TAIL    kind, offset (`PIECE`), bytes: the end of a stream whose middle was dropped
                        ENDED   a marshalled dict, see `Supervisor.report`
                        BROKEN  text: the supervisor has failed, and has killed what it ran
Marshal and not JSON: it carries bytes, costs no import, and both ends are one version of Python and trust each other.
"""

import struct

ORDER = struct.Struct("=ci")
FRAME = struct.Struct("=cI")
NUMBER = struct.Struct("=i")
KILLING = struct.Struct("=id")
PIECE = struct.Struct("=cQ")
MOMENT = struct.Struct("=d")
FORK, ABANDON, WATCH, GONE = b"F", b"A", b"W", b"G"
RUN, SIGNAL, KILL, LEASE = b"R", b"S", b"K", b"L"
STARTED, STDOUT, STDERR, RESULT, TAIL, ENDED, BROKEN = b"P", b"1", b"2", b"3", b"T", b"E", b"!"
