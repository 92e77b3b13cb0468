"""Keeps an engine process only as long as its parent lives. For POSIX systems without PDEATHSIG, macOS above all.

    python -I -S guard.py PARENT_PID PROGRAM [ARGUMENT]...

A script, standard library only. It leads the process group that the engine is started in and holds the read end of a
pipe (its stdin) whose only write end is the parent's: one byte says start, end of file says that the parent is gone,
and then the whole group is killed, this process included. When the engine ends by itself, the guard ends the same way.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys

EXIT_ABANDONED = 125
EXIT_NOT_EXECUTABLE = 127


def become(argv: list[str]) -> None:
    """Turn this (forked) process into the engine."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        os.execv(argv[0], argv)  # noqa: S606
    except OSError as error:
        print(f"cannot start {argv[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
    sys.stderr.flush()
    os._exit(EXIT_NOT_EXECUTABLE)


def end_like(status: int) -> None:
    """End as the engine ended, so that our parent sees its code or its signal."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main(argv: list[str]) -> int:
    if os.getppid() != int(argv[1]) or not os.read(0, 1):
        return EXIT_ABANDONED
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    engine = os.fork()
    if engine == 0:
        become(argv[2:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(engine, number))
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if 0 in readable and not os.read(0, 64):
            os.killpg(0, signal.SIGKILL)
        if woken in readable:
            os.read(woken, 64)
        ended, status = os.waitpid(engine, os.WNOHANG)
        if ended:
            end_like(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
