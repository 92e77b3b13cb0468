"""The model that must be on this machine before a node starts. Slow, with progress."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.config import Settings, format_size
from mesh.engine.cache import Engine
from mesh.errors import EngineError
from mesh.models.demo import DEMO_NAME, DEMO_VERSION, write_demo
from mesh.models.gguf import ModelFile, inspect
from mesh.models.inventory import Inventory, models_directory
from mesh.notice import Notice, View
from mesh.wire.facts import ModelCost


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose file is complete on this disk."""

    file: ModelFile
    cost: ModelCost


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
