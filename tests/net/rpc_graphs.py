"""Small graphs of the operations that models are made of, each valid as it is: what a fuzz begins with."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.net.rpc_frames import F16, F32, I32, I64, OP, Q8_0, Arena, Graph


def _float(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _binary(op: str, kind: int = F32, ne: tuple[int, ...] = (8, 4)) -> Callable[[Arena, Arena], None]:
    def build(arena: Arena, _: Arena) -> None:
        a, b = arena.place(kind, (8, 4)), arena.place(F32, ne)
        arena.place(kind, (8, 4), op=OP[op], src=(a, b))

    return build


def _unary(op: str, *params: int, kind: int = F32) -> Callable[[Arena, Arena], None]:
    def build(arena: Arena, _: Arena) -> None:
        a = arena.place(kind, (8, 4, 2))
        arena.place(kind, (8, 4, 2), op=OP[op], src=(a,), params=params)

    return build


def _multiply(kind: int) -> Callable[[Arena, Arena], None]:
    def build(arena: Arena, _: Arena) -> None:
        a, b = arena.place(kind, (64, 6)), arena.place(F32, (64, 3, 2))
        arena.place(F32, (6, 3, 2), op=OP["MUL_MAT"], src=(a, b))

    return build


def _experts(arena: Arena, zeros: Arena) -> None:
    a, b = arena.place(F16, (32, 6, 4)), arena.place(F32, (32, 1, 3))
    ids = _index(arena, zeros, I32, (2, 3))
    arena.place(F32, (6, 2, 3), op=OP["MUL_MAT_ID"], src=(a, b, ids))


def _index(arena: Arena, zeros: Arena, kind: int, ne: tuple[int, ...]) -> int:
    """A tensor of the other arena's memory, in the same graph."""
    zeros.place(kind, ne)
    arena.tensors.append(zeros.tensors[-1])
    return len(arena.tensors)


def _get_rows(arena: Arena, zeros: Arena) -> None:
    a = arena.place(Q8_0, (32, 5))
    arena.place(F32, (32, 3), op=OP["GET_ROWS"], src=(a, _index(arena, zeros, I32, (3,))))


def _set_rows(arena: Arena, zeros: Arena) -> None:
    to = arena.place(F16, (16, 8))
    a, rows = arena.place(F32, (16, 3)), _index(arena, zeros, I64, (3,))
    arena.place(F16, (16, 8), op=OP["SET_ROWS"], src=(a, rows, to), view=to)


def _norm_and_weight(arena: Arena, _: Arena) -> None:
    a, weight = arena.place(F32, (8, 3)), arena.place(F32, (8,))
    norm = arena.place(F32, (8, 3), op=OP["RMS_NORM"], src=(a,), params=(_float(1e-5),))
    arena.place(F32, (8, 3), op=OP["MUL"], src=(norm, weight))


def _soft_max(arena: Arena, _: Arena) -> None:
    a, mask, sinks = arena.place(F32, (16, 4, 2)), arena.place(F16, (16, 4)), arena.place(F32, (2,))
    arena.place(F32, (16, 4, 2), op=OP["SOFT_MAX"], src=(a, mask, sinks), params=(_float(1.0), 0))


def _rope(mode: int, positions: int, sections: tuple[int, ...] = ()) -> Callable[[Arena, Arena], None]:
    def build(arena: Arena, zeros: Arena) -> None:
        a, places = arena.place(F32, (16, 2, 3)), _index(arena, zeros, I32, (positions,))
        factors = arena.place(F32, (8,))
        scales = (_float(10000.0), _float(1.0), 0, _float(1.0), _float(32.0), _float(1.0))
        params = (0, 8 if mode == 24 else 16, mode, 0, 512, *scales, *(sections or (0, 0, 0, 0)))
        arena.place(F32, (16, 2, 3), op=OP["ROPE"], src=(a, places, factors), params=params)

    return build


def _attention(kind: int) -> Callable[[Arena, Arena], None]:
    def build(arena: Arena, _: Arena) -> None:
        q, k, v = arena.place(F32, (32, 3, 4)), arena.place(kind, (32, 16, 2)), arena.place(kind, (32, 16, 2))
        mask = arena.place(F16, (16, 3))
        params = (_float(0.2), 0, 0, 10)
        arena.place(F32, (32, 4, 3), op=OP["FLASH_ATTN_EXT"], src=(q, k, v, mask), params=params)

    return build


def _gated(arena: Arena, _: Arena) -> None:
    a, b = arena.place(F32, (8, 4)), arena.place(F32, (8, 4))
    arena.place(F32, (8, 4), op=OP["GLU"], src=(a, b), params=(2, 0))


def _gated_halves(arena: Arena, _: Arena) -> None:
    a = arena.place(F32, (16, 4))
    arena.place(F32, (8, 4), op=OP["GLU"], src=(a,), params=(2, 0))


def _concat(arena: Arena, _: Arena) -> None:
    a, b = arena.place(F32, (8, 4)), arena.place(F32, (8, 2))
    arena.place(F32, (8, 6), op=OP["CONCAT"], src=(a, b), params=(1,))


def _convert(source: int, target: int) -> Callable[[Arena, Arena], None]:
    def build(arena: Arena, _: Arena) -> None:
        a, to = arena.place(source, (32, 4)), arena.place(target, (32, 4))
        there = arena.tensors[to - 1].data
        arena.place(target, (32, 4), op=OP["CPY"], src=(a, to), view=to, data=there)

    return build


def _transposed(arena: Arena, _: Arena) -> None:
    a = arena.place(F32, (8, 4))
    arena.place(F32, (4, 8), op=OP["TRANSPOSE"], src=(a,), nb=(32, 4, 128, 128), view=a, data=arena.tensors[a - 1].data)
    arena.place(F32, (4, 8), op=OP["CONT"], src=(2,))


def _sorted(arena: Arena, _: Arena) -> None:
    a = arena.place(F32, (8, 4))
    arena.place(I32, (8, 4), op=OP["ARGSORT"], src=(a,), params=(1,))
    arena.place(I32, (3, 4), op=OP["TOP_K"], src=(a,))


def _summed(arena: Arena, _: Arena) -> None:
    a = arena.place(F32, (8, 4))
    rows = arena.place(F32, (1, 4), op=OP["SUM_ROWS"], src=(a,))
    arena.place(F32, (1,), op=OP["SUM"], src=(rows,))
    arena.place(I32, (4,), op=OP["ARGMAX"], src=(a,))


def _repeated(arena: Arena, _: Arena) -> None:
    a = arena.place(F32, (4, 2))
    arena.place(F32, (8, 6), op=OP["REPEAT"], src=(a,))


def _add_id(arena: Arena, zeros: Arena) -> None:
    a, b = arena.place(F32, (8, 2, 3)), arena.place(F32, (8, 4))
    arena.place(F32, (8, 2, 3), op=OP["ADD_ID"], src=(a, b, _index(arena, zeros, I32, (2, 3))))


def _set(arena: Arena, _: Arena) -> None:
    a, part = arena.place(F32, (8, 4)), arena.place(F32, (4, 2))
    arena.place(F32, (8, 4), op=OP["SET"], src=(a, part), params=(32, 128, 128, 48, 0))


def _padded(arena: Arena, _: Arena) -> None:
    a = arena.place(F32, (8, 4))
    arena.place(F32, (11, 5), op=OP["PAD"], src=(a,), params=(1, 2, 0, 1))


def _convolution(arena: Arena, _: Arena) -> None:
    a, kernel = arena.place(F32, (6, 8, 2)), arena.place(F32, (4, 8))
    arena.place(F32, (8, 3, 2), op=OP["SSM_CONV"], src=(a, kernel))


def _scan(arena: Arena, zeros: Arena) -> None:
    state, x, dt = arena.place(F32, (16, 4, 2, 3)), arena.place(F32, (4, 2, 3, 2)), arena.place(F32, (2, 3, 2))
    a, b, c = arena.place(F32, (1, 2)), arena.place(F32, (16, 1, 3, 2)), arena.place(F32, (16, 1, 3, 2))
    ids = _index(arena, zeros, I32, (2,))
    arena.place(F32, (48 + 16 * 4 * 2 * 2,), op=OP["SSM_SCAN"], src=(state, x, dt, a, b, c, ids), params=(1,))


def _delta(arena: Arena, _: Arena) -> None:
    q, k, v = (arena.place(F32, (16, 2, 3)) for _ in range(3))
    gate, beta, state = arena.place(F32, (1, 2, 3)), arena.place(F32, (1, 2, 3)), arena.place(F32, (16, 16, 2))
    src = (q, k, v, gate, beta, state)
    arena.place(F32, (32, 3 + 16), op=OP["GATED_DELTA_NET"], src=src, params=(1,))


def _rwkv(arena: Arena, _: Arena) -> None:
    src = tuple(arena.place(F32, (16, 2, 3)) for _ in range(6))
    arena.place(F32, (32, 3 + 16), op=OP["RWKV_WKV7"], src=(*src, arena.place(F32, (16 * 16 * 2, 1))))


def _nothing(arena: Arena, _: Arena) -> None:
    """What a batch without outputs ends in."""
    a, b = arena.place(F16, (32, 6)), arena.place(F32, (32, 0))
    arena.place(F32, (6, 0), op=OP["MUL_MAT"], src=(a, b))


_SHAPES: dict[str, Callable[[Arena, Arena], None]] = {
    "add": _binary("ADD"),
    "add to halves": _binary("ADD", F16, (8,)),
    "multiply": _binary("MUL", ne=(8, 1)),
    "divide": _binary("DIV", ne=(1,)),
    "silu": _unary("UNARY", 10),
    "gelu of halves": _unary("UNARY", 8, kind=F16),
    "square": _unary("SQR"),
    "scale": _unary("SCALE", _float(2.0)),
    "clamp": _unary("CLAMP", _float(-1.0), _float(1.0)),
    "norm": _unary("NORM", _float(1e-5)),
    "l2 norm": _unary("L2_NORM", _float(1e-5)),
    "group norm": _unary("GROUP_NORM", 2, _float(1e-5)),
    "norm and weight": _norm_and_weight,
    "matrix": _multiply(F32),
    "matrix of halves": _multiply(F16),
    "quantized matrix": _multiply(Q8_0),
    "experts": _experts,
    "rows": _get_rows,
    "set rows": _set_rows,
    "softmax": _soft_max,
    "rope": _rope(0, 3),
    "rope, neox": _rope(2, 3),
    "rope of sections": _rope(8, 12, (4, 2, 2, 0)),
    "rope of pictures": _rope(24, 12, (4, 4, 0, 0)),
    "attention": _attention(F16),
    "quantized attention": _attention(Q8_0),
    "gated": _gated,
    "gated halves": _gated_halves,
    "concat": _concat,
    "to halves": _convert(F32, F16),
    "to quantized": _convert(F32, Q8_0),
    "from quantized": _convert(Q8_0, F32),
    "copy": _convert(F32, F32),
    "transposed": _transposed,
    "sorted": _sorted,
    "summed": _summed,
    "repeated": _repeated,
    "add of experts": _add_id,
    "nothing": _nothing,
    "running sum": _unary("CUMSUM"),
    "set": _set,
    "padded": _padded,
    "convolution": _convolution,
    "scan": _scan,
    "delta net": _delta,
    "rwkv": _rwkv,
}
GRAPHS = tuple(_SHAPES)


def build(name: str, arena: Arena, zeros: Arena) -> Graph:
    """The graph ``name`` in two empty arenas; ``zeros`` holds what rows are chosen by."""
    _SHAPES[name](arena, zeros)
    return arena.graph()
