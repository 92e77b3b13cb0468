"""The models on this machine's disk: by path, by name, by fingerprint."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mesh.errors import ModelError
from mesh.models.fingerprint import FingerprintCache, Progress, fingerprint
from mesh.models.gguf import SHARD, ModelFile, inspect, shard_paths
from mesh.wire.facts import ModelCost

MAX_DEPTH = 3
"""Directories below a models directory: publisher / repository / file is the deepest layout in common use."""


def models_directory() -> Path:
    """Where models live unless another place is named; ``MESH_MODELS_DIR`` overrides it."""
    override = os.environ.get("MESH_MODELS_DIR")
    return Path(override).expanduser().absolute() if override else platformdirs.user_data_path("mesh") / "models"


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found: usable models, and files that only look like some."""

    models: tuple[ModelFile, ...]
    broken: tuple[tuple[Path, ModelError], ...]


class Inventory:
    """Looks at directories when asked; keeps nothing but fingerprints.

    Args:
        directories: searched in order; by default the user's models directory.
    """

    def __init__(self, directories: Sequence[Path] | None = None, *, cache: FingerprintCache | None = None) -> None:
        self.directories = tuple(directories) if directories is not None else (models_directory(),)
        self.cache = cache if cache is not None else FingerprintCache()

    def scan(self) -> Scan:
        models: list[ModelFile] = []
        broken: list[tuple[Path, ModelError]] = []
        for path in self._files():
            try:
                models.append(inspect(path))
            except ModelError as error:
                broken.append((path, error))
        return Scan(tuple(models), tuple(broken))

    def list_models(self) -> tuple[ModelFile, ...]:
        """Every usable model, in the order of the directories and then of names."""
        return self.scan().models

    def find(self, name_or_path: str | Path) -> ModelFile:
        """The model at a path, or of a name: the file's stem, what the file calls itself, or the beginning of one.

        Raises:
            ModelError: nothing of that name (with what there is, and the nearest), several, or a bad file.
        """
        text = str(name_or_path)
        path = Path(text).expanduser()
        if isinstance(name_or_path, Path) or path.exists() or path.parent != Path() or text.lower().endswith(".gguf"):
            in_directory = [d / text for d in self.directories if not path.is_absolute() and (d / text).exists()]
            return inspect(in_directory[0] if in_directory and not path.exists() else path)
        wanted = text.casefold()
        # By file name first: the headers of a hundred models need not be read to open one.
        named = [p for p in self._files() if _stem(p).casefold() == wanted]
        if len(named) == 1:
            return inspect(named[0])
        scan = self.scan()
        for matches in (_is_called(wanted), _begins_with(wanted)):
            found = [m for m in scan.models if matches(m)]
            if len(found) == 1:
                return found[0]
            if found:
                paths = ", ".join(str(m.paths[0]) for m in found[:4])
                raise ModelError(f'{len(found)} models are called "{text}": {paths}', remedy="name one by its path")
        raise self._no_such(text, scan)

    def find_like(self, cost: ModelCost, progress: Progress = lambda done, total: None) -> ModelFile | None:
        """This node's copy of a model another node told of, or None.

        Only a file of the same size, shape and tensor bytes is ever hashed.

        Raises:
            ModelError: a candidate became unreadable while it was hashed.
        """
        known = self.cache.find(cost.fingerprint)
        if known is not None:
            try:
                return inspect(known[0])
            except ModelError:
                pass
        for model in self.list_models():
            if _same_shape(model, cost) and self.cost(model, progress).fingerprint == cost.fingerprint:
                return model
        return None

    def cost(self, model: ModelFile, progress: Progress = lambda done, total: None) -> ModelCost:
        """What the other nodes are told of a model: its cost with its fingerprint, hashed now if it must be."""
        return model.cost(fingerprint(model.paths, cache=self.cache, progress=progress))

    def _files(self) -> Iterator[Path]:
        """Candidates: every .gguf file, and of shards only the first that is there."""
        seen: set[Path] = set()
        for directory in self.directories:
            for root, below, files in os.walk(directory):
                if len(Path(root).relative_to(directory).parts) >= MAX_DEPTH:
                    below.clear()
                below[:] = sorted(name for name in below if not name.startswith("."))
                for name in sorted(files):
                    path = Path(root, name)
                    if name.startswith(".") or not name.lower().endswith(".gguf"):
                        continue
                    first = next((p for p in shard_paths(path) if p.exists()), path)
                    if first.resolve() not in seen:
                        seen.add(first.resolve())
                        yield first

    def _no_such(self, name: str, scan: Scan) -> ModelError:
        where = ", ".join(map(str, self.directories))
        names = [m.name for m in scan.models]
        if not names:
            return ModelError(
                f'there is no model "{name}": no model is in {where}',
                remedy="give a path:  --model FILE.gguf    or try the demo:  mesh up --demo",
            )
        folded = {n.casefold(): n for n in names}
        near = difflib.get_close_matches(name.casefold(), folded, n=1)
        there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return ModelError(
            f'there is no model "{name}" in {where}; there is {there}',
            remedy=f'did you mean "{folded[near[0]]}"?' if near else "`mesh models list` shows them all",
        )


def _stem(path: Path) -> str:
    match = SHARD.match(path.name)
    return match["stem"] if match else path.stem


def _is_called(wanted: str) -> Callable[[ModelFile], bool]:
    return lambda model: wanted in (model.name.casefold(), model.title.casefold())


def _begins_with(wanted: str) -> Callable[[ModelFile], bool]:
    return lambda model: model.name.casefold().startswith(wanted)


def _same_shape(model: ModelFile, cost: ModelCost) -> bool:
    # The hash decides; another version of mesh may know less of a model, or more.
    mine = model.cost(cost.fingerprint)
    return (mine.size_bytes, mine.n_embd, mine.layer_bytes) == (cost.size_bytes, cost.n_embd, cost.layer_bytes)
