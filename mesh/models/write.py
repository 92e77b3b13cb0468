"""Writing GGUF files, so that the same input gives the same bytes on every machine and with every library version.

Settings may be copied from another file as they lie there, without being interpreted (:func:`copied`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mesh.errors import ModelError
from mesh.models.header import Header, read_header

ALIGNMENT = 32
COPY = 8 << 20
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written; ``data`` is asked for only when its turn comes, and yields exactly ``n_bytes``."""

    name: str
    type: int
    shape: tuple[int, ...]
    n_bytes: int
    data: Callable[[], Iterable[bytes]]


def text(key: str, value: str) -> bytes:
    """The entry of a text setting."""
    return _string(key) + struct.pack("<I", 8) + _string(value)


def u16(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<IH", 2, value)


def u32(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", 4, value)


def i32(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<Ii", 5, value)


def f32(key: str, value: float) -> bytes:
    return _string(key) + struct.pack("<If", 6, value)


def copied(header: Header, keep: Callable[[str], bool]) -> list[bytes]:
    """The entries of another file whose keys are wanted, byte for byte and in their order."""
    with header.path.open("rb") as file:
        entries = []
        for key, (start, end) in header.spans.items():
            if keep(key):
                file.seek(start)
                entries.append(file.read(end - start))
        return entries


def write_gguf(
    path: Path, entries: Sequence[bytes], tensors: Sequence[NewTensor], progress: Progress, *, durable: bool = True
) -> None:
    """Write one file, whole or not at all.

    Args:
        durable: wait until the disk has it; not worth it for what is thrown away in a moment.

    Raises:
        ModelError: the disk is full, or the place may not be written.
    """
    infos, offset = [], 0
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        infos.append(_string(tensor.name) + dims + struct.pack("<IQ", tensor.type, offset))
        offset += _padded(tensor.n_bytes)
    with atomic(path, durable=durable) as file:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + b"".join(infos)
        file.write(head + bytes(_padded(len(head)) - len(head)))
        done, total = 0, sum(t.n_bytes for t in tensors)
        for tensor in tensors:
            written = 0
            for chunk in tensor.data():
                file.write(chunk)
                written += len(chunk)
                progress(done + written, total)
            assert written == tensor.n_bytes, (tensor.name, written, tensor.n_bytes)
            file.write(bytes(_padded(written) - written))
            done += written


@contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that appears under its name only when all of it is on the disk.

    Raises:
        ModelError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be written: {error.strerror or error}", remedy="free some space, or name another place"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def split_gguf(path: Path, n_shards: int, into: Path | None = None) -> tuple[Path, ...]:
    """Write a one-file model again as ``n_shards`` files that the engine takes as one model.

    Args:
        into: the directory of the shards; by default beside ``path``.

    Returns:
        The shards in order, named ``STEM-0000K-of-0000N.gguf``.
    """
    header = read_header(path)
    if not 1 <= n_shards <= len(header.tensors):
        raise ModelError(f"{path} has {len(header.tensors)} tensors: it cannot become {n_shards} shards")
    into = into or path.parent
    per_shard = -(-sum(t.n_bytes for t in header.tensors) // n_shards)
    groups: list[list[NewTensor]] = [[]]
    for index, tensor in enumerate(header.tensors):
        left = len(header.tensors) - index
        full = sum(t.n_bytes for t in groups[-1]) >= per_shard
        # Every shard holds a tensor: the last ones take what is left, one by one if need be.
        if groups[-1] and len(groups) < n_shards and (full or left <= n_shards - len(groups)):
            groups.append([])
        data = _reader(path, tensor.offset, tensor.n_bytes)
        groups[-1].append(NewTensor(tensor.name, tensor.type, tensor.shape, tensor.n_bytes, data))
    settings = copied(header, lambda key: not key.startswith("split."))
    written = []
    for index, group in enumerate(groups):
        shard = into / f"{path.stem}-{index + 1:05d}-of-{n_shards:05d}.gguf"
        entries = [
            u16("split.no", index),
            u16("split.count", n_shards),
            i32("split.tensors.count", len(header.tensors)),
        ]
        write_gguf(shard, entries + (settings if index == 0 else []), group, lambda done, total: None)
        written.append(shard)
    return tuple(written)


def _reader(path: Path, offset: int, n_bytes: int) -> Callable[[], Iterator[bytes]]:
    def read() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(offset)
            left = n_bytes
            while left:
                chunk = file.read(min(COPY, left))
                if not chunk:
                    raise ModelError(f"{path} became shorter while it was read")
                left -= len(chunk)
                yield chunk

    return read


def _string(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
