"""Why a process ended, in words a person can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum


class ProcessKind(Enum):
    """The two programs of the engine. The value is the name people, logs and files know."""

    RPC = "rpc-server"
    SERVER = "llama-server"


_SIGNALS = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL",
            10: "SIGUSR1", 11: "SIGSEGV", 13: "SIGPIPE", 15: "SIGTERM", 24: "SIGXCPU", 31: "SIGSYS"}  # fmt: skip
_HINTS = {
    4: "the engine was built for another processor: mesh engine build",
    9: "by another program, or by the system for lack of memory",
}
_NTSTATUS = {
    0xC0000005: "access violation",
    0xC000001D: "illegal instruction",
    0xC0000017: "not enough memory",
    0xC0000135: "a DLL is missing",
    0xC0000409: "aborted",
}
_TELLING = re.compile(r"\b(error|failed|fail|abort|assert|cannot|couldn't|unable|out of memory|refused|denied)\b", re.I)
_MARKED = {"mesh-rpc-lost": "lost", "mesh-refused": "refused by"}
"""Words that start a line of the patched engine which names an RPC server, and how they read."""
MAX_REASON = 900
"""Characters; an ``EngineDown`` message carries 1024."""


def ending(code: int) -> str:
    """How ``code`` reads: negative is a POSIX signal, above 0xC0000000 an NTSTATUS."""
    if code < 0:
        name = _SIGNALS.get(-code, f"signal {-code}")
        hint = _HINTS.get(-code)
        return f"was killed by {name}" + (f" ({hint})" if hint else "")
    if code >= 0xC0000000:
        return f"crashed with status 0x{code:08X}" + (f" ({_NTSTATUS[code]})" if code in _NTSTATUS else "")
    return f"exited with code {code}"


def telling_line(tail: Sequence[str], *, any_line: bool = True) -> str:
    """What of ``tail`` is most likely to say why.

    The engine's own word on a lost or refusing server, else the last line that names a failure, else the last at all
    (with ``any_line``).
    """
    spoken = [line.strip() for line in tail if line.strip()]
    marked = [line for line in spoken if line.partition(" ")[0] in _MARKED]
    if marked:
        mark, _, rest = marked[0].partition(" ")
        server, _, why = rest.partition(" ")
        return f"{_MARKED[mark]} {server}: {why}"
    accusing = [line for line in spoken if _TELLING.search(line)]
    return (accusing or (spoken if any_line else []) or [""])[-1]


def exit_reason(kind: ProcessKind, code: int, tail: Sequence[str]) -> str:
    """One line: which program, how it ended, and its last telling words."""
    # Who is killed from outside has no last words: the last line would be about something else.
    line = telling_line(tail, any_line=code >= 0)
    return f"{kind.value} {ending(code)}" + (f": {line}" if line else "")


def clipped(reason: str) -> str:
    """``reason`` within what a message may carry; its end, where causes stand, is kept."""
    return reason if len(reason) <= MAX_REASON else reason[:200] + " ... " + reason[205 - MAX_REASON :]
