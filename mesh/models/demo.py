"""A small model that anyone can write in a second, the same bytes everywhere, and whose text tests can rely on.

A model with random weights is a bad witness: its best two tokens are so close that a different batch size or a GPU
flips them, and left to itself it soon repeats one word. This one computes with bits instead. The residual stream holds
+1 and -1 only: a constant part, a state part A, and a scratch part B that is empty between layers. In every layer

- each attention head looks at exactly one earlier token (1, 2, 3 or 5 back), and copies bits of its A into B;
- the feed-forward network replaces half of A by ``a * b * a'`` (an own bit, a bit of B, a bit of the other half) and
  empties B. Parity as a sum of ramps has flat places where the bits are, so each layer wipes out rounding errors.

The next word is spelled by a few bits of the last A. So greedy text is lively, the margin between the best two tokens
is wide, and text is the same in any precision, batch size and division over machines; but leave out, swap or mistake
one layer, or lose the context, and every word is another. It never ends by itself: ask for a number of tokens. All
weights are small integers times a power of two, made from a raw PCG64 stream, the part of numpy's generators that never
changes.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mesh.errors import ModelError
from mesh.models import write
from mesh.models.gguf import ModelFile, inspect
from mesh.models.header import Counted, Header, read_header

DEMO_VERSION = 1
"""Grows when the demo model's bytes change: nodes that write it themselves must agree."""
DEMO_SHA256 = "3fcfdd5c434ef99771c51b55ab28026f47f3475cb9a28d2d3e311f44869197b5"
"""Fingerprint of ``write_demo(path, vocab)`` with the engine's ``ggml-vocab-llama-spm.gguf``."""
DEMO_NAME = "mesh-demo"
DEMO_PROMPT = "Hello"
DEMO_TEXT = " many prz union cell files fragment trib vier"
"""What greedily follows :data:`DEMO_PROMPT`, in any precision and division: a ring that says it computes rightly."""

HEAD = 64
OFFSETS = (1, 2, 3, 5)
"""How many tokens back the heads look, in turn. Chosen so that near the start, too, one key wins clearly."""
ROPE_BASE = 100.0
"""Lower than usual: neighbouring positions differ more, so that a head can tell them apart."""
RAMP = 32
"""Steepness of the ramps: ``silu(16)`` is 16 and ``silu(-16)`` is 0 for all practical purposes."""
ON = 16
"""Gate of a unit that is always open."""
MAX_WORDS = 4096
SEED = 20250
_WORD = re.compile("[▁Ġ][a-z]{2,}")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

Ints = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Preset:
    n_layers: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_ctx: int


PRESETS = {
    "tiny": Preset(4, 64, 256, 1, 1, 1024),
    "demo": Preset(12, 256, 1024, 4, 2, 8192),
    "mid": Preset(16, 1024, 2816, 16, 8, 8192),
}
"""``tiny`` for tests, ``demo`` 30 MB for people, ``mid`` 270 MB for benches."""


def write_demo(
    path: Path,
    vocab: Path,
    *,
    preset: str = "demo",
    seed: int = SEED,
    chat_template: str = CHAT_TEMPLATE,
    progress: write.Progress = lambda done, total: None,
) -> ModelFile:
    """Write a demo model, whole or not at all.

    Args:
        vocab: a GGUF whose tokenizer is taken over (:meth:`Engine.vocab`).
        preset: a key of :data:`PRESETS`.
        seed: another seed gives a model of the same shape that says other words.
        chat_template: Jinja; with another one it is not the demo model that every member can write for itself.

    Raises:
        ModelError: ``vocab`` is not usable, or ``path`` cannot be written.
    """
    shape = PRESETS[preset]
    header = read_header(vocab)
    words = _words(header)
    n_vocab = len(words)
    weights = _Weights(shape, seed)
    entries = [
        write.text("general.architecture", "llama"),
        write.text("general.name", DEMO_NAME if preset == "demo" else f"{DEMO_NAME}-{preset}"),
        write.u32("general.file_type", 7),
        write.u32("llama.block_count", shape.n_layers),
        write.u32("llama.context_length", shape.n_ctx),
        write.u32("llama.embedding_length", shape.n_embd),
        write.u32("llama.feed_forward_length", shape.n_ff),
        write.u32("llama.attention.head_count", shape.n_head),
        write.u32("llama.attention.head_count_kv", shape.n_head_kv),
        write.f32("llama.attention.layer_norm_rms_epsilon", 2.0**-20),
        write.f32("llama.rope.freq_base", ROPE_BASE),
        write.u32("llama.rope.dimension_count", HEAD),
        write.u32("llama.vocab_size", n_vocab),
        *write.copied(header, lambda key: key.startswith("tokenizer.") and key != "tokenizer.chat_template"),
        write.text("tokenizer.chat_template", chat_template),
    ]
    if preset == "demo" and seed == SEED and chat_template == CHAT_TEMPLATE:
        entries.append(write.u32("mesh.demo.version", DEMO_VERSION))
    tensors = [
        _q8("token_embd.weight", shape.n_embd, n_vocab, 0, partial(weights.embedding, n_vocab)),
        *(tensor for layer in range(shape.n_layers) for tensor in weights.layer(layer)),
        _f32("output_norm.weight", shape.n_embd, weights.sparse_rms),
        _q8("output.weight", shape.n_embd, n_vocab, -2, partial(weights.output, words)),
    ]
    write.write_gguf(path, entries, tensors, progress)
    return inspect(path)


class _Weights:
    """The weights as integers; a tensor's value is its integer times a power of two."""

    sparse_rms = 0.75
    """Root mean square of the residual stream while B is empty: sqrt(1/16 + 1/2). With B it is 1."""

    def __init__(self, shape: Preset, seed: int) -> None:
        self.shape = shape
        self.seed = seed
        self.n_constant = shape.n_embd // 16
        self.n_state = shape.n_embd // 2
        self.state = np.arange(self.n_constant, self.n_constant + self.n_state)
        self.scratch = np.arange(self.n_constant + self.n_state, shape.n_embd)

    def stream(self, name: str) -> np.random.PCG64:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.PCG64(int.from_bytes(digest[:16], "little"))

    def embedding(self, n_vocab: int) -> Ints:
        """Ones, then random bits, then an empty B."""
        rows = np.zeros((n_vocab, self.shape.n_embd), np.int8)
        rows[:, : self.n_constant] = 1
        n = n_vocab * self.n_state
        raw = self.stream("embedding").random_raw(-(-n // 64)).astype("<u8").view(np.uint8)
        bits = np.unpackbits(raw, bitorder="little")[:n].reshape(n_vocab, self.n_state)
        rows[:, self.state] = bits.astype(np.int8) * 2 - 1
        return rows

    def output(self, words: list[bool]) -> Ints:
        """Each word has a number, spelled in +1 and -1 over a few state bits; all other tokens are out of reach."""
        ids = np.flatnonzero(words)
        n_bits = min(len(ids), MAX_WORDS).bit_length() - 1
        ids = ids[: 1 << n_bits]
        # From both halves of the state: the last two layers wrote one each.
        half = self.n_state // 2
        places = np.array([self.state[(bit % 2) * half + bit // 2] for bit in range(n_bits)])
        rows = np.zeros((len(words), self.shape.n_embd), np.int8)
        rows[:, 0] = -80
        rows[ids, 0] = 0
        numbers = self.choose(f"words/{n_bits}", len(ids), len(ids))
        rows[ids[:, None], places[None, :]] = ((numbers[:, None] >> np.arange(n_bits)) & 1) * 12 - 6
        return rows

    def layer(self, index: int) -> list[write.NewTensor]:
        s, block = self.shape, f"blk.{index}."
        kv = s.n_head_kv * HEAD
        return [
            _f32(f"{block}attn_norm.weight", s.n_embd, self.sparse_rms),
            _q8(f"{block}attn_q.weight", s.n_embd, s.n_head * HEAD, -3, self.query),
            _q8(f"{block}attn_k.weight", s.n_embd, kv, -3, self.key),
            _q8(f"{block}attn_v.weight", s.n_embd, kv, 0, partial(self.value, index)),
            _q8(f"{block}attn_output.weight", s.n_head * HEAD, s.n_embd, 0, partial(self.attention_output, index)),
            _f32(f"{block}ffn_norm.weight", s.n_embd, 1.0),
            _q8(f"{block}ffn_gate.weight", s.n_embd, s.n_ff, 0, lambda: self.feed_forward(index)[0]),
            _q8(f"{block}ffn_up.weight", s.n_embd, s.n_ff, 0, lambda: self.feed_forward(index)[1]),
            _q8(f"{block}ffn_down.weight", s.n_ff, s.n_embd, -4, lambda: self.feed_forward(index)[2]),
        ]

    def query(self) -> Ints:
        """Constant vectors that rotary embedding (pairs 2i, 2i+1) turns towards the key ``offset`` tokens back."""
        rows = np.zeros((self.shape.n_head * HEAD, self.shape.n_embd), np.int8)
        for head in range(self.shape.n_head):
            for pair in range(HEAD // 2):
                angle = OFFSETS[head % len(OFFSETS)] * ROPE_BASE ** (-2 * pair / HEAD)
                rows[head * HEAD + 2 * pair, 0] = round(120 * math.cos(angle))
                rows[head * HEAD + 2 * pair + 1, 0] = -round(120 * math.sin(angle))
        return rows

    def key(self) -> Ints:
        rows = np.zeros((self.shape.n_head_kv * HEAD, self.shape.n_embd), np.int8)
        rows[::2, 0] = 64
        return rows

    def value(self, layer: int) -> Ints:
        n = self.shape.n_head_kv * HEAD
        rows = np.zeros((n, self.shape.n_embd), np.int8)
        rows[np.arange(n), self.state[self.choose(f"value/{layer}", self.n_state, n)]] = 1
        return rows

    def attention_output(self, layer: int) -> Ints:
        """One bit of one head for each place of B."""
        n = self.shape.n_head * HEAD
        rows = np.zeros((self.shape.n_embd, n), np.int8)
        rows[self.scratch, self.choose(f"attention/{layer}", n, len(self.scratch))] = 1
        return rows

    def feed_forward(self, layer: int) -> tuple[Ints, Ints, Ints]:
        """Gate, up and down of ``a <- a * b * a'`` over half of A, and ``B <- 0``."""
        half = self.n_state // 2
        order = self.state if layer % 2 == 0 else np.roll(self.state, half)
        target = order[:half]
        other = order[half:][self.choose(f"other/{layer}", half, half)]
        scratch = self.scratch[self.choose(f"scratch/{layer}", len(self.scratch), half)]
        gate = np.zeros((self.shape.n_ff, self.shape.n_embd), np.int8)
        up = np.zeros_like(gate)
        down = np.zeros((self.shape.n_embd, self.shape.n_ff), np.int8)
        at = 0
        # The product of three signs from their sum s: 1 - 2 step(s at 0) + 2 step(s at 2) - 2 step(-s at 2); a step is
        # the difference of two ramps. Mirrored on the left so that no ramp rises higher than it must.
        for sign, threshold, weight in (
            (1, -0.5, -1), (1, 0.5, 1), (1, 1.5, 1), (1, 2.5, -1), (-1, 1.5, -1), (-1, 2.5, 1),
        ):  # fmt: skip
            units = np.arange(at, at + half)
            for source in (target, other, scratch):
                gate[units, source] = sign * RAMP
            gate[units, 0] = -int(threshold * RAMP)
            up[units, 0] = 1
            # In sixteenths: twice a ramp of slope RAMP is 2 / 32.
            down[target, units] = weight
            at += half
        for place in (*target, *self.scratch):
            gate[at, 0], up[at, place], down[place, at] = ON, 1, -1
            at += 1
        gate[at, 0], up[at, 0] = ON, 1
        down[target, at] = 1
        assert at < self.shape.n_ff
        return gate, up, down

    def choose(self, name: str, n: int, k: int) -> npt.NDArray[np.int64]:
        """``k`` of ``n`` without repeating any sooner than it must, in an order of its own."""
        stream = self.stream(name)
        rounds = [np.argsort(stream.random_raw(n), kind="stable") for _ in range(-(-k // n))]
        return np.concatenate(rounds)[:k].astype(np.int64)


def _q8(name: str, n_in: int, n_out: int, exponent: int, rows: Callable[[], Ints]) -> write.NewTensor:
    """A Q8_0 tensor: blocks of 32 integers with one f16 scale, here ``2 ** exponent``."""

    def data() -> Iterator[bytes]:
        values = rows().reshape(-1, 32)
        blocks = np.empty((len(values), 34), np.uint8)
        blocks[:, :2] = np.frombuffer(struct.pack("<e", 2.0**exponent), np.uint8)
        blocks[:, 2:] = values.view(np.uint8)
        flat = blocks.reshape(-1)
        for start in range(0, flat.size, write.COPY):
            yield flat[start : start + write.COPY].tobytes()

    return write.NewTensor(name, 8, (n_in, n_out), n_in * n_out // 32 * 34, data)


def _f32(name: str, n: int, value: float) -> write.NewTensor:
    return write.NewTensor(name, 0, (n,), 4 * n, lambda: [struct.pack("<f", value) * n])


def _words(vocab: Header) -> list[bool]:
    """For each token, whether the demo model may say it: a space, then two or more plain small letters."""
    words = [_WORD.fullmatch(token) is not None for token in _tokens(vocab)]
    if sum(words) < 2:
        raise ModelError(
            f"{vocab.path} has no words to speak with", remedy="use the engine's ggml-vocab-llama-spm.gguf"
        )
    return words


def _tokens(vocab: Header) -> list[str]:
    key = "tokenizer.ggml.tokens"
    if not isinstance(vocab.metadata.get(key), Counted):
        raise ModelError(f"{vocab.path} holds no vocabulary", remedy="use the engine's ggml-vocab-llama-spm.gguf")
    (entry,) = write.copied(vocab, lambda name: name == key)
    at = 8 + len(key) + 4 + 4
    (count,) = struct.unpack_from("<Q", entry, at)
    at += 8
    tokens = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", entry, at)
        tokens.append(entry[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return tokens
