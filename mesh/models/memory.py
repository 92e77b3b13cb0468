"""What a model's layers ask of memory besides their weights, from the header: caches, states, and rows while computing.

Which keys and tensors count is the engine's own reading of a file (``llama-hparams.cpp``, ``llama-kv-cache*.cpp``,
``llama-memory-recurrent.cpp``, the ``load_arch_hparams`` of each architecture at the pinned source). What is not known
here counts in full: an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh.models.header import Tensor, Value

_ALL = 1 << 20
"""Larger settings are not believed."""
_PERIODS = {
    **dict.fromkeys(("gemma2", "gpt-oss"), (2, False)),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "plamo3": (8, False),
    **dict.fromkeys(("cohere2", "olmo2", "exaone-moe", "llama4", "afmoe", "mellum", "muse-glimmer"), (4, False)),
    **dict.fromkeys(("cohere2moe", "laguna"), (4, True)),
    **dict.fromkeys(("gemma4", "granite-swa", "maple", "mimo2", "spark2-5", "step35", "dots3note", "lfm2"), (0, False)),
}
"""Architectures with sliding windows: every how many layers one sees all, and whether that is the first of them. The
file may say otherwise; 0: only the file says. Others ignore the setting (phi3), have no such layers, or have them on
conditions of their own (exaone4, smallthinker)."""
_WINDOWS = {"gemma2": 4096, "exaone-moe": 128, "llama4": 8192}
"""Of those whose files need not say it."""
_RECURRENT = ("ssm_", "time_mix_", "shortconv")
_PROJECTIONS = ("ssm_in", "attn_qkv", "time_mix", "shortconv")
_BOTH = ("falcon-h1",)
"""Each layer has a cache and a state."""
_KV_FROM_START = {"gemma3n": 20}
"""Later layers read the caches of earlier ones."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Of one layer, bytes.

    Args:
        kv_bytes: f16 K and V of one token.
        window: how many tokens the cache holds at most; 0: all of the context.
        state_bytes: recurrent state of one slot, whatever it holds.
        read_bytes: weights that one token reads; of experts those in use.
        attention_row: values that one token takes at the peak of attention.
        state_row: the same of what stands in attention's place in a recurrent layer.
        feed_row: the same of the feed-forward part; the residual and the norm before it are not in either.
    """

    kv_bytes: int
    window: int
    state_bytes: int
    read_bytes: int
    attention_row: int
    state_row: int
    feed_row: int


class Keys:
    """The ``<architecture>.*`` settings. What is absurd counts as not said."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]) -> None:
        self.architecture = architecture
        self.metadata = metadata

    def one(self, key: str, default: int = 0) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return value if isinstance(value, int) and 0 <= value <= _ALL else default

    def each(self, key: str, n_layers: int, default: int | None = None) -> tuple[int, ...]:
        """A setting of every layer, which a file gives once or for each; empty when it is not said."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, tuple) and all(isinstance(n, int) and 0 <= n <= _ALL for n in value):
            padded = tuple(int(n) for n in value[:n_layers])
            return padded + (max(padded, default=0),) * (n_layers - len(padded))
        if isinstance(value, int) and 0 <= value <= _ALL:
            return (int(value),) * n_layers
        return ()


def weigh_layers(keys: Keys, layers: list[list[Tensor]], n_embd: int) -> tuple[LayerMemory, ...]:
    """What each layer asks.

    Args:
        layers: tensors of each layer.
    """
    n = len(layers)
    heads = keys.each("attention.head_count", n, 0)
    kv_heads = keys.each("attention.head_count_kv", n) or heads
    windows = _windows(keys, n)
    with_kv = n - keys.one("attention.shared_kv_layers")
    with_kv = min(with_kv, _KV_FROM_START.get(keys.architecture, n))
    head = n_embd // max(heads) if any(heads) else 0
    found = []
    for i, tensors in enumerate(layers):
        recurrent = any(_part(t.name).startswith(_RECURRENT) for t in tensors)
        kv = 0
        if i < with_kv and (not recurrent or keys.architecture in _BOTH):
            kv = 2 * kv_heads[i] * _head_values(keys, head, windowed=bool(windows[i]))
            kv += 2 * keys.one("attention.indexer.key_length")
        found.append(
            LayerMemory(
                kv_bytes=kv,
                window=windows[i],
                state_bytes=4 * _state_values(keys, n_embd, max(heads, default=0)) if recurrent else 0,
                read_bytes=_read_bytes(keys, tensors),
                attention_row=_attention_row(keys, tensors, heads[i] if heads else 0) if kv else 0,
                state_row=_state_row(keys, tensors) if recurrent else 0,
                feed_row=_feed_row(keys, tensors, n_embd),
            )
        )
    return tuple(found)


def _part(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``attn_q.weight``"""
    return name.removeprefix("dec.").split(".", 2)[-1]


def _windows(keys: Keys, n: int) -> tuple[int, ...]:
    """For each layer how many tokens its cache is limited to; 0: to none."""
    known = _PERIODS.get(keys.architecture)
    window = keys.one("attention.sliding_window", _WINDOWS.get(keys.architecture, 0))
    if known is None or not window:
        return (0,) * n
    pattern = keys.metadata.get(f"{keys.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        limited = [bool(p) for p in pattern[:n]] + [False] * (n - len(pattern))
    else:
        period, dense_first = known
        period = pattern if isinstance(pattern, int) and 0 <= pattern <= n else period
        limited = [period > 1 and i % period != (0 if dense_first else period - 1) for i in range(n)]
    return tuple(window if is_limited else 0 for is_limited in limited)


def _head_values(keys: Keys, head: int, *, windowed: bool) -> int:
    """K and V of one head. With MLA the engine stores one latent per token in K, and no V."""
    k, v = keys.one("attention.key_length", head), keys.one("attention.value_length", head)
    if windowed:
        k, v = keys.one("attention.key_length_swa", k), keys.one("attention.value_length_swa", v)
    return k if keys.one("attention.key_length_mla") else k + v


def _state_values(keys: Keys, n_embd: int, n_head: int) -> int:
    """Values of a recurrent layer's state, for one slot: what convolution keeps of earlier tokens, and the state."""
    wkv, short, kda = keys.one("wkv.head_size"), keys.one("shortconv.l_cache"), keys.one("kda.head_dim")
    kernel = keys.one("ssm.conv_kernel")
    if wkv:
        return n_embd * (keys.one("token_shift_count", 2) + wkv)
    if short:
        return n_embd * (short - 1)
    if kda:
        return n_head * kda * (3 * (kernel - 1 if kernel else 3) + kda)
    inner, state, groups = keys.one("ssm.inner_size"), keys.one("ssm.state_size"), keys.one("ssm.group_count")
    return max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner


def _read_bytes(keys: Keys, tensors: Iterable[Tensor]) -> int:
    experts, used = keys.one("expert_count"), keys.one("expert_used_count")
    read = 0
    for tensor in tensors:
        chosen = _is_of_experts(tensor) and 0 < used < experts
        read += tensor.n_bytes * used // experts if chosen else tensor.n_bytes
    return read


def _is_of_experts(tensor: Tensor) -> bool:
    return "_exps." in tensor.name or "_chexps." in tensor.name


def _widths(tensors: Iterable[Tensor]) -> dict[str, int]:
    return {_part(t.name): t.shape[1] for t in tensors if len(t.shape) == 2}


def _state_row(keys: Keys, tensors: Iterable[Tensor]) -> int:
    """The projection, the convolution's input and output, and what the scan returns."""
    wide = max((w for name, w in _widths(tensors).items() if name.startswith(_PROJECTIONS)), default=0)
    inner = keys.one("ssm.inner_size", wide)
    return wide + inner + 2 * (inner + 2 * keys.one("ssm.group_count") * keys.one("ssm.state_size"))


def _attention_row(keys: Keys, tensors: Iterable[Tensor], n_head: int) -> int:
    """Queries, keys and values together; with MLA the absorbed queries and what attention returns, too."""
    width = _widths(tensors)
    if "attn_kv_a_mqa.weight" in width:
        q = next((width[name] for name in ("attn_q_b.weight", "attn_q.weight") if name in width), 0)
        return q + n_head * (keys.one("attention.kv_lora_rank") + keys.one("attention.key_length"))
    k = width.get("attn_k.weight", 0)
    row = sum(width.get(f"attn_{x}.weight", 0) for x in ("q", "k", "v", "qkv", "gate"))
    # Keys again, where they are not turned in place.
    return row + (k or max(row - width.get("attn_output.weight", row), 0) // 2)


def _feed_row(keys: Keys, tensors: Iterable[Tensor], n_embd: int) -> int:
    """Up, gate and their product; of experts those in use, beside what the shared ones need."""
    shape = {_part(t.name): t.shape for t in tensors}
    used = max(keys.one("expert_used_count"), 1)
    rows = [0]
    for suffix, times in (("", 1), ("_shexp", 1), ("_exps", used), ("_chexps", used)):
        down = shape.get(f"ffn_down{suffix}.weight")
        if down is None:
            continue
        gated = any(name.startswith((f"ffn_gate{suffix}.", f"ffn_gate_up{suffix}.")) for name in shape)
        up = shape.get(f"ffn_up{suffix}.weight", down)
        gated = gated or (len(up) > 1 and up[1] == 2 * down[0])  # both in one matrix
        feed = times * down[0]
        rows.append(
            max(3 * feed, feed + times * n_embd) + n_embd if times > 1 else 3 * feed if gated else feed + n_embd
        )
    return max(rows)


def widest_feed(keys: Keys, n_layers: int) -> int:
    """The widest feed-forward row of one token, all experts in use together; 0 when unknown."""
    dense = max(keys.each("feed_forward_length", n_layers, 0), default=0)
    experts = keys.one("expert_feed_forward_length") * keys.one("expert_used_count")
    return max(dense, experts + keys.one("expert_shared_feed_forward_length"))
