"""Old engines leave the cache: each version of mesh builds its own, of hundreds of megabytes, and they add up.

Kept is what this version would use, for every backend; what was used last, a few of each kind, for checkouts of other
versions share the cache; and whatever runs at this moment. When an engine is started its directory's time is set.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mesh.engine.cache import RECORD, Engine, cache_root, entry_dir
from mesh.engine.toolchain import BACKENDS
from mesh.errors import EngineError

KEPT = 2
"""Entries of each kind beside the current one."""
UNFINISHED = "building-"
"""How the names of directories begin that are nothing yet, or nothing any more."""
_ENTRY = re.compile(r"(?P<kind>[a-z][a-z0-9-]{0,31})-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Removed:
    """An entry that is gone. ``bytes`` is what it took."""

    name: str
    bytes: int


def mark_used(engine: Engine) -> None:
    """This engine is being started: keep it."""
    with suppress(OSError):
        os.utime(engine.dir)


def prune(
    root: Path | None = None,
    *,
    current: Iterable[Path] | None = None,
    running: Callable[[], Iterable[Path]] | None = None,
) -> tuple[Removed, ...]:
    """Remove what is old. Only under the builders' lock: see :func:`mesh.engine.build.tidy`.

    Args:
        current: entries to keep whatever their age; by default this version's for all backends.
        running: programs that run now.
    """
    root = cache_root() if root is None else root
    keep = set(_current() if current is None else current)
    old = _too_many(root, keep)
    if not old:
        return ()
    alive = [*(_programs if running is None else running)()]
    gone = []
    for path in old:
        if any(program.is_relative_to(path) for program in alive):
            continue
        size = _size(path)
        try:
            # By a rename first: half of an entry would be taken for a damaged engine, and a name for debris is swept.
            path.rename(Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}removed-", dir=root), path.name))
        except OSError:
            continue
        gone.append(Removed(path.name, size))
    for debris in root.glob(f"{UNFINISHED}removed-*"):
        shutil.rmtree(debris, ignore_errors=True)
    return tuple(gone)


def _current() -> list[Path]:
    found = []
    for backend in BACKENDS:
        with suppress(EngineError):
            found.append(entry_dir(backend))
    return found


def _too_many(root: Path, keep: set[Path]) -> list[Path]:
    kinds: dict[str, list[tuple[float, Path]]] = defaultdict(list)
    with suppress(OSError):
        for path in root.iterdir():
            match = _ENTRY.fullmatch(path.name)
            if match is None or path in keep or path.is_symlink() or not (path / RECORD).is_file():
                continue
            kinds[match["kind"]].append((path.stat().st_mtime, path))
    return [path for found in kinds.values() for _, path in sorted(found, reverse=True)[KEPT:]]


def _programs() -> list[Path]:
    found = []
    for process in psutil.process_iter(["exe"]):
        if process.info["exe"]:
            found.append(Path(process.info["exe"]))
    return found


def _size(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        with suppress(OSError):
            total += file.lstat().st_size
    return total
