"""Who computes first where there are fewer cores than work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


class Priority:
    """Of the thread that runs this node, and of those it starts, beside the engine's.

    On Linux a thread of the batch class has its share of the processor as before, but does not interrupt others when
    it wakes. A ring's host then passes a token on while it waits for its workers; with a core to spare nothing changes.
    But what engines say to each other must not wait for an engine, where it goes through this process.
    What is started for the engine goes back to the usual class (trampoline.py): children inherit it.
    """

    def __init__(self) -> None:
        self._urgent = 0
        self._yields = False

    def yield_to_engines(self) -> None:
        """From now on, unless something is :meth:`urgent`: wait for a core rather than take it from an engine."""
        self._yields = True
        self._set()

    @contextlib.contextmanager
    def urgent(self) -> Iterator[None]:
        """An engine waits for what this node does meanwhile."""
        self._urgent += 1
        self._set()
        try:
            yield
        finally:
            self._urgent -= 1
            self._set()

    def _set(self) -> None:
        if sys.platform == "linux" and self._yields:
            with contextlib.suppress(OSError):
                wanted = os.SCHED_OTHER if self._urgent else os.SCHED_BATCH
                os.sched_setscheduler(0, wanted, os.sched_param(0))


priority = Priority()
"""The process has one main thread, and it one class."""
