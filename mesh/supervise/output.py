"""What engine processes print: to files of bounded size, the last lines kept to explain an exit."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path

MAX_LINE = 4096
"""Bytes of a line that are kept in memory."""
TAIL_LINES = 50
_PROGRESS = re.compile(rb"mesh-load (\d{1,18}) (\d{1,18})")
_FALLBACK = re.compile(r"mesh-push-fallback (\S{1,64}) (\S{1,64}) (.*)")


class RotatingLog:
    """Appends to ``path`` and moves it to ``path.1``, ``path.2`` ... when full.

    Args:
        max_bytes: size at which a file is full.
        keep: files in all, the current one included.
    """

    def __init__(self, path: Path, *, max_bytes: int = 4 << 20, keep: int = 3) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._file: FileIO | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        """A full disk costs the log, not the engine."""
        try:
            if self._file is None:
                self._open()
            elif self._size and self._size + len(data) > self._max_bytes:
                self._rotate()
            assert self._file is not None
            self._file.write(data)
            self._size += len(data)
        except OSError:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Prompts may be in it.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._size = os.fstat(descriptor).st_size
        if self._size >= self._max_bytes:
            self._rotate()

    def _rotate(self) -> None:
        self.close()
        for number in range(self._keep - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)
        if self._keep == 1:
            self._path.unlink(missing_ok=True)
        self._open()


class _Lines:
    """Cuts one pipe's bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, rest = (self._rest + data).split(b"\n")
        while len(rest) >= MAX_LINE:
            lines.append(rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
        self._rest = rest
        return lines

    def end(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class Output:
    """Receives what one process prints.

    Args:
        log: where lines go.
        on_progress: called with bytes done and bytes in all for each ``mesh-load DONE TOTAL`` line of its stdout;
            such lines go nowhere else.
        on_line: called with each line, printable, the progress apart.
        on_fallback: called with two names and the reason when the engine says that what the first computes reaches the
            second only through the host.
    """

    def __init__(
        self,
        log: RotatingLog,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_fallback: Callable[[str, str, str], None] = lambda source, destination, reason: None,
        on_line: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._log = log
        self._on_progress = on_progress
        self._on_fallback = on_fallback
        self._on_line = on_line
        self._pipes = {1: _Lines(), 2: _Lines()}
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines, printable, oldest first."""
        return tuple(self._tail)

    def feed(self, descriptor: int, data: bytes) -> None:
        """Bytes from stdout (1) or stderr (2)."""
        self._take(descriptor, self._pipes[descriptor].feed(data))

    def end(self) -> None:
        """Both pipes are closed: a last line without a newline is a line."""
        for descriptor, pipe in self._pipes.items():
            self._take(descriptor, pipe.end())

    def _take(self, descriptor: int, lines: list[bytes]) -> None:
        kept = []
        for line in lines:
            if descriptor == 1 and (match := _PROGRESS.fullmatch(line.rstrip(b"\r"))):
                self._on_progress(int(match[1]), int(match[2]))
                continue
            kept.append(line + b"\n")
            words = line[:MAX_LINE].decode("utf-8", "replace")
            self._tail.append("".join(c if c.isprintable() else " " for c in words).rstrip())
            self._on_line(self._tail[-1])
            if fallback := _FALLBACK.fullmatch(self._tail[-1]):
                self._on_fallback(*fallback.groups())
        if kept:
            self._log.write(b"".join(kept))
