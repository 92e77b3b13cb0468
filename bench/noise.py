"""A model of random weights: its activations do not compress, as real ones do not.

The demo model's are +1 and -1, which flatters every figure about bytes. What this one says means nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from mesh.models import write
from mesh.models.demo import PRESETS
from mesh.models.header import Counted, read_header

HEAD = 64


def write_noise(path: Path, vocab: Path, preset: str) -> None:
    """Write a Q8_0 llama with the shape of a preset of the demo model and the words of ``vocab``."""
    shape = PRESETS[preset]
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
    tensors = [_random("token_embd.weight", width, n_vocab)]
    for layer in range(shape.n_layers):
        tensors += [_ones(f"blk.{layer}.{name}_norm.weight", width) for name in ("attn", "ffn")]
        tensors += [_random(f"blk.{layer}.{name}.weight", *size) for name, size in matrices.items()]
    tensors += [_ones("output_norm.weight", width), _random("output.weight", width, n_vocab)]
    write.write_gguf(path, entries, tensors, lambda done, total: None)


def _random(name: str, n_in: int, n_out: int) -> write.NewTensor:
    """Blocks of 32 random bytes and one scale, so that a row has a length of about one."""
    n_blocks = n_in * n_out // 32
    scale = np.frombuffer(struct.pack("<e", 1 / (74 * n_in**0.5)), np.uint8)

    def data() -> Iterator[bytes]:
        random = np.random.default_rng(list(name.encode()))
        for start in range(0, n_blocks, 1 << 16):
            blocks = random.integers(0, 256, (min(1 << 16, n_blocks - start), 34), np.uint8)
            blocks[:, :2] = scale
            yield blocks.tobytes()

    return write.NewTensor(name, 8, (n_in, n_out), n_blocks * 34, data)


def _ones(name: str, n: int) -> write.NewTensor:
    return write.NewTensor(name, 0, (n,), 4 * n, partial(lambda count: [struct.pack("<f", 1.0) * count], n))
