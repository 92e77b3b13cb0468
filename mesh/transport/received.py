"""Bytes that came and were not read yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable


class Received:
    """Pieces in the order they came, cut and joined only as far as a reader asks for it."""

    __slots__ = ("_pieces", "size")

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self.size = 0

    def put(self, piece: bytes) -> None:
        """Keep ``piece``, which is not empty."""
        self._pieces.append(piece)
        self.size += len(piece)

    def take(self, limit: int) -> bytes:
        """The next bytes, at most ``limit``; there must be some."""
        pieces = self._pieces
        first = pieces[0]
        if len(first) >= limit or len(pieces) == 1:
            if len(first) <= limit:
                pieces.popleft()
                taken = first
            else:
                pieces[0] = first[limit:]
                taken = first[:limit]
        else:
            taken = self._join(limit)
        self.size -= len(taken)
        return taken

    def clear(self) -> int:
        """Throw everything away; returns how much it was."""
        size, self.size = self.size, 0
        self._pieces.clear()
        return size

    def _join(self, limit: int) -> bytes:
        pieces = self._pieces
        parts: list[bytes] = []
        room = limit
        while pieces and room:
            piece = pieces.popleft()
            if len(piece) > room:
                pieces.appendleft(piece[room:])
                piece = piece[:room]
            parts.append(piece)
            room -= len(piece)
        return b"".join(parts)


async def read_exactly(read: Callable[[int], Awaitable[bytes]], n: int) -> bytes:
    """``n`` bytes by as many reads as it takes.

    Raises:
        EOFError: the stream ended first.
    """
    if n <= 0:
        return b""
    data = await read(n)
    if len(data) == n:
        return data
    parts, missing = [data], n - len(data)
    while missing:
        if not data:
            raise EOFError(f"the stream ended after {n - missing} of {n} bytes")
        data = await read(missing)
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)
