"""What a token costs in time, and of what that is made. Pure arithmetic on facts.

Members work one after another, so a token takes the sum of

- compute: on each member the weights that a token reads of its layers, and the cache of a short conversation, by the
  device's speed with weights of that type; what a layer costs however small it is; on the host the output layer too,
  and the choice of a word out of so many;
- hops: half a round trip from each member to the next and from the last to the host;
- bytes: one activation for each hop at the rate of its link;
- members: what a remote one costs beyond that, a wake-up and a copy at each end.

Speeds are measured (:mod:`mesh.engine.speed`), and until then guessed by the kind of device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mesh.plan.costs import Costs
from mesh.wire.facts import Device, ModelCost, NodeId, alone, weight_family

UNKNOWN_RTT_MS = 50.0
"""Pessimistic: a link that nobody has measured should not win against one that somebody has."""
MEMBER_MS = 0.25
"""What a remote member costs beyond its hops, measured with a model that hardly computes (`demo` on two, docs), over
connections that the engines carry on by themselves. Through a tunnel it is more; beside the hops of those, nothing."""
WORD_NS = 3.0
"""For each word of the vocabulary, to choose one of them: the engine's samplers on one core of 2020."""
HOST_MS = 0.1
"""What the server does for a token besides: text, JSON and HTTP."""
ACTIVATION = 4
"""Bytes of a value between members; half with ``--wire-dtype f16``, which a plan does not count on."""
SLOWEST = 1e6
_SPEED = {"cpu": 10e9, "cuda": 300e9, "metal": 100e9, "vulkan": 100e9, "rocm": 200e9, "sycl": 100e9}
_LAYER_MS = {"cpu": 0.04}
"""A guess: twenty operations, and threads that wait for each other."""
_ANY_LAYER_MS = 0.06

Pair = tuple[NodeId, NodeId]
Rtts = Mapping[Pair, float]
Rates = Mapping[Pair, float]
"""Bytes per second between two nodes; either direction will do."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A device's: weights streamed per second, bytes; and what each layer takes besides, ms."""

    bytes_per_second: float
    layer_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Milliseconds of one token."""

    compute: float
    hops: float = 0.0
    bytes: float = 0.0
    members: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.hops + self.bytes + self.members


def pace(device: Device, model: ModelCost, *, solo: bool = False) -> Pace:
    """What ``device`` does with weights as ``model`` has them; a cautious guess by kind when nobody has measured it.

    Args:
        solo: it serves alone, and rearranges them.
    """
    family = weight_family(model.weights)
    measured = {speed.weights: speed.bytes_per_second for speed in device.speeds if speed.bytes_per_second > 0}
    of_kind = measured.get(alone(family) if solo else family) or measured.get(family) or device.bytes_per_second
    if not of_kind:
        return Pace(_SPEED[device.kind], _LAYER_MS.get(device.kind, _ANY_LAYER_MS))
    # A member may say anything: nothing is so slow that its time is no number.
    return Pace(max(of_kind, SLOWEST), device.layer_us / 1000)


def compute_ms(costs: Costs, first: int, end: int, pace: Pace, *, host: bool) -> float:
    """Time that these layers take for one token; the host's output layer included."""
    read = costs.reads[end] - costs.reads[first] + (costs.model.output_bytes if host else 0)
    return read / pace.bytes_per_second * 1000 + (end - first) * pace.layer_ms + (host_ms(costs) if host else 0)


def host_ms(costs: Costs) -> float:
    """What the host does for each token besides computing."""
    return HOST_MS + WORD_NS * costs.model.n_vocab / 1e6


def rtt(rtt_ms: Rtts, a: NodeId, b: NodeId) -> float:
    """Round trip between two nodes, ms, whoever measured it; the slower word counts."""
    known = [rtt_ms[pair] for pair in ((a, b), (b, a)) if pair in rtt_ms]
    return max(known) if known else UNKNOWN_RTT_MS


def with_rates(rtt_ms: Rtts, rates: Rates, n_embd: int) -> Rtts:
    """Round trips that count the time of an activation each way: what a search has to know of a link."""
    if not rates:
        return rtt_ms
    both = {pair: rtt(rtt_ms, *pair) for pair in (*rtt_ms, *rates)}
    return {pair: ms + 2 * bytes_ms(rates, *pair, n_embd) for pair, ms in both.items()}


def bytes_ms(rates: Rates, a: NodeId, b: NodeId, n_embd: int) -> float:
    """Time of one activation from one node to another; nothing where nobody knows the rate."""
    known = [rates[pair] for pair in ((a, b), (b, a)) if rates.get(pair, 0) > 0]
    return ACTIVATION * n_embd / min(known) * 1000 if known else 0.0


def ring_parts(order: Sequence[NodeId], compute: float, rtt_ms: Rtts, rates: Rates, n_embd: int) -> Parts:
    """The parts of a ring's time, in data-flow order; ``compute`` of all its members together."""
    if len(order) < 2:
        return Parts(compute)
    legs = list(pairwise([*order, order[0]]))
    return Parts(
        compute,
        sum(rtt(rtt_ms, *leg) for leg in legs) / 2,
        sum(bytes_ms(rates, *leg, n_embd) for leg in legs),
        MEMBER_MS * (len(order) - 1),
    )
