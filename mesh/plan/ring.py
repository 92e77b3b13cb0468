"""The shortest way round: from the host through every worker and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations

from mesh.plan.pace import MEMBER_MS, Rtts, rtt
from mesh.wire.facts import NodeId

EXACT = 8
"""Nodes up to which every subset is weighed, in its shortest order (Held-Karp: 2^7 * 49 steps for each host)."""
ALL_ORDERS = 5
"""Nodes up to which every order is: layers of different sizes may fit in one order and not in another."""
MAX_RING = 15
"""The engine takes fewer than 16 devices."""


def ring_ms(order: Sequence[NodeId], rtt_ms: Rtts) -> float:
    """One way around the ring: half a round trip per hop, and what each remote member costs. 0 for one node alone."""
    if len(order) < 2:
        return 0.0
    hops = sum(rtt(rtt_ms, a, b) for a, b in pairwise([*order, order[0]])) / 2
    return hops + MEMBER_MS * (len(order) - 1)


def worthwhile_orders(host: NodeId, others: Sequence[NodeId], rtt_ms: Rtts) -> Iterator[tuple[NodeId, ...]]:
    """Orders of workers after ``host``, for every subset of ``others``."""
    if len(others) < ALL_ORDERS:
        for size in range(1, len(others) + 1):
            yield from permutations(others, size)
        return
    for order in shortest_rings(host, others, rtt_ms).values():
        yield order
        if len(order) > 1:
            yield order[::-1]


def shortest_rings(host: NodeId, others: Sequence[NodeId], rtt_ms: Rtts) -> dict[frozenset[NodeId], tuple[NodeId, ...]]:
    """For each subset of ``others``, the order that makes the ring from ``host`` shortest (Held and Karp, 1962).

    Of equally short orders the one with the lowest ids first, so that all nodes agree.
    """
    legs = {(a, b): rtt(rtt_ms, a, b) for a in (host, *others) for b in (host, *others) if a != b}
    paths: dict[tuple[frozenset[NodeId], NodeId], tuple[float, tuple[NodeId, ...]]] = {}
    for last in others:
        paths[frozenset((last,)), last] = (legs[host, last], (last,))
    best: dict[frozenset[NodeId], tuple[NodeId, ...]] = {}
    for size in range(1, len(others) + 1):
        for chosen in combinations(others, size):
            subset = frozenset(chosen)
            if size > 1:
                for last in chosen:
                    before = subset - {last}
                    paths[subset, last] = min(
                        (length + legs[prior, last], (*order, last))
                        for prior in before
                        for length, order in (paths[before, prior],)
                    )
            best[subset] = min((paths[subset, last][0] + legs[last, host], paths[subset, last][1]) for last in chosen)[
                1
            ]
    return best
