"""Whole layers over a ring of given order: exact, by dynamic programming over (member, layers so far)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mesh.plan.costs import Costs
from mesh.plan.eligible import Seat

BALANCE_MS = 0.05
"""Worth of an even load: decides between equally fast machines, and nothing else."""


def divide(order: Sequence[Seat], costs: Costs, *, spread: bool) -> list[tuple[int, int]] | None:
    """Ranges of layers (first, end) for each seat of a ring that begins with its host, or None when they do not fit.

    Every worker gets a layer or more; the host may get none, its range being empty. Of all that fit, the fastest.

    Args:
        spread: give to each by its speed, a layer or more to the host too, even if fewer machines would be faster.
    """
    n = costs.n_layers
    # least[end]: cost of the best way to put layers 0..end-1 on the members so far.
    least = [0.0] + [math.inf] * n
    choices: list[list[int]] = []
    for index, seat in enumerate(order):
        host = index == 0
        room = seat.usable - costs.fixed(host=host, device=seat.device.kind)
        fewest = 0 if host and not spread else 1
        after = [math.inf] * (n + 1)
        choice = [-1] * (n + 1)
        for first in range(n + 1):
            if least[first] == math.inf or room < 0:
                continue
            for end in range(first + fewest, n + 1):
                needed = costs.layers(first, end)
                if needed > room:
                    break
                cost = least[first] + _worth(costs, seat, first, end, host, spread)
                if cost < after[end]:
                    after[end], choice[end] = cost, first
        least = after
        choices.append(choice)
    if least[n] == math.inf:
        return None
    ranges: list[tuple[int, int]] = []
    end = n
    for choice in reversed(choices):
        ranges.append((choice[end], end))
        end = choice[end]
    return ranges[::-1]


def _worth(costs: Costs, seat: Seat, first: int, end: int, host: bool, spread: bool) -> float:
    ms = costs.compute_ms(first, end, seat.speed, host=host)
    if spread:
        # The sum of squares over speeds is least when shares are as the speeds.
        return ms * (costs.weights[end] - costs.weights[first])
    load = costs.layers(first, end) / max(seat.usable, 1)
    return ms + BALANCE_MS * load * load
