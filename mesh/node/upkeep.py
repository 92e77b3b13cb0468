"""What a node looks at again and again, since nobody tells it: memory, devices, disks, and how far the others are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mesh.clock import Clock
from mesh.node.facts import OwnFacts
from mesh.node.record import Ledger
from mesh.node.shelf import Shelf
from mesh.wire.facts import LinkFact

LINKS_S = 1.0
"""How often the ways to the others are looked at."""
REFRESH_S = 10.0
"""How often free memory is looked at again while nothing of ours is loaded, and the disk for a missing model."""
RELIST_S = 60.0
"""Between two times that an idle node's engine is asked for its devices: it is a process, and starts a driver."""


class Upkeep:
    """Keeps ``own`` facts true.

    Args:
        is_idle: whether no engine of ours runs; only then is memory free that is ours to lend.
        links: what is known of the ways to the others.
        tell: the facts have changed, and the others should know.
    """

    def __init__(
        self,
        own: OwnFacts,
        shelf: Shelf,
        ledger: Ledger,
        clock: Clock,
        *,
        is_idle: Callable[[], bool],
        links: Callable[[], tuple[LinkFact, ...]],
        tell: Callable[[], None],
    ) -> None:
        self._own, self._shelf, self._ledger, self._clock = own, shelf, ledger, clock
        self._is_idle, self._links, self._tell = is_idle, links, tell

    async def watch_machine(self) -> None:
        """Look at free memory, devices and disks until cancelled."""
        relist_at = self._clock.now() + RELIST_S
        while True:
            await asyncio.sleep(REFRESH_S)
            self._shelf.look_again()
            self._ledger.again()
            if self._is_idle() and self._clock.now() >= relist_at:
                relist_at = self._clock.now() + RELIST_S
                await asyncio.to_thread(self._own.list_devices)
            if self._is_idle() and self._own.measure():
                self._tell()

    async def watch_links(self) -> None:
        """Tell the others how far this node is from each of them, so that whoever plans knows; until cancelled."""
        while True:
            await asyncio.sleep(LINKS_S)
            if self._own.linked(self._links()):
                self._tell()
