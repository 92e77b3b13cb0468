"""Which nodes are there, and when they were not: what a client at a machine cannot be blamed for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Absence:
    """A time in which a node was away; ``until_s`` is None while it is.

    Args:
        planned: it was told to leave, and not killed.
    """

    since_s: float
    until_s: float | None
    planned: bool


class Roster:
    """Told by whoever kills and starts nodes, asked by whoever asks them. Times are seconds of the run."""

    def __init__(self, nodes: Iterable[str]) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._away: dict[str, list[Absence]] = {node: [] for node in nodes}

    def now(self) -> float:
        return time.monotonic() - self._began

    def goes(self, node: str, *, planned: bool = False) -> None:
        """It is about to be killed, or told to leave."""
        with self._lock:
            if not self._is_away(node):
                self._away[node].append(Absence(self.now(), None, planned))

    def is_back(self, node: str) -> None:
        """Its API answers."""
        with self._lock:
            if self._is_away(node):
                self._away[node][-1] = replace(self._away[node][-1], until_s=self.now())

    def is_up(self, node: str) -> bool:
        with self._lock:
            return not self._is_away(node)

    def absence(self, node: str, since_s: float, until_s: float) -> Absence | None:
        """The last one that lies in between, or reaches into it."""
        with self._lock:
            found = [
                a for a in self._away[node] if a.since_s <= until_s and (a.until_s is None or a.until_s >= since_s)
            ]
            return found[-1] if found else None

    def _is_away(self, node: str) -> bool:
        return bool(self._away[node]) and self._away[node][-1].until_s is None
