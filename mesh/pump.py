"""Drives a pure core: feeds it events, carries out its effects, keeps its timer.

Effects may cause events for the same core; they wait their turn, so that a core is never entered twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mesh.clock import Clock


class Core(Protocol):
    def handle(self, event: Any, now: float) -> Sequence[Any]: ...
    def next_timer(self) -> float | None: ...


class Pump:
    """One core, its timer and its queue. Must be used from the event loop's thread.

    Args:
        core: the state machine.
        carry_out: does one effect; must not block.
        tick: makes the event that says "a timer is due".
        after: called when a batch of events was handled and its effects were carried out.
    """

    def __init__(
        self,
        core: Core,
        carry_out: Callable[[Any], None],
        tick: Callable[[], Any],
        clock: Clock,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._core = core
        self._carry_out = carry_out
        self._tick = tick
        self._clock = clock
        self._after = after
        self._waiting: deque[Any] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def feed(self, event: Any) -> None:
        """Hand one event to the core, now or right after the one being handled."""
        if self._stopped:
            return
        self._waiting.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                for effect in self._core.handle(self._waiting.popleft(), self._clock.now()):
                    self._carry_out(effect)
        finally:
            self._busy = False
            self._waiting.clear()
            self._arm()
            self._after()

    def stop(self) -> None:
        """No more events, no more timers."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._core.next_timer()
        if due is not None and not self._stopped:
            delay = max(0.0, due - self._clock.now())
            self._timer = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.feed(self._tick())
