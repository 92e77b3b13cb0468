"""What an ingress has seen of one event stream. Pure.

Only whole events go to the client, so that whatever follows a loss (an error, or the continuation) never lands in the
middle of one. This is the place that grows into the transcript a lost generation is continued from.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 << 20
"""A longer event is passed on in pieces; a stream cut inside one cannot be mended."""


class Transcript:
    """Cuts a byte stream into server-sent events, without changing a byte."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        # A boundary may lie across two pieces; looking back this far finds it without joining them.
        self._edge = b""
        self.last = b""
        """The newest whole event that was no comment; empty before the first."""

    def feed(self, data: bytes) -> bytes:
        """The whole events that ``data`` completes, as they came; ``b""`` while there is none."""
        end = _last_boundary(self._edge + data) - len(self._edge)
        if end <= 0 and self._size + len(data) <= MAX_EVENT_BYTES:
            self._keep(data, self._parts)
            return b""
        if end <= 0:
            end = len(data)
        whole = b"".join([*self._parts, data[:end]])
        self._size = 0
        self._edge = b""
        self._keep(data[end:], [])
        self._note_last(whole)
        return whole

    def finish(self) -> bytes:
        """What remains after the last whole event."""
        rest = b"".join(self._parts)
        self._parts, self._size, self._edge = [], 0, b""
        return rest

    def _keep(self, data: bytes, parts: list[bytes]) -> None:
        self._parts = parts
        if data:
            self._parts.append(data)
            self._size += len(data)
            self._edge = (self._edge + data)[-3:]

    def _note_last(self, whole: bytes) -> None:
        for event in reversed(whole.replace(b"\r\n", b"\n").split(b"\n\n")):
            if event and not event.startswith(b":"):
                self.last = event
                return


def _last_boundary(data: bytes) -> int:
    """The end of the last whole event in ``data``; 0 when none ends there."""
    plain, windows = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, windows + 4 if windows >= 0 else 0)
