"""How a node goes on purpose: it says so first, and carries on until the others can do without it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from mesh.notice import Notice, View

HAND_OVER_S = 3.0
"""For a layout without this node to be agreed; a coordinator that is dead is noticed and replaced in that time."""
SHOW_AFTER_S = 0.5


class Stop(asyncio.Event):
    """Set when the node is to end. Asked a second time, it does not wait for requests any more."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = asyncio.Event()
        self.waits = False
        """For requests under way; so asking again makes a difference."""

    def ask(self) -> None:
        """Once, or once more."""
        if self.is_set():
            self.at_once.set()
        self.set()


class Leaver(Protocol):
    """What is asked of the node that goes."""

    @property
    def drain_s(self) -> float:
        """How long requests may take that need this node; 0 when none can."""
        ...

    def announce_departure(self) -> None: ...
    async def unneeded(self) -> None:
        """Return once nothing runs here for the mesh."""
        ...


async def hand_over(node: Leaver, stop: Stop, view: View) -> None:
    """Return when the mesh does without ``node``, when its time is over, or when ``stop`` is asked again."""
    drain_s = node.drain_s
    if drain_s <= 0 or stop.at_once.is_set():
        return
    node.announce_departure()
    waits = [asyncio.ensure_future(node.unneeded()), asyncio.ensure_future(stop.at_once.wait())]
    stop.waits = True
    try:
        done, _ = await asyncio.wait(waits, timeout=SHOW_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            view.show(Notice("change", waiting_line(drain_s), {"drain_s": drain_s}))
            timeout = drain_s + HAND_OVER_S - SHOW_AFTER_S
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.waits = False
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def waiting_line(drain_s: float) -> str:
    """What a node that goes waits for, for people."""
    return f"handing over: requests under way may finish first, {drain_s:.0f} s at most (again to stop at once)"
