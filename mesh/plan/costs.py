"""What a member of a ring needs: bytes of memory and milliseconds per token. Pure arithmetic on facts.

Compute buffers are what the engine's allocator comes to for batches of 512 tokens, which it reserves for whatever its
micro-batches are. A layer has two peaks: attention (residual, norm, queries, keys, values) and the feed-forward part
(residual, norm, up, gate, product). Masks lie beside them, half a word for each token and cached token: a worker's
until its last layer that needs it has looked, the host's to the end. The host may also hold the logits of a whole
batch, which ``/v1/embeddings`` asks for. Over fourteen architectures and six divisions, weights, cache and buffers
together are within 5% of what the engine allocates, and hardly ever below (``tests/net/test_engine_memory.py``). A
process takes 24 MiB on top (llama-server, a vocabulary of 32,000 words included) or 10 MiB (rpc-server).

The time of a token is in :mod:`mesh.plan.pace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from mesh.wire.facts import Device, ModelCost, NodeFacts

BATCH = 512
CONTEXT_STEP = 256
MIB = 1 << 20
HOST_PROCESS = 16 * MIB
WORKER_PROCESS = 16 * MIB
BYTES_PER_WORD = 600
"""Of the host's vocabulary: text, score and two look-up tables; with that, 34 MiB where 24 were measured."""
CPU_HEADROOM = 1 << 30
HELD_TOKENS = 256
"""Of a conversation, whose cache is read for each token."""
GPU_HEADROOM = 512 * MIB
"""A context of the driver, which no free-memory figure shows before it exists."""
_NO_MASK = (0, False)


class Costs:
    """A model at a context size: needs of any range of its layers, in bytes.

    Args:
        ctx_size: tokens of one slot.
        parallel: slots.
    """

    def __init__(self, model: ModelCost, ctx_size: int, parallel: int) -> None:
        self.model = model
        self.context = _cells(ctx_size)
        self.parallel = parallel
        self.tokens = self.context * parallel
        """Of all slots."""
        self.weights = (0, *accumulate(model.layer_bytes))
        """Of the first n layers."""
        windows = model.windows or (0,) * model.n_layers
        cells = [min(self.context, _cells(window + BATCH)) if window else self.context for window in windows]
        states = model.state_bytes or (0,) * model.n_layers
        per_layer = zip(model.layer_bytes, model.kv_bytes_per_token, cells, states, strict=True)
        self.needs = (0, *accumulate(w + (kv * n + state) * parallel for w, kv, n, state in per_layer))
        """Weights, KV cache and recurrent states of the first n layers."""
        self.each = tuple(b - a for a, b in pairwise(self.needs))
        """Of each layer."""
        held = (kv * min(n, HELD_TOKENS) for kv, n in zip(model.kv_bytes_per_token, cells, strict=True))
        reads = zip(model.read_bytes or model.layer_bytes, held, states, strict=True)
        self.reads = (0, *accumulate(sum(layer) for layer in reads))
        """What one token reads in the first n layers: weights, the cache of a short conversation, states."""
        layers = zip(pairwise(self.reads), self.each, strict=True)
        self.density = max((b - a) / max(each, 1) for (a, b), each in layers)
        """At most so much is read for a byte of memory; little where experts are chosen."""
        kinds = zip(cells, windows, model.kv_bytes_per_token, strict=True)
        self._masks = [(n, bool(window)) if kv else _NO_MASK for n, window, kv in kinds]
        self._rows = _Rows.of(model)
        self._states = 0 if any(model.kv_bytes_per_token) else 2 * parallel * max(states)
        self.worker_buffer = self._worker_buffer(0, model.n_layers)
        """At most."""
        self.vocabulary = (BYTES_PER_WORD + 4 * parallel) * model.n_vocab
        """Look-up tables, and one row of logits for each slot."""
        self.host_buffer = max(self._host_buffer(0, 0), self._host_buffer(0, model.n_layers))
        """At most."""

    @property
    def n_layers(self) -> int:
        return self.model.n_layers

    def tied_bytes(self) -> int:
        """What input and output share: on one CPU the embedding is in memory once, whatever it counts as."""
        model = self.model
        return max(0, model.input_bytes + model.output_bytes + self.weights[-1] - model.size_bytes)

    def fixed(self, *, host: bool, device: str = "cpu") -> int:
        """What a member needs besides its layers.

        Args:
            device: kind of the member's device. On a GPU a tied embedding is there twice: the engine keeps the token
                embedding in main memory. It counts against the GPU all the same, which is on the safe side.
        """
        if not host:
            return WORKER_PROCESS + self.worker_buffer
        ends = self.model.input_bytes + self.model.output_bytes
        if device == "cpu":
            ends -= min(ends, self.tied_bytes())
        return HOST_PROCESS + self.vocabulary + self.host_buffer + ends

    def buffer(self, first: int, end: int, *, host: bool) -> int:
        """The compute buffer of a member with these layers; never more than what :meth:`fixed` counts."""
        if host:
            return min(self.host_buffer, self._host_buffer(first, end))
        return min(self.worker_buffer, self._worker_buffer(first, end))

    def _worker_buffer(self, first: int, end: int) -> int:
        """Masks are let go after the last layer that looks at them."""
        rows = self._rows
        peak, ahead = 0, {_NO_MASK}
        for layer in range(end - 1, first - 1, -1):
            peak = max(peak, 4 * (rows.feed if len(ahead) > 1 else rows.feed_alone) + _mask_bytes(ahead))
            ahead.add(self._masks[layer])
            peak = max(peak, 4 * (rows.attention if self._masks[layer] != _NO_MASK else 0) + _mask_bytes(ahead))
            if self._has_state(layer):
                peak = max(peak, 4 * rows.state + _mask_bytes(ahead))
        return BATCH * peak + self._states * any(map(self._has_state, range(first, end)))

    def _host_buffer(self, first: int, end: int) -> int:
        """Masks stay until the last worker has its copy, and may then leave no room for the logits."""
        rows, n_embd = self._rows, self.model.n_embd
        masks = _mask_bytes(set(self._masks))
        if first == end:
            return BATCH * (4 * (self.model.n_vocab + 2 * n_embd) + masks)
        peak = rows.feed_alone + n_embd
        with_state = any(map(self._has_state, range(first, end)))
        if with_state:
            peak = max(peak, rows.state + n_embd)
        if any(mask != _NO_MASK for mask in self._masks[first:end]):
            # Layers of both kinds leave gaps for one another.
            peak = max(peak, rows.attention, rows.state + 3 * n_embd if with_state else 0)
        peak = max(peak, self.model.n_vocab + n_embd)
        return BATCH * (4 * peak + masks) + self._states * with_state

    def _has_state(self, layer: int) -> bool:
        return bool(self.model.state_bytes) and self.model.state_bytes[layer] > 0

    def layers(self, first: int, end: int) -> int:
        """Weights, KV cache and states of layers ``first`` to ``end - 1``."""
        return self.needs[end] - self.needs[first]

    def kv_per_token(self, first: int, end: int) -> int:
        """KV cache of one token in layers ``first`` to ``end - 1``."""
        return sum(self.model.kv_bytes_per_token[first:end])


@dataclass(frozen=True, slots=True)
class _Rows:
    """Values of one token at the peaks of a layer, residual and norm included."""

    attention: int
    state: int
    feed: int
    feed_alone: int
    """While no mask is needed any more: one lies behind a gap that is too small for anything."""

    @classmethod
    def of(cls, model: ModelCost) -> _Rows:
        n_embd = model.n_embd
        feed = 2 * n_embd + (model.feed_row or 3 * (model.n_ff or 4 * n_embd))
        chooses = model.read_bytes not in ((), model.layer_bytes)
        return cls(
            attention=2 * n_embd + (model.attention_row or 2 * n_embd),
            state=(3 if any(model.kv_bytes_per_token) else 2) * n_embd + model.state_row,
            feed=feed if chooses else feed + n_embd,
            feed_alone=feed,
        )


def _mask_bytes(masks: set[tuple[int, bool]]) -> int:
    """For one token of a batch, half a word for every cached token."""
    return 2 * sum(cells for cells, _ in masks)


def _cells(tokens: int) -> int:
    return -(-tokens // CONTEXT_STEP) * CONTEXT_STEP


def headroom(device: Device) -> int:
    """What stays free whatever the plan: a twentieth of the device, within reason."""
    return min(device.total_bytes // 20, CPU_HEADROOM) if device.kind == "cpu" else GPU_HEADROOM


def usable_bytes(node: NodeFacts, device: Device) -> int:
    """What the mesh may take of a device: what is free but for the headroom, and never over the node's budget."""
    usable = max(0, device.free_bytes - headroom(device))
    return min(usable, node.budget_bytes) if node.budget_bytes else usable


def sound(model: ModelCost) -> bool:
    """Whether a model's facts agree with each other; a peer may send anything."""
    for each in (model.windows, model.state_bytes, model.read_bytes):
        if each and len(each) != model.n_layers:
            return False
    read = sum(model.read_bytes) if model.read_bytes else 1
    return (
        len(model.layer_bytes) == len(model.kv_bytes_per_token) == model.n_layers
        and sum(model.layer_bytes) > 0
        and read > 0
    )
