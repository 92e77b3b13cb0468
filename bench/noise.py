"""Models of random weights: their activations do not compress, as real ones do not.

The demo model's are +1 and -1, which flatters every figure about bytes. What these say means nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mesh.models import write
from mesh.models.demo import PRESETS, Preset
from mesh.models.header import Counted, read_header

HEAD = 64
SHAPES = {**PRESETS, "large": Preset(22, 2048, 5632, 32, 4, 4096)}
"""Those of the demo model, and one of 1.1 billion weights (1.2 GB): what a small machine just about carries."""
_AT_ONCE = 1 << 16
"""Blocks."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a tensor's values are stored: the format's number of it, values and bytes per block."""

    name: str
    number: int
    n_values: int
    n_bytes: int


F16 = Kind("F16", 1, 1, 2)
Q8_0 = Kind("Q8_0", 8, 32, 34)
Q4_K = Kind("Q4_K", 12, 256, 144)


def write_noise(path: Path, vocab: Path, preset: str) -> None:
    """Write a Q8_0 llama with one of :data:`SHAPES` and the words of ``vocab``."""
    shape = SHAPES[preset]
    header = read_header(vocab)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Counted)
    n_vocab = tokens.count
    entries = [
        write.text("general.architecture", "llama"),
        write.text("general.name", f"noise-{preset}"),
        write.u32("general.file_type", 7),
        write.u32("llama.block_count", shape.n_layers),
        write.u32("llama.context_length", shape.n_ctx),
        write.u32("llama.embedding_length", shape.n_embd),
        write.u32("llama.feed_forward_length", shape.n_ff),
        write.u32("llama.attention.head_count", shape.n_head),
        write.u32("llama.attention.head_count_kv", shape.n_head_kv),
        write.f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        write.u32("llama.rope.dimension_count", HEAD),
        write.u32("llama.vocab_size", n_vocab),
        *write.copied(header, lambda key: key.startswith("tokenizer.")),
    ]
    width, kv = shape.n_embd, shape.n_head_kv * HEAD
    matrices = {
        "attn_q": (width, shape.n_head * HEAD),
        "attn_k": (width, kv),
        "attn_v": (width, kv),
        "attn_output": (shape.n_head * HEAD, width),
        "ffn_gate": (width, shape.n_ff),
        "ffn_up": (width, shape.n_ff),
        "ffn_down": (shape.n_ff, width),
    }
    tensors = [random_matrix("token_embd.weight", (width, n_vocab))]
    for layer in range(shape.n_layers):
        tensors += [_ones(f"blk.{layer}.{name}_norm.weight", width) for name in ("attn", "ffn")]
        tensors += [random_matrix(f"blk.{layer}.{name}.weight", size) for name, size in matrices.items()]
    tensors += [_ones("output_norm.weight", width), random_matrix("output.weight", (width, n_vocab))]
    write.write_gguf(path, entries, tensors, lambda done, total: None)


def random_matrix(name: str, shape: tuple[int, ...], kind: Kind = Q8_0, gain: float = 1.0) -> write.NewTensor:
    """A matrix, or several, of random blocks; the name is the seed.

    Args:
        shape: inputs first, a multiple of the kind's block.
        gain: the length of a row, about.
    """
    n_blocks = int(np.prod(shape)) // kind.n_values
    fill = {F16: _f16, Q8_0: _q8_0, Q4_K: _q4_k}[kind]
    deviation = gain / shape[0] ** 0.5

    def data() -> Iterator[bytes]:
        random = np.random.default_rng(list(name.encode()))
        for start in range(0, n_blocks, _AT_ONCE):
            yield fill(random, min(_AT_ONCE, n_blocks - start), deviation).tobytes()

    return write.NewTensor(name, kind.number, shape, n_blocks * kind.n_bytes, data)


def _f16(random: np.random.Generator, n: int, deviation: float) -> Bytes:
    values: npt.NDArray[np.float32] = random.standard_normal(n, np.float32) * np.float32(deviation)
    return values.astype("<f2").view(np.uint8)


def _q8_0(random: np.random.Generator, n: int, deviation: float) -> Bytes:
    """Random bytes, whose root mean square is 74, and one scale."""
    blocks = random.integers(0, 256, (n, Q8_0.n_bytes), np.uint8)
    blocks[:, :2] = _half(deviation / 74)
    return blocks


def _q4_k(random: np.random.Generator, n: int, deviation: float) -> Bytes:
    """Random nibbles q; each 32 of a block have a scale s and a minimum m, near s, of six bits: d (s q - 7.5 m)."""
    blocks = random.integers(0, 256, (n, Q4_K.n_bytes), np.uint8)
    blocks[:, 0:2], blocks[:, 2:4] = _half(deviation / 168), _half(7.5 * deviation / 168)
    scales = random.integers(0, 64, (n, 8), np.uint8)
    minima = scales ^ random.integers(0, 4, (n, 8), np.uint8)
    # The last four of each are spread over what the first four leave free of their bytes, and four bytes more.
    blocks[:, 4:8] = scales[:, :4] | scales[:, 4:] >> 4 << 6
    blocks[:, 8:12] = minima[:, :4] | minima[:, 4:] >> 4 << 6
    blocks[:, 12:16] = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    return blocks


def _half(value: float) -> Bytes:
    return np.frombuffer(struct.pack("<e", value), np.uint8)


def _ones(name: str, n: int) -> write.NewTensor:
    return write.NewTensor(name, 0, (n,), 4 * n, partial(lambda count: [struct.pack("<f", 1.0) * count], n))
