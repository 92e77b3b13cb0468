"""What the engine is made of: one pinned source and an ordered queue of patches.

Two nodes can share a ring when their pins are equal. The binaries may differ: each is tuned to its own processor.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mesh.errors import EngineError

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of the source distribution, as the package index publishes it."""


def archive_name(version: str) -> str:
    """The file that the package index has of ``version``."""
    return f"llama_cpp_python-{version}.tar.gz"


def tree_in_archive(version: str) -> PurePosixPath:
    """Where the engine's tree lies in the archive; nothing else of it is unpacked."""
    return PurePosixPath(f"llama_cpp_python-{version}/vendor/llama.cpp")


ARCHIVE = archive_name(VERSION)
TREE = tree_in_archive(VERSION)
SOURCE = f"{PACKAGE}=={VERSION} sha256:{SHA256}"

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGED = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True, slots=True)
class Patch:
    """One file of the queue, with line ends as they were committed."""

    name: str
    content: bytes


def data_dir(name: str) -> Path:
    """The directory ``patches`` or ``native``: beside the package in a checkout, inside it when installed.

    Raises:
        EngineError: neither exists.
    """
    for base in (_PACKAGED, _CHECKOUT):
        if (base / name).is_dir():
            return base / name
    raise EngineError(
        f"the directory {name!r} that the engine is built from is missing from this installation",
        remedy="install mesh again, or run it from a complete checkout",
    )


def read_queue(directory: Path) -> tuple[Patch, ...]:
    """The patches that ``series`` names, in its order; ``#`` begins a comment.

    Raises:
        EngineError: ``series`` or a patch it names is missing.
    """
    try:
        names = [line.partition("#")[0].strip() for line in (directory / "series").read_text("utf-8").splitlines()]
        # A checkout on Windows may have turned line ends around: the pin must not depend on it.
        return tuple(Patch(n, (directory / n).read_bytes().replace(b"\r\n", b"\n")) for n in names if n)
    except OSError as error:
        raise EngineError(
            f"the engine's patch queue cannot be read: {error}",
            remedy="git checkout -- patches, or install mesh again",
        ) from error


@functools.cache
def patch_queue() -> tuple[Patch, ...]:
    """The patches of this version of mesh."""
    return read_queue(data_dir("patches"))


def queue_digest(patches: tuple[Patch, ...]) -> str:
    """Hex SHA-256 over names, order and contents."""
    digest = hashlib.sha256()
    for patch in patches:
        for part in (patch.name.encode(), patch.content):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def engine_pin() -> str:
    """Twelve hex digits of source and patches: what must be equal on every node of a ring."""
    return hashlib.sha256(f"{SOURCE}\n{queue_digest(patch_queue())}".encode()).hexdigest()[:12]
