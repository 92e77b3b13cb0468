"""What a member of a ring needs: bytes of memory and milliseconds per token. Pure arithmetic on facts.

Compute buffers, as the engine itself counts them (CPU and RPC backends, flash attention, batches of 512), for three
demo models at contexts of 2,000 to 16,384 tokens and 1 to 4 slots, are within 0.1 MiB of::

    worker: 512 * (4 * (2 n_embd + 3 n_ff)                                + 2 * context)
    host:   512 * (max(4 * (4 n_embd + 3 n_ff), 4 * (n_vocab + n_embd)) + 2 * context)

``context`` is one slot's, rounded up to 256; its part is the attention mask. The second half of the host's maximum are
the logits that ``/v1/embeddings`` needs for a whole batch. A process took 24 MiB on top of that (llama-server, a
vocabulary of 32,000 words included) or 10 MiB (rpc-server).

Time per token is ``sum(weights of share / speed) + sum(one-way hops) + 1 ms per remote member``: generation reads every
weight once, and the members work one after another. Experts count in full, so sparse models are predicted too slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise

from mesh.wire.facts import Device, ModelCost, NodeFacts, NodeId

BATCH = 512
CONTEXT_STEP = 256
MIB = 1 << 20
HOST_PROCESS = 16 * MIB
WORKER_PROCESS = 16 * MIB
BYTES_PER_WORD = 600
"""Of the host's vocabulary: text, score and two look-up tables; with that, 34 MiB where 24 were measured."""
CPU_HEADROOM = 1 << 30
GPU_HEADROOM = 512 * MIB
"""A context of the driver, which no free-memory figure shows before it exists."""
UNKNOWN_RTT_MS = 50.0
"""Pessimistic: a link that nobody has measured should not win against one that somebody has."""
MEMBER_MS = 1.0
"""What a remote member costs beyond its hops: two wake-ups and a copy."""
_SPEED = {"cpu": 10e9, "cuda": 300e9, "metal": 100e9, "vulkan": 100e9, "rocm": 200e9, "sycl": 100e9}

Rtts = Mapping[tuple[NodeId, NodeId], float]


class Costs:
    """A model at a context size: needs of any range of its layers, in bytes.

    Args:
        ctx_size: tokens of one slot.
        parallel: slots.
    """

    def __init__(self, model: ModelCost, ctx_size: int, parallel: int) -> None:
        self.model = model
        self.context = -(-ctx_size // CONTEXT_STEP) * CONTEXT_STEP
        self.tokens = tokens = self.context * parallel
        """Of all slots."""
        self.weights = (0, *accumulate(model.layer_bytes))
        """Of the first n layers."""
        per_layer = zip(model.layer_bytes, model.kv_bytes_per_token, strict=True)
        self.needs = (0, *accumulate(weights + kv * tokens for weights, kv in per_layer))
        """Weights and KV cache of the first n layers."""
        self.each = tuple(b - a for a, b in pairwise(self.needs))
        """Of each layer."""
        mask = 2 * self.context
        n_ff = model.n_ff or 4 * model.n_embd
        rows = max(4 * (4 * model.n_embd + 3 * n_ff), 4 * (model.n_vocab + model.n_embd))
        self.worker_buffer = BATCH * (4 * (2 * model.n_embd + 3 * n_ff) + mask)
        self.vocabulary = (BYTES_PER_WORD + 4 * parallel) * model.n_vocab
        """Look-up tables, and one row of logits for each slot."""
        self.host_buffer = BATCH * (rows + mask)

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

    def layers(self, first: int, end: int) -> int:
        """Weights and KV cache of layers ``first`` to ``end - 1``."""
        return self.needs[end] - self.needs[first]

    def kv_per_token(self, first: int, end: int) -> int:
        """KV cache of one token in layers ``first`` to ``end - 1``."""
        return sum(self.model.kv_bytes_per_token[first:end])

    def compute_ms(self, first: int, end: int, speed: float, *, host: bool) -> float:
        """Time that these layers take for one token; the host's output layer included."""
        read = self.weights[end] - self.weights[first] + (self.model.output_bytes if host else 0)
        return read / speed * 1000


def headroom(device: Device) -> int:
    """What stays free whatever the plan: a twentieth of the device, within reason."""
    return min(device.total_bytes // 20, CPU_HEADROOM) if device.kind == "cpu" else GPU_HEADROOM


def usable_bytes(node: NodeFacts, device: Device) -> int:
    """What the mesh may take of a device: what is free but for the headroom, and never over the node's budget."""
    usable = max(0, device.free_bytes - headroom(device))
    return min(usable, node.budget_bytes) if node.budget_bytes else usable


def speed(device: Device) -> float:
    """Weights streamed per second, bytes; a cautious guess by kind when nobody has measured it."""
    return device.bytes_per_second or _SPEED[device.kind]


def rtt(rtt_ms: Rtts, a: NodeId, b: NodeId) -> float:
    """Round trip between two nodes, ms, whoever measured it; the slower word counts."""
    known = [rtt_ms[pair] for pair in ((a, b), (b, a)) if pair in rtt_ms]
    return max(known) if known else UNKNOWN_RTT_MS


def sound(model: ModelCost) -> bool:
    """Whether a model's facts agree with each other; a peer may send anything."""
    return len(model.layer_bytes) == len(model.kv_bytes_per_token) == model.n_layers and sum(model.layer_bytes) > 0
