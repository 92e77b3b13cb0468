"""Graphs and tensors as the engine writes them on the wire, and a worker's server to send them to."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace

F32, F16, Q8_0, I32, I64 = 0, 1, 8, 26, 27
SIZES = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), I32: (1, 4), I64: (1, 8)}
"""Type -> elements and bytes of a block."""
_OPS = (
    "NONE DUP ADD ADD_ID ADD1 ACC SUB MUL DIV SQR SQRT LOG SIN COS SUM SUM_ROWS CUMSUM MEAN ARGMAX COUNT_EQUAL "
    "REPEAT REPEAT_BACK CONCAT SILU_BACK NORM RMS_NORM RMS_NORM_BACK GROUP_NORM L2_NORM MUL_MAT MUL_MAT_ID OUT_PROD "
    "SCALE SET CPY CONT RESHAPE VIEW PERMUTE TRANSPOSE GET_ROWS GET_ROWS_BACK SET_ROWS DIAG DIAG_MASK_INF "
    "DIAG_MASK_ZERO SOFT_MAX SOFT_MAX_BACK ROPE ROPE_BACK CLAMP"
)
_LATER = {
    "PAD": 64, "ARGSORT": 69, "TOP_K": 70, "FLASH_ATTN_EXT": 74, "SSM_CONV": 76, "SSM_SCAN": 77, "RWKV_WKV7": 84,
    "GATED_DELTA_NET": 86, "UNARY": 91, "MAP_CUSTOM1": 92, "MAP_CUSTOM2": 93, "MAP_CUSTOM3": 94, "CUSTOM": 95,
    "OPT_STEP_SGD": 99, "GLU": 100,
}  # fmt: skip
OP = {name: number for number, name in enumerate(_OPS.split())} | _LATER
"""Numbers of operations: they move with the engine's pin, and its protocol number with them."""
N_OPS = 101
UNCHECKED = {52, 61, 85, 87, 88, 89, 90}
"""Those whose shapes are left to the engine's own assertions: im2col, pooling, triangular solves, two of DeepSeek's."""
NO_BASE = 2**32 - 1
COMPUTE = 16

_TENSOR = struct.Struct("<QIQ4I4II16iI10QQQQ64si")
GRAPH_HEAD = struct.Struct("<IIIIIQ")
"""device, place, base, nodes, tensors, digest"""


@dataclass(frozen=True)
class Tensor:
    """``src`` names tensors of the same graph by their number from 1; 0 is none."""

    kind: int = F32
    ne: tuple[int, ...] = (1, 1, 1, 1)
    buffer: int = 0
    data: int = 0
    op: int = 0
    params: tuple[int, ...] = ()
    src: tuple[int, ...] = ()
    nb: tuple[int, ...] = ()
    view: int = 0
    view_offs: int = 0
    flags: int = COMPUTE
    uses: int = 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes between elements, or those of a tensor without gaps."""
        if self.nb:
            return self.nb
        block, size = SIZES.get(self.kind, (1, 4))
        strides = [size, size * self.ne[0] // block]
        for extent in self.ne[1:3]:
            strides.append(strides[-1] * extent)
        return tuple(strides)

    @property
    def size(self) -> int:
        block, size = SIZES[self.kind]
        return math.prod(self.ne) // block * size

    def packed(self, number: int | None = None) -> bytes:
        """As it is sent alone; as the ``number``-th of a graph, with sources told by how far back they are."""
        src = (*self.src, *[0] * (10 - len(self.src)))
        view = self.view
        if number is not None:
            src = tuple((number - s) % 2**64 if s else 0 for s in src)
            view = (number - view) % 2**64 if view else 0
        params = (*self.params, *[0] * (16 - len(self.params)))
        return _TENSOR.pack(
            1 if number is None else 0, self.kind, self.buffer, *self.ne, *self.strides, self.op, *params, self.flags,
            *src, view, self.view_offs, self.data, b"", self.uses,
        )  # fmt: skip


TENSOR_SIZE = _TENSOR.size
_RUNS = (
    (8, 4, 1), (12, 8, 1), (20, 4, 4), (36, 4, 4), (52, 4, 1), (56, 4, 16), (120, 4, 1), (124, 8, 10), (204, 8, 3),
    (292, 4, 1),
)  # fmt: skip
FIELDS = tuple((start + n * size, size) for start, size, count in _RUNS for n in range(count))
"""Offset and size of what a tensor says, but for its id and its name."""


def digest_of(form: bytes) -> int:
    """What client and server compare to know that they mean the same graph."""
    digest = 0xCBF29CE484222325
    for (word,) in struct.iter_unpack("<Q", form):
        digest = (digest ^ word) * 0x9E3779B97F4A7C15 % 2**64
        digest ^= digest >> 29
    return digest


@dataclass(frozen=True)
class Graph:
    """Tensors, and the numbers (from 1) of those that are computed, in this order."""

    tensors: tuple[Tensor, ...]
    nodes: tuple[int, ...]

    def form(self) -> bytes:
        last, steps = 0, []
        for node in self.nodes:
            steps.append((node - last) % 2**64)
            last = node
        tensors = b"".join(tensor.packed(number) for number, tensor in enumerate(self.tensors, 1))
        return struct.pack(f"<{len(steps)}Q", *steps) + tensors

    def message(self, place: int = 0, form: bytes | None = None) -> bytes:
        """What orders a server to compute it, and to keep it in ``place``; ``form`` takes the place of its own."""
        form = self.form() if form is None else form
        return GRAPH_HEAD.pack(0, place, NO_BASE, len(self.nodes), len(self.tensors), digest_of(form)) + form


@dataclass
class Arena:
    """Hands out tensors in one buffer of a server, one after the other."""

    handle: int
    base: int
    size: int
    tensors: list[Tensor] = field(default_factory=list)
    used: int = 0

    def place(self, kind: int, ne: tuple[int, ...], **more: object) -> int:
        """The number of a new tensor."""
        ne = (*ne, *[1] * (4 - len(ne)))
        tensor = replace(Tensor(kind, ne, self.handle, self.base + self.used), **more)  # type: ignore[arg-type]
        self.used += -(-tensor.size // 64) * 64
        assert self.used <= self.size, "the arena is too small for this graph"
        self.tensors.append(tensor)
        return len(self.tensors)

    def graph(self) -> Graph:
        """Everything that was placed; what has an operation is computed."""
        return Graph(tuple(self.tensors), tuple(n for n, t in enumerate(self.tensors, 1) if t.op))
