"""Becomes the engine, after tying its life to its parent's. Linux; a script, standard library only.

    python -I -S trampoline.py PARENT_PID PROGRAM [ARGUMENT]...

Reads one byte from stdin before anything of the engine runs: the parent sends it once this process is on its books, and
a parent that dies first closes the pipe instead. Then the kernel is asked to kill us with our parent, privileges we may
never need are given up, and the engine takes this process over, so that its pid is the one the parent knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
EXIT_ABANDONED = 125
EXIT_NOT_EXECUTABLE = 127
OOM_SCORE = "300"
"""Should memory run out, the kernel ends the engine, which can be started again, before the person's own programs."""


def main(argv: list[str]) -> int:
    parent, program = int(argv[1]), argv[2]
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        print(f"cannot tie the engine to mesh: {os.strerror(ctypes.get_errno())}", file=sys.stderr)  # noqa: T201
        return EXIT_ABANDONED
    # The signal comes only for deaths after the call; a parent that died before it has been replaced by now.
    if os.getppid() != parent or not os.read(0, 1):
        return EXIT_ABANDONED
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # the parent is of another class (priority.py)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        os.execv(program, argv[2:])  # noqa: S606
    except OSError as error:
        print(f"cannot start {program}: {error.strerror}", file=sys.stderr)  # noqa: T201
    return EXIT_NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv))
