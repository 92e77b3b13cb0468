"""The header of one GGUF file, read with a bound on everything and without touching the weights.

The ``gguf`` package's reader builds an array per vocabulary entry: 9 s for a 128k-token header, where this takes a
fraction of a second; it also trusts lengths in the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mesh.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 512 << 20
"""Bytes. The largest vocabularies in use take about 20 MB."""
MAX_STRING = 16 << 20
MAX_KEPT_ARRAY = 4096
"""Entries. Per-layer settings are kept; vocabularies are only counted."""
CHUNK = 1 << 20

STRING, ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

DAMAGED = "copy or download the file again, and compare its size and checksum with the source's"


@dataclass(frozen=True, slots=True)
class Counted:
    """An array too long to keep: only its length is known."""

    count: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Counted


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: ``offset`` is in bytes from the start of its file."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself.

    Args:
        spans: for each key, where its whole entry lies in the file (start, end), so that it can be copied unread.
    """

    path: Path
    version: int
    metadata: Mapping[str, Value]
    spans: Mapping[str, tuple[int, int]]
    tensors: tuple[Tensor, ...]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check one GGUF file's header.

    Raises:
        ModelError: missing, unreadable, not a GGUF, damaged, or shorter than its tensors need.
    """
    try:
        # Opening a pipe would wait for ever.
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is a directory or a device, not a file", remedy="name the .gguf file itself")
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            return _Parser(path, file, file_bytes).header()
    except FileNotFoundError as error:
        raise ModelError(
            f"there is no file {path}", remedy="check the path; `mesh models list` shows the models on this machine"
        ) from error
    except PermissionError as error:
        raise ModelError(f"{path} may not be read by this user", remedy=f"allow it:  chmod u+r {path}") from error
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror or error}", remedy="check the disk, or copy the file elsewhere"
        ) from error


class _Parser:
    """Walks a growing prefix of the file; every length is checked against what the file has left."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path = path
        self.file = file
        self.file_bytes = file_bytes
        self.buffer = bytearray()
        self.at = 0

    def header(self) -> Header:
        version, n_tensors, n_keys = self._preamble()
        metadata: dict[str, Value] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(n_keys):
            start = self.at
            key = self.string()
            if key in metadata:
                raise self.damaged(f"the key {key!r} appears twice")
            metadata[key] = self.value(self.u32())
            spans[key] = (start, self.at)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise self.damaged(f"its alignment is {alignment!r}, not a power of two")
        infos = [self.tensor_info() for _ in range(n_tensors)]
        tensors = self._place(infos, alignment)
        return Header(self.path, version, metadata, spans, tensors, self.file_bytes)

    def _preamble(self) -> tuple[int, int, int]:
        if self.file_bytes == 0:
            raise ModelError(f"{self.path} is empty", remedy=DAMAGED)
        magic = self.file.read(4)
        self.file.seek(0)
        if magic != MAGIC[: len(magic)]:
            kind = _guess(magic)
            raise ModelError(
                f"{self.path} is not a GGUF file{kind}", remedy="mesh needs a model in GGUF form, ending in .gguf"
            )
        self.need(24)
        version = _U32.unpack_from(self.buffer, 4)[0]
        if version & 0xFFFF == 0:
            raise ModelError(
                f"{self.path} is a big-endian GGUF", remedy="download the ordinary (little-endian) file of this model"
            )
        if version not in VERSIONS:
            raise ModelError(
                f"{self.path} is GGUF version {version}; this mesh reads {' and '.join(map(str, VERSIONS))}",
                remedy="update mesh, or convert the model again with a current tool",
            )
        self.at = 8
        return version, self.u64(), self.u64()

    def need(self, n: int) -> None:
        """Have ``n`` more bytes in the buffer."""
        end = self.at + n
        if end <= len(self.buffer):
            return
        if end > self.file_bytes:
            raise ModelError(
                f"{self.path} is truncated: its header alone needs {end:,} bytes or more, and the file has "
                f"{self.file_bytes:,}",
                remedy=DAMAGED,
            )
        if end > MAX_HEADER:
            raise self.damaged(f"its header would pass {MAX_HEADER:,} bytes")
        while len(self.buffer) < end:
            # Doubling keeps the number of reads small; reading exactly `n` would be one system call per token.
            chunk = self.file.read(max(CHUNK, end - len(self.buffer), len(self.buffer)))
            if not chunk:
                raise ModelError(f"{self.path} became shorter while it was read", remedy="wait until the copy is done")
            self.buffer += chunk

    def u32(self) -> int:
        self.need(4)
        value: int = _U32.unpack_from(self.buffer, self.at)[0]
        self.at += 4
        return value

    def u64(self) -> int:
        self.need(8)
        value: int = _U64.unpack_from(self.buffer, self.at)[0]
        self.at += 8
        return value

    def string(self) -> str:
        length = self.u64()
        if length > MAX_STRING:
            raise self.damaged(f"it holds a text of {length:,} bytes at offset {self.at - 8:,}")
        self.need(length)
        text = bytes(self.buffer[self.at : self.at + length])
        self.at += length
        return text.decode("utf-8", "replace")

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(kind)
        item, count = self.u32(), self.u64()
        if item == STRING:
            self.skip_strings(count)
            return Counted(count)
        if item not in _SCALARS:
            raise self.damaged(f"it holds a list of unknown kind {item} at offset {self.at:,}")
        form = _SCALARS[item]
        size = struct.calcsize(form) * count
        self.need(size)
        start, self.at = self.at, self.at + size
        if count > MAX_KEPT_ARRAY:
            return Counted(count)
        return struct.unpack_from(f"<{count}{form[1]}", self.buffer, start)

    def scalar(self, kind: int) -> int | float | bool:
        form = _SCALARS.get(kind)
        if form is None:
            raise self.damaged(f"it holds a value of unknown kind {kind} at offset {self.at:,}")
        self.need(struct.calcsize(form))
        value: int | float | bool = struct.unpack_from(form, self.buffer, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def skip_strings(self, count: int) -> None:
        # Every text takes 8 bytes at least: a hostile count ends here, not in a long loop.
        if count * 8 > self.file_bytes - self.at:
            self.need(count * 8)
        unpack, at = _U64.unpack_from, self.at
        for _ in range(count):
            if at + 8 > len(self.buffer):
                self.at = at
                self.need(8)
            length = unpack(self.buffer, at)[0]
            if length > MAX_STRING:
                raise self.damaged(f"it holds a text of {length:,} bytes at offset {at:,}")
            at += 8 + length
        self.at = at
        self.need(0)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        n_dims = self.u32()
        if not 1 <= n_dims <= 4:
            raise self.damaged(f"the tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.u64() for _ in range(n_dims))
        return name, shape, self.u32(), self.u64()

    def _place(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> tuple[Tensor, ...]:
        """Turn relative offsets into checked absolute ones: every tensor after the other, all inside the file."""
        base = -(-self.at // alignment) * alignment
        expected = 0
        tensors: list[Tensor] = []
        seen: set[str] = set()
        for name, shape, kind, offset in infos:
            n_bytes = self._tensor_bytes(name, shape, kind)
            if name in seen:
                raise self.damaged(f"the tensor {name!r} appears twice")
            seen.add(name)
            if offset != expected:
                raise self.damaged(f"the tensor {name!r} is said to be at {offset:,} and can only be at {expected:,}")
            tensors.append(Tensor(name, kind, shape, base + offset, n_bytes))
            expected = -(-(offset + n_bytes) // alignment) * alignment
        if tensors and tensors[-1].offset + tensors[-1].n_bytes > self.file_bytes:
            whole = tensors[-1].offset + tensors[-1].n_bytes
            raise ModelError(
                f"{self.path} is truncated: its tensors need {whole:,} bytes and the file has {self.file_bytes:,} "
                f"({whole - self.file_bytes:,} missing)",
                remedy=DAMAGED,
            )
        return tuple(tensors)

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ModelError(
                f"{self.path}: the tensor {name!r} has type {kind}, which this mesh does not know",
                remedy="update mesh, or take another quantisation of this model",
            ) from None
        count = 1
        for n in shape:
            count *= n
        if not 0 < count < 1 << 48 or shape[0] % block:
            raise self.damaged(f"the tensor {name!r} has the impossible shape {list(shape)}")
        return count // block * block_bytes

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is damaged: {what}", remedy=DAMAGED)


def _guess(magic: bytes) -> str:
    known = {
        b"PK\x03\x04": "; it looks like a PyTorch or zip archive",
        b"lmgg": "; it is in the older GGML format",
        b"tjgg": "; it is in the older GGJT format",
        b"<!DO": "; it is a web page, perhaps a failed download",
        b"<htm": "; it is a web page, perhaps a failed download",
        b"vers": "; it is a Git LFS pointer, not the file itself",
    }
    return known.get(magic, "")
