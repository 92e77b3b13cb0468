"""Which model a file is: SHA-256 over its content, computed once per file and remembered per user."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from mesh.errors import ModelError

CHUNK = 8 << 20
"""Bytes per read: few enough calls, and small enough that progress moves."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def cache_directory() -> Path:
    """Per user; ``MESH_CACHE_DIR`` overrides it."""
    override = os.environ.get("MESH_CACHE_DIR")
    return (
        Path(override).expanduser().absolute() if override else platformdirs.user_cache_path("mesh")
    ) / "fingerprints"


@dataclass(frozen=True, slots=True)
class _Identity:
    """What changes when a file's content does."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> _Identity:
        try:
            stat = path.stat()
            return cls(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read: {error.strerror or error}", remedy="check the path and its permissions"
            ) from error


class FingerprintCache:
    """Known fingerprints, one small file per model. Losing or damaging it costs time, nothing else."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory if directory is not None else cache_directory()

    def get(self, paths: Sequence[Path]) -> str | None:
        """The fingerprint of these shards, if they are still what they were when it was computed."""
        identities = [_Identity.of(p) for p in paths]
        entry = self._read(self._place(identities))
        return entry[1] if entry is not None and entry[0] == identities else None

    def changed(self, paths: Sequence[Path]) -> str | None:
        """The fingerprint that was taken of these files before they changed; None: they have not, or none was."""
        identities = [_Identity.of(p) for p in paths]
        entry = self._read(self._place(identities))
        return entry[1] if entry is not None and entry[0] != identities else None

    def put(self, paths: Sequence[Path], fingerprint: str) -> None:
        """Remember. A cache that cannot be written is no error: the next node start hashes again."""
        self._put([_Identity.of(p) for p in paths], fingerprint)

    def find(self, fingerprint: str) -> tuple[Path, ...] | None:
        """Shards known to have this fingerprint, and unchanged since."""
        for place in self._places():
            entry = self._read(place)
            if entry is None or entry[1] != fingerprint:
                continue
            paths = tuple(Path(identity.path) for identity in entry[0])
            try:
                if [_Identity.of(p) for p in paths] == entry[0]:
                    return paths
            except ModelError:
                continue
        return None

    def _put(self, identities: list[_Identity], fingerprint: str) -> None:
        place = self._place(identities)
        files = [[i.path, i.size, i.mtime_ns, i.inode] for i in identities]
        part = place.with_suffix(f".{os.getpid()}.part")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"files": files, "fingerprint": fingerprint}))
            part.replace(place)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _place(self, identities: Sequence[_Identity]) -> Path:
        # By path alone: a changed file replaces its old entry.
        paths = "\0".join(identity.path for identity in identities)
        return self.directory / f"{hashlib.sha256(paths.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"

    def _places(self) -> Iterator[Path]:
        try:
            yield from sorted(self.directory.glob("*.json"))
        except OSError:
            return

    def _read(self, place: Path) -> tuple[list[_Identity], str] | None:
        try:
            entry: Any = json.loads(place.read_text())
            fingerprint = entry["fingerprint"]
            identities = [_Identity(str(p), int(s), int(m), int(i)) for p, s, m, i in entry["files"]]
            valid = (
                isinstance(fingerprint, str) and len(fingerprint) == 64 and set(fingerprint) <= set("0123456789abcdef")
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (identities, fingerprint) if valid and identities else None


def fingerprint(
    paths: Sequence[Path],
    *,
    cache: FingerprintCache | None = None,
    progress: Progress = lambda done, total: None,
) -> str:
    """Hex SHA-256 over the content of all shards in order.

    Args:
        cache: where to look first, and to remember; None to hash in any case.
        progress: may raise to give up; nothing is remembered then.

    Raises:
        ModelError: a file is unreadable, or changed while it was read.
    """
    if cache is not None and (known := cache.get(paths)) is not None:
        return known
    before = [_Identity.of(p) for p in paths]
    total, done = sum(i.size for i in before), 0
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    digest.update(view[:n])
                    done += n
                    progress(done, total)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read: {error.strerror or error}", remedy="check the disk and the file's permissions"
            ) from error
    if done != total or [_Identity.of(p) for p in paths] != before:
        raise ModelError(f"{paths[0]} changed while it was read", remedy="wait until its copy or download is done")
    result = digest.hexdigest()
    if cache is not None:
        # The identity from before the reading: a change after it must not be covered.
        cache._put(before, result)
    return result
