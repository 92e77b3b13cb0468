"""What must be on this machine before a node starts: the engine, and its model. Slow, with progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.config import Settings, format_size
from mesh.engine.build import build_engine
from mesh.engine.cache import Engine, find_engine
from mesh.errors import EngineError
from mesh.models.demo import DEMO_NAME, DEMO_VERSION, write_demo
from mesh.models.gguf import ModelFile, inspect
from mesh.models.inventory import Inventory, models_directory
from mesh.notice import Notice, View
from mesh.wire.facts import ModelCost

ACCELERATED = ("cuda", "metal", "rocm", "sycl", "vulkan")
"""Backends in the order ``auto`` prefers them, when they are built."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose file is complete on this disk."""

    file: ModelFile
    cost: ModelCost


class _Build:
    """Shows a build of the engine."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._phase = "engine"

    def phase(self, text: str) -> None:
        self._view.show(Notice("engine", text))
        self._phase = text

    def advance(self, done: int, total: int, unit: str) -> None:
        self._view.progress(self._phase, done, total, "B" if unit == "bytes" else unit)


def prepare_engine(backend: str, view: View) -> Engine:
    """The engine for ``backend``, built now if need be. ``auto``: an accelerated one that is built, else the CPU's.

    Raises:
        EngineError: it cannot be built here.
    """
    if backend == "auto":
        built = (find_engine(name) for name in ACCELERATED)
        engine = next((engine for engine in built if engine is not None), None) or find_engine("cpu")
        backend = "cpu"
    else:
        engine = find_engine(backend)
    if engine is not None:
        return engine
    view.show(Notice("engine", "not built yet for this machine; this takes some minutes, once"))
    return build_engine(_Build(view), backend)


def prepare_model(settings: Settings, engine: Engine | None, view: View) -> LocalModel | None:
    """The model that ``--model`` or ``--demo`` names, hashed; None when neither is given.

    Raises:
        ModelError: the file is missing, damaged or no model.
    """
    if settings.demo:
        if engine is None:
            raise EngineError("the demo model needs the engine's vocabulary", remedy="mesh engine build")
        return measure(ensure_demo(engine, view), view)
    if settings.model is None:
        return None
    return measure(Inventory().find(settings.model), view)


def measure(file: ModelFile, view: View) -> LocalModel:
    """``file`` with its fingerprint, which is computed once per file and then remembered."""
    label = f"checking {file.name}"
    cost = Inventory().cost(file, lambda done, total: view.progress(label, done, total))
    return LocalModel(file, cost)


def ensure_demo(engine: Engine, view: View) -> ModelFile:
    """The demo model in the models directory, written now if it is not there, or of another version."""
    path = demo_path()
    if path.exists():
        file = inspect(path)
        if file.demo_version == DEMO_VERSION:
            return file
    file = write_demo(
        path, engine.vocab("llama-spm"), progress=lambda done, total: view.progress(f"writing {path.stem}", done, total)
    )
    view.show(Notice("model", f"wrote {path}, {format_size(file.size_bytes)}"))
    return file


def demo_path() -> Path:
    return models_directory() / f"{DEMO_NAME}.gguf"
