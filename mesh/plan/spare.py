"""How much memory a ring sets aside for conversations that lost their slot. Pure.

A conversation's KV cache lies with its layers, so what is kept of it is spread over the ring as the cache is: the
member with the least to spare for its share decides for all. Half of what the layout leaves of a machine stays its
owner's.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.plan.costs import MIB, Costs

OFFERED = 2
"""One part in so many of what a member has left."""
CONTEXTS = 4
"""At most so many times the cache of all slots together."""
WORTHWHILE = 4
"""Less than one part in so many of a full slot's cache is not worth it."""


def prompt_cache_bytes(ranges: Sequence[tuple[int, int]], spares: Sequence[int], costs: Costs) -> int:
    """Bytes over the whole ring, whole MiB; 0 when too little is left.

    Args:
        ranges: layers (first, end) of each member.
        spares: bytes that each member may use beyond its needs.
    """
    per_token = costs.kv_per_token(0, costs.n_layers)
    most = CONTEXTS * per_token * costs.tokens
    for (first, end), spare in zip(ranges, spares, strict=True):
        share = costs.kv_per_token(first, end)
        if share:
            most = min(most, max(0, spare) // OFFERED * per_token // share)
    return 0 if most * WORTHWHILE < per_token * costs.context else most // MIB * MIB
