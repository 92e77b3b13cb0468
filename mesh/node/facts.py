"""What this node tells of itself, put together from its hardware, its settings and its shelf."""

from __future__ import annotations

import logging

import msgspec

from mesh import __version__, hardware
from mesh.clock import Clock
from mesh.config import Settings
from mesh.engine.cache import Engine
from mesh.engine.devices import list_devices, usable
from mesh.engine.pin import engine_pin
from mesh.errors import EngineError
from mesh.node.prepare import LocalModel
from mesh.wire.facts import Device, ModelCost, NodeFacts, NodeId

log = logging.getLogger(__name__)
NOTABLE = 0.05
"""Share of free memory that must come or go before the others are told: it moves all the time."""


class OwnFacts:
    """Keeps the version: it grows whenever something changed, and begins above that of any earlier run."""

    def __init__(
        self,
        settings: Settings,
        me: NodeId,
        engine: Engine | None,
        addresses: tuple[str, ...],
        model: LocalModel | None,
        clock: Clock,
        *,
        tcp: bool = False,
    ) -> None:
        self._clock = clock
        self._devices: tuple[Device, ...] = ()
        self._listed: tuple[Device, ...] = ()
        self._engine = engine
        self._uses_gpu = settings.gpu_layers != 0
        self._backend = "" if engine is None else engine.backend
        self._facts = NodeFacts(
            id=me,
            version=int(clock.wall() * 1000),
            name=settings.name,
            role="client" if settings.role == "client" else "worker",
            mesh_version=__version__,
            engine="" if engine is None else engine_pin(),
            backend=self._backend,
            devices=(),
            budget_bytes=settings.max_memory,
            threads=hardware.threads(),
            models=(),
            wants="" if model is None else model.cost.fingerprint,
            addresses=addresses,
            ctx_size=settings.ctx_size,
            parallel=settings.parallel,
            tcp=tcp,
            crosses=True,
            relay_only=settings.relay_only,
            pairs=settings.role != "client",
            split=settings.split,  # type: ignore[arg-type]  # checked with the settings
        )

    def list_devices(self) -> None:
        """Ask the engine what it can compute on: the last word. Blocks, a second or so with a GPU."""
        if self._engine is None or self._backend == "cpu":
            return
        try:
            self._listed = list_devices(self._engine)
        except EngineError as error:
            log.warning("%s", error.message)

    def measure(self) -> bool:
        """Look at the devices again. Returns whether something changed that others should know."""
        if not self._backend:
            return False
        listed = self._listed if self._uses_gpu else ()
        found = usable(listed, hardware.devices(), self._backend)
        if not _differ(self._devices, found):
            return False
        self._devices = found
        return True

    def computes_on(self, device: str) -> None:
        """The engine's log says that the share is on ``device``; empty: where the layout has it."""
        if device != self._facts.computes_on:
            self._renew(computes_on=device)

    def moved(self, addresses: tuple[str, ...]) -> None:
        """This node is reached at ``addresses`` from now on."""
        self._renew(addresses=addresses)

    def leaves(self) -> None:
        """This node is about to go."""
        self._renew(draining=True)

    def facts(self, models: tuple[ModelCost, ...]) -> NodeFacts:
        """The facts as they are now."""
        if models != self._facts.models or self._devices != self._facts.devices:
            self._renew(models=models, devices=self._devices)
        return self._facts

    def _renew(self, **changes: object) -> None:
        version = max(self._facts.version + 1, int(self._clock.wall() * 1000))
        self._facts = msgspec.structs.replace(self._facts, version=version, **changes)


def _differ(before: tuple[Device, ...], after: tuple[Device, ...]) -> bool:
    if [(d.name, d.total_bytes) for d in before] != [(d.name, d.total_bytes) for d in after]:
        return True
    return any(
        abs(a.free_bytes - b.free_bytes) > NOTABLE * max(b.free_bytes, 1) for b, a in zip(before, after, strict=True)
    )
