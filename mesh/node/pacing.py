"""Finds out how fast this machine's devices are, once, beside everything else the node does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable

import filelock

from mesh import hardware
from mesh.engine.cache import Engine, cache_root
from mesh.engine.speed import FAMILIES, Measured, gave_up, give_up, measure, recall, remember, speed_key
from mesh.errors import EngineError
from mesh.hardware import cgroup
from mesh.wire.facts import Device, weight_family

log = logging.getLogger(__name__)

TURN_S = 0.2
"""How often to ask whether nobody else on this machine is measuring."""


class Pacing:
    """Measures each device of ``engine``'s backend, weights of ``wanted`` first.

    Args:
        wanted: type of the weights of the model this node is for, or empty.
        wall: the time of day, seconds.
        found: takes what is known of a device by name, whenever that is more than before.
    """

    def __init__(
        self, engine: Engine, wanted: str, found: Callable[[str, Measured], object], wall: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._wall = wall
        first = weight_family(wanted) if wanted else FAMILIES[0]
        self._families = (first, *(family for family in FAMILIES if family != first))
        self._found = found
        self._threads = hardware.threads()
        self._cpus = cgroup.limits().cpus if sys.platform == "linux" else None
        self._keys = {
            device.name: speed_key(engine, device, self._threads, self._cpus)
            for device in hardware.devices()
            if device.kind in ("cpu", engine.backend)
        }

    def recall(self) -> None:
        """Tell what was found in an earlier run."""
        for name, key in self._keys.items():
            known = recall(key)
            if known.speeds:
                self._found(name, known)

    async def measure(self, families: int = len(FAMILIES)) -> None:
        """Measure what is not known yet; what cannot be measured is logged, and guessed by the planner.

        Args:
            families: how many of them, first come those of the model.
        """
        for family in self._families[:families]:
            for device in hardware.devices():
                key = self._keys.get(device.name)
                if key is not None and family not in recall(key).speeds and not gave_up(key, self._wall()):
                    async with _one_at_a_time():
                        await self._measure(device, key, family)

    async def _measure(self, device: Device, key: str, family: str) -> None:
        known = recall(key)  # another node of this user may have done it while we waited
        if family not in known.speeds:
            try:
                known = await measure(self._engine, device, self._threads, family, known, cpus=self._cpus)
            except EngineError as error:
                give_up(key)
                log.warning("the speed of %s with %s weights is not known: %s", device.name, family, error.message)
                return
            remember(key, known)
            log.info("%s: %.1f GB/s of %s weights", device.name, known.speeds[family] / 1e9, family)
        self._found(device.name, known)


@contextlib.asynccontextmanager
async def _one_at_a_time() -> AsyncIterator[None]:
    """Two that measure at once would each find half the speed."""
    root = cache_root().parent / "speed"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(root / "measuring.lock")
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except filelock.Timeout:
                await asyncio.sleep(TURN_S)
    except OSError:
        yield  # a cache that cannot be written: measure, and forget
        return
    try:
        yield
    finally:
        lock.release()
