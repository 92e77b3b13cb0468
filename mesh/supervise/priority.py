"""Who computes first where there are fewer cores than work."""

from __future__ import annotations

import contextlib
import os
import sys


def yield_to_engines() -> None:
    """Let this thread, and those it starts, wait for a core rather than take it from an engine amid a token.

    On Linux a thread of the batch class has its share of the processor as before, but does not interrupt others when
    it wakes. A ring's host then passes a token on while it waits for its workers; with a core to spare nothing changes.
    What is started for the engine goes back to the usual class (trampoline.py): children inherit it.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
