"""Time as an argument.

Pure cores never ask what time it is: they are told. Adapters ask a :class:`Clock`, so tests can hold it still.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two kinds of time, never mixed."""

    def now(self) -> float:
        """Seconds that never go back; for timers and durations only."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch; for expiry dates and what people read."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
