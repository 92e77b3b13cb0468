"""One direction between two nodes: which packets pass, and when. Pure: time and chance come in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bench.lab.links import Link


@dataclass(frozen=True, slots=True)
class Counter:
    """What one direction carried since the last reset, in IP bytes. Dropped packets are in neither of the first two."""

    bytes: int = 0
    packets: int = 0
    dropped: int = 0


class Path:
    """A first-in first-out pipe with a delay, a rate, a bounded queue and, when asked, holes.

    The owner calls :meth:`push` for every packet and takes from :attr:`queue` what is due. It leaves out packets of the
    IP protocols in :attr:`blocked`: a path does not look into packets.
    """

    __slots__ = (
        "_busy_until",
        "_chance",
        "_delay",
        "_jitter",
        "_last_due",
        "_loss",
        "_patience",
        "_seconds_per_byte",
        "blocked",
        "bytes",
        "cut",
        "dropped",
        "link",
        "packets",
        "queue",
    )

    def __init__(self, link: Link, chance: Callable[[], float]) -> None:
        """``chance`` returns a number in [0, 1)."""
        self._chance = chance
        self._busy_until = 0.0
        self._last_due = 0.0
        self.queue: deque[tuple[float, bytes]] = deque()
        self.cut = False
        self.blocked: frozenset[int] = frozenset()
        self.bytes = self.packets = self.dropped = 0
        self.change(link)

    def change(self, link: Link) -> None:
        """Take on another link's manners; packets already under way keep the old ones."""
        self.link = link
        self._delay = link.delay_s
        self._jitter = link.jitter_s
        self._loss = link.loss
        self._seconds_per_byte = 0.0 if link.bytes_per_second is None else 1.0 / link.bytes_per_second
        self._patience = link.queue_s

    def push(self, packet: bytes, now: float, size: int, count: int = 1) -> float | None:
        """Accept a packet and say when it arrives, or None when it never will.

        ``size`` is its IP bytes; ``count`` the packets it stands for, where the kernel left a train of segments whole.
        """
        if self.cut or (self._loss and self._chance() < self._loss):
            self.dropped += count
            return None
        due = now
        if self._seconds_per_byte:
            start = self._busy_until
            if start < now:
                start = now
            elif start - now > self._patience:
                self.dropped += count
                return None
            self._busy_until = due = start + size * self._seconds_per_byte
        due += self._delay
        if self._jitter:
            due += self._jitter * (2.0 * self._chance() - 1.0)
        # Paths keep order: a packet that would overtake the one before it arrives with it.
        if due < self._last_due:
            due = self._last_due
        self._last_due = due
        self.bytes += size
        self.packets += count
        self.queue.append((due, packet))
        return due

    def sever(self) -> None:
        """Cut the path; what was under way is lost, so nothing arrives after this."""
        self.cut = True
        self.dropped += len(self.queue)
        self.queue.clear()
        self._busy_until = self._last_due = 0.0

    def counter(self) -> Counter:
        return Counter(self.bytes, self.packets, self.dropped)

    def reset_counter(self) -> None:
        self.bytes = self.packets = self.dropped = 0
