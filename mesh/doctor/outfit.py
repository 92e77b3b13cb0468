"""The engine that a node here uses or would use, looked at once for all checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.engine.cache import Engine, damage, entry_dir, find_engine
from mesh.engine.devices import list_devices
from mesh.engine.pin import engine_pin
from mesh.engine.toolchain import find_toolchain
from mesh.errors import EngineError
from mesh.node.backend import best_built
from mesh.wire.facts import Device


@dataclass(frozen=True, slots=True)
class Outfit:
    """An engine as it was found.

    Attributes:
        damaged: what is wrong with the files of its entry; empty when it is whole, or not there at all.
        broken: why it does not run here.
        listed: the devices that it lists.
        unbuildable: what is missing to build it.
    """

    backend: str
    pin: str
    entry: Path
    engine: Engine | None = None
    damaged: str = ""
    broken: EngineError | None = None
    listed: tuple[Device, ...] = ()
    unbuildable: EngineError | None = None


def look(backend: str) -> Outfit:
    """The engine that a node would use.

    Args:
        backend: ``auto``: the best one that is built, as a node chooses.
    """
    engine: Engine | None = None
    if backend == "auto":
        engine, _ = best_built()
        backend = "cpu" if engine is None else engine.backend
    engine = engine or find_engine(backend)
    entry = entry_dir(backend)
    listed: tuple[Device, ...] = ()
    broken = unbuildable = None
    if engine is not None:
        try:
            listed = list_devices(engine)
        except EngineError as error:
            broken = error
    try:
        find_toolchain(backend)
    except EngineError as error:
        unbuildable = error
    damaged = damage(entry) if engine is None and entry.exists() else ""
    return Outfit(backend, engine_pin(), entry, engine, damaged, broken, listed, unbuildable)
