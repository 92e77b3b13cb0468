"""How large a datagram a path takes: tried, never guessed (RFC 8899; RFC 9000, section 14.3). Pure.

Each packet costs the same in an interpreter, however long it is, so fewer of them are less of the processor that an
engine computes with. What is probed is a ping that is padded; its loss says nothing of congestion.
"""

from __future__ import annotations

from collections import deque

SIZES = (1452, 1404)
"""Bytes: what Ethernet's 1500 leave under IPv6 and UDP, and what is left of that by PPPoE, VLANs and light tunnels."""
TRIES = 2
"""Of each size: one probe may be lost like any packet."""


class PathMtu:
    """The largest datagram for one path.

    Args:
        base: bytes that every path takes.
    """

    def __init__(self, base: int) -> None:
        self._base = base
        self.largest = base
        self._left: deque[int] = deque()
        self._on_its_way = False
        self._searching = False

    def search(self) -> None:
        """The path is new: begin with what every path takes, and try more."""
        self.largest = self._base
        self._left = deque(size for size in SIZES for _ in range(TRIES))
        self._on_its_way = False
        self._searching = True

    def settle(self, largest: int) -> None:
        """Take ``largest`` bytes for good, and try no more: too much is lost, or somebody else knows."""
        self.largest = largest
        self._left.clear()
        self._searching = False

    def next_probe(self) -> int | None:
        """Bytes of the probe to send now, if any."""
        if self._on_its_way or not self._left:
            return None
        self._on_its_way = True
        return self._left.popleft()

    def delivered(self, size: int) -> None:
        """A probe arrived."""
        self._on_its_way = False
        if self._searching:
            self.settle(size)

    def lost(self) -> None:
        """A probe did not arrive."""
        self._on_its_way = False
