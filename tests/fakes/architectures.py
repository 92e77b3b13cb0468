"""Small models of many architectures: random weights from a seed, words of their own, a few megabytes each.

What they say means nothing, and hangs on every weight. It is lively (attention is peaked, what the layers add outweighs
the embedding), so that greedy text does not fall into a loop of one word.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from bench.noise import F16, Q4_K, Q8_0, Kind, random_matrix
from mesh.models import write
from mesh.models.write import NewTensor

LAYERS, WIDTH, FEED, HEADS, HEADS_KV, HEAD, EXPERTS, VOCAB = 6, 256, 512, 4, 2, 64, 8, 1024
CONTEXT = 4096
WINDOW = 48
"""Tokens that a layer with a sliding window sees; shorter than the prompts of the tests."""
KINDS = {kind.name: kind for kind in (F16, Q8_0, Q4_K)}
FIRST_WORD = 131
"""Tokens before this one are marks and bytes."""
_SPECIAL = ("<unk>", "<s>", "</s>")
_F32, _I32, _STRING, _ARRAY = 6, 5, 8, 9

Matrix = tuple[tuple[int, ...], float]
"""Inputs first, and the length of a row."""
Vector = tuple[int | tuple[int, ...], float]
"""How many values, and about which."""
Setting = int | float | tuple[int, ...]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What makes it differ from a llama. Names are those of the format, a layer's without its ``blk.N.``.

    Args:
        matrices: of each layer, instead of a llama's; None takes one away.
        vectors: of each layer, besides a llama's norms; None takes one away.
        ends: whatever is there once, besides the embedding and ``output_norm.weight``.
        settings: its keys without the architecture's name.
        other: matrices of the layers ``other_at``, instead of those of the rest; ``other_vectors`` likewise.
    """

    name: str
    matrices: Mapping[str, Matrix | None] = field(default_factory=dict)
    vectors: Mapping[str, Vector | None] = field(default_factory=dict)
    ends: Mapping[str, Vector] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    tied: bool = False
    embedding: float = WIDTH**0.5
    other: Mapping[str, Matrix | None] = field(default_factory=dict)
    other_vectors: Mapping[str, Vector | None] = field(default_factory=dict)
    other_at: tuple[int, ...] = ()


_KV = HEADS_KV * HEAD
_LLAMA: dict[str, Matrix] = {
    # Scores of about three: attention looks at few tokens, not at the mean of all.
    "attn_q.weight": ((WIDTH, HEADS * HEAD), 1.7),
    "attn_k.weight": ((WIDTH, _KV), 1.7),
    "attn_v.weight": ((WIDTH, _KV), 1.5),
    "attn_output.weight": ((HEADS * HEAD, WIDTH), 1.5),
    "ffn_gate.weight": ((WIDTH, FEED), 1.5),
    "ffn_up.weight": ((WIDTH, FEED), 1.5),
    "ffn_down.weight": ((FEED, WIDTH), 1.5),
}
_NO_FEED: dict[str, Matrix | None] = {"ffn_gate.weight": None, "ffn_up.weight": None, "ffn_down.weight": None}
_EXPERTS: dict[str, Matrix | None] = _NO_FEED | {
    "ffn_gate_inp.weight": ((WIDTH, EXPERTS), 3.0),
    "ffn_gate_exps.weight": ((WIDTH, FEED // 2, EXPERTS), 1.5),
    "ffn_up_exps.weight": ((WIDTH, FEED // 2, EXPERTS), 1.5),
    "ffn_down_exps.weight": ((FEED // 2, WIDTH, EXPERTS), 1.5),
}
_SHARED: dict[str, Matrix | None] = {
    "ffn_gate_shexp.weight": ((WIDTH, FEED), 1.5),
    "ffn_up_shexp.weight": ((WIDTH, FEED), 1.5),
    "ffn_down_shexp.weight": ((FEED, WIDTH), 1.5),
}
_QKV_BIAS = {"attn_q.bias": (HEADS * HEAD, 0.0), "attn_k.bias": (_KV, 0.0), "attn_v.bias": (_KV, 0.0)}
_QK_NORM = {"attn_q_norm.weight": (HEAD, 1.7), "attn_k_norm.weight": (HEAD, 1.7)}
_POST_NORM = {"post_attention_norm.weight": (WIDTH, 2.5), "post_ffw_norm.weight": (WIDTH, 4.0)}
_HEADS: dict[str, Setting] = {"attention.key_length": HEAD, "attention.value_length": HEAD}
_RMS: dict[str, Setting] = {"attention.layer_norm_rms_epsilon": 1e-5}
_MOE: dict[str, Setting] = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": FEED // 2}

ARCHITECTURES = {
    a.name: a
    for a in (
        # Factors of the rotation lie outside of the layers, and every device needs a copy.
        Architecture("llama", ends={"rope_freqs.weight": (HEAD // 2, 2.0)}, settings=_RMS),
        Architecture("qwen2", vectors=_QKV_BIAS, settings=_RMS),
        Architecture("qwen3", vectors=_QK_NORM, settings=_RMS | _HEADS),
        Architecture(
            "gemma2",
            vectors=_POST_NORM,
            settings=_RMS | _HEADS | {"attention.sliding_window": WINDOW},
            tied=True,
            embedding=1.0,
        ),
        Architecture(
            "gemma3",
            vectors=_POST_NORM | _QK_NORM,
            settings=_RMS
            | _HEADS
            | {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": 3, "rope.freq_base_swa": 1e3},
            tied=True,
            embedding=1.0,
        ),
        Architecture(
            "phi2",
            matrices={"ffn_gate.weight": None, "attn_q.weight": ((WIDTH, HEADS * HEAD), 5.0)},
            vectors={
                **{"attn_norm.bias": (WIDTH, 0.0), "attn_output.bias": (WIDTH, 0.0), "ffn_norm.weight": None},
                **{"ffn_up.bias": (FEED, 0.0), "ffn_down.bias": (WIDTH, 0.0), **_QKV_BIAS},
            },
            ends={"output_norm.bias": (WIDTH, 0.0), "output.bias": (VOCAB, 0.0)},
            settings={"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": HEAD // 2},
        ),
        Architecture(
            "phi3",
            matrices={
                **{"attn_q.weight": None, "attn_k.weight": None, "attn_v.weight": None, "ffn_gate.weight": None},
                **{
                    "attn_qkv.weight": ((WIDTH, HEADS * HEAD + 2 * _KV), 1.7),
                    "ffn_up.weight": ((WIDTH, 2 * FEED), 1.5),
                },
            },
            ends={"rope_factors_long.weight": (HEAD // 2, 3.0), "rope_factors_short.weight": (HEAD // 2, 1.2)},
            settings=_RMS | {"rope.scaling.original_context_length": 1024},
        ),
        Architecture("qwen3moe", matrices=_EXPERTS, vectors=_QK_NORM, settings=_RMS | _HEADS | _MOE),
        Architecture(
            "qwen2moe",
            matrices=_EXPERTS | _SHARED,
            vectors=_QKV_BIAS | {"ffn_gate_inp_shexp.weight": (WIDTH, 0.0)},
            settings=_RMS | _MOE | {"expert_shared_feed_forward_length": FEED},
        ),
        Architecture(
            "gpt-oss",
            matrices=_EXPERTS,
            vectors={
                **_QKV_BIAS,
                **{"attn_output.bias": (WIDTH, 0.0), "attn_sinks.weight": (HEADS, 1.0), "ffn_norm.weight": None},
                **{"post_attention_norm.weight": (WIDTH, 1.0), "ffn_gate_inp.bias": (EXPERTS, 0.0)},
                **{f"ffn_{x}_exps.bias": ((FEED // 2, EXPERTS), 0.0) for x in ("gate", "up")},
                "ffn_down_exps.bias": ((WIDTH, EXPERTS), 0.0),
            },
            settings=_RMS | _MOE | _HEADS | {"attention.sliding_window": WINDOW},
        ),
        Architecture(
            "gemma4",
            vectors={**_POST_NORM, **_QK_NORM, "layer_output_scale.weight": (1, 1.0)},
            ends={"rope_freqs.weight": (HEAD // 2, 2.0)},
            settings={
                **_RMS,
                **_HEADS,
                **{f"attention.{x}_length_swa": HEAD for x in ("key", "value")},
                **{"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": (1, 1, 0, 1, 1, 0)},
                **{"rope.freq_base_swa": 1e3, "rope.dimension_count_swa": HEAD, "embedding_length_per_layer_input": 0},
            },
            tied=True,
            embedding=1.0,
        ),
    )
}

_INNER, _STATE, _GROUPS, _SSM_HEADS, _CONV = 2 * WIDTH, 32, 1, 8, 4
_CHANNELS = _INNER + 2 * _GROUPS * _STATE
_NO_ATTENTION: dict[str, Matrix | None] = {f"attn_{x}.weight": None for x in ("q", "k", "v", "output")}
_MAMBA: dict[str, Matrix | None] = _NO_ATTENTION | {
    "ssm_in.weight": ((WIDTH, _INNER + _CHANNELS + _SSM_HEADS), 1.5),
    "ssm_out.weight": ((_INNER, WIDTH), 1.5),
}
_MAMBA_VECTORS: dict[str, Vector | None] = {
    "ssm_conv1d.weight": ((_CONV, _CHANNELS), 0.5),
    "ssm_conv1d.bias": (_CHANNELS, 0.0),
    "ssm_dt.bias": (_SSM_HEADS, 0.0),
    "ssm_a": ((1, _SSM_HEADS), -1.0),
    "ssm_d": ((1, _SSM_HEADS), 1.0),
    "ssm_norm.weight": ((_INNER // _GROUPS, _GROUPS), 1.0),
}
_SSM: dict[str, Setting] = {
    **{"ssm.conv_kernel": _CONV, "ssm.inner_size": _INNER, "ssm.state_size": _STATE},
    **{"ssm.time_step_rank": _SSM_HEADS, "ssm.group_count": _GROUPS},
}
_LATENT, _ROPE = 64, 32
FURTHER = {
    a.name: a
    for a in (
        # One latent for all heads, shared experts, and a first layer without experts.
        Architecture(
            "deepseek2",
            matrices=_EXPERTS
            | {f"ffn_{x}_shexp.weight": ((WIDTH, FEED // 2), 1.5) for x in ("gate", "up")}
            | {
                **{"ffn_down_shexp.weight": ((FEED // 2, WIDTH), 1.5), "attn_k.weight": None, "attn_v.weight": None},
                "attn_q.weight": None,
                "attn_q_a.weight": ((WIDTH, 96), 1.5),
                "attn_q_b.weight": ((96, HEADS * (HEAD + _ROPE)), 1.7),
                "attn_kv_a_mqa.weight": ((WIDTH, _LATENT + _ROPE), 1.5),
                "attn_k_b.weight": ((HEAD, _LATENT, HEADS), 1.5),
                "attn_v_b.weight": ((_LATENT, HEAD, HEADS), 1.5),
            },
            vectors={"attn_q_a_norm.weight": (96, 1.0), "attn_kv_a_norm.weight": (_LATENT, 1.0)},
            other=_NO_FEED
            | {name: matrix for name, matrix in _LLAMA.items() if name.startswith("ffn")}
            | {
                **{"attn_k.weight": None, "attn_v.weight": None, "attn_q.weight": None},
                "attn_q_a.weight": ((WIDTH, 96), 1.5),
                "attn_q_b.weight": ((96, HEADS * (HEAD + _ROPE)), 1.7),
                "attn_kv_a_mqa.weight": ((WIDTH, _LATENT + _ROPE), 1.5),
                "attn_k_b.weight": ((HEAD, _LATENT, HEADS), 1.5),
                "attn_v_b.weight": ((_LATENT, HEAD, HEADS), 1.5),
            },
            other_vectors={"attn_q_a_norm.weight": (96, 1.0), "attn_kv_a_norm.weight": (_LATENT, 1.0)},
            other_at=(0,),
            settings={
                **_RMS,
                **_MOE,
                **{"leading_dense_block_count": 1, "expert_shared_count": 1, "attention.head_count_kv": 1},
                **{"attention.q_lora_rank": 96, "attention.kv_lora_rank": _LATENT, "rope.dimension_count": _ROPE},
                **{"attention.key_length": _LATENT + _ROPE, "attention.value_length": _LATENT},
                **{"attention.key_length_mla": HEAD + _ROPE, "attention.value_length_mla": HEAD},
            },
        ),
        Architecture(
            "mamba2",
            matrices=_NO_FEED | _MAMBA,
            vectors=_MAMBA_VECTORS | {"ffn_norm.weight": None},
            settings=_RMS | _SSM | {"attention.head_count": 0, "attention.head_count_kv": 0},
        ),
        Architecture(
            "granitehybrid",
            matrices=_MAMBA,
            vectors=_MAMBA_VECTORS,
            other_at=(2, 5),
            settings={
                **_RMS,
                **_SSM,
                **{"attention.head_count_kv": (0, 0, HEADS_KV, 0, 0, HEADS_KV), "attention.scale": 0.125},
                **{"embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0},
            },
        ),
    )
}
"""Those whose caches are unlike a llama's: for their memory, not for their words."""


def write_architecture(path: Path, name: str, kind: Kind) -> None:
    """Write a model whose matrices are of one kind, and all else as is usual beside it: F32."""
    shape = ARCHITECTURES.get(name) or FURTHER[name]
    llama: dict[str, Vector | None] = {"attn_norm.weight": (WIDTH, 1.0), "ffn_norm.weight": (WIDTH, 1.0)}
    ends = {**shape.ends, "output_norm.weight": (WIDTH, 1.0)}
    tensors = [random_matrix("token_embd.weight", (WIDTH, VOCAB), kind, shape.embedding)]
    if not shape.tied:
        tensors.append(random_matrix("output.weight", (WIDTH, VOCAB), kind, 2.0))
    tensors += [_vector(key, *value) for key, value in ends.items()]
    for layer in range(LAYERS):
        is_other = layer in shape.other_at
        matrices = _there({**_LLAMA, **(shape.other if is_other else shape.matrices)})
        vectors = _there({**llama, **(shape.other_vectors if is_other else shape.vectors)})
        tensors += [_vector(f"blk.{layer}.{key}", *value) for key, value in vectors.items()]
        for key, (dims, gain) in matrices.items():
            full = f"blk.{layer}.{key}"
            tensors.append(
                _router(full, dims, gain) if key == "ffn_gate_inp.weight" else random_matrix(full, dims, kind, gain)
            )
    write.write_gguf(path, [*_settings(shape), *_words()], tensors, lambda done, total: None)


def _there(found: Mapping[str, _T | None]) -> dict[str, _T]:
    return {key: value for key, value in found.items() if value is not None}


def _settings(shape: Architecture) -> list[bytes]:
    settings = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "feed_forward_length": FEED,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS_KV,
        "rope.dimension_count": HEAD,
        "vocab_size": VOCAB,
        **shape.settings,
    }
    entries = [write.text("general.architecture", shape.name), write.text("general.name", "small")]
    for name, value in settings.items():
        key = f"{shape.name}.{name}"
        if isinstance(value, tuple):
            entries.append(_array(key, _I32, len(value), struct.pack(f"<{len(value)}i", *value)))
        else:
            entries.append(write.u32(key, value) if isinstance(value, int) else write.f32(key, value))
    return entries


def _words() -> list[bytes]:
    """A vocabulary: three marks, the bytes of plain text, a space, and words of two syllables.

    No token is a part of a character: a server keeps such a one back, and what it knows of it.
    """
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["▁" + first + second for first in syllables for second in syllables]
    tokens = [*_SPECIAL, *(f"<0x{n:02X}>" for n in range(128)), "▁", *words][:VOCAB]
    kinds = [2, 3, 3, *[6] * 128, *[1] * (VOCAB - FIRST_WORD)]
    return [
        write.text("tokenizer.ggml.model", "llama"),
        _array("tokenizer.ggml.tokens", _STRING, VOCAB, b"".join(_text(token) for token in tokens)),
        _array("tokenizer.ggml.scores", _F32, VOCAB, struct.pack(f"<{VOCAB}f", *(-float(n) for n in range(VOCAB)))),
        _array("tokenizer.ggml.token_type", _I32, VOCAB, struct.pack(f"<{VOCAB}i", *kinds)),
        write.u32("tokenizer.ggml.unknown_token_id", 0),
        write.u32("tokenizer.ggml.bos_token_id", 1),
        write.u32("tokenizer.ggml.eos_token_id", 2),
    ]


def _array(key: str, kind: int, n: int, data: bytes) -> bytes:
    return _text(key) + struct.pack("<IIQ", _ARRAY, kind, n) + data


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _vector(name: str, size: int | tuple[int, ...], about: float) -> NewTensor:
    """Values near one number, each a little different, so that it matters which is where."""
    dims = (size,) if isinstance(size, int) else size
    n = int(np.prod(dims))

    def data() -> Sequence[bytes]:
        random = np.random.default_rng(list(name.encode()))
        return [(about + random.uniform(-0.2, 0.2, n)).astype("<f4").tobytes()]

    return NewTensor(name, 0, dims, 4 * n, data)


def _router(name: str, dims: tuple[int, ...], gain: float) -> NewTensor:
    """F32 in every published model: the choice of experts is not quantised."""

    def data(n: int) -> Sequence[bytes]:
        random = np.random.default_rng(list(name.encode()))
        return [(random.standard_normal(n) * gain / dims[0] ** 0.5).astype("<f4").tobytes()]

    n = int(np.prod(dims))
    return NewTensor(name, 0, dims, 4 * n, partial(data, n))
