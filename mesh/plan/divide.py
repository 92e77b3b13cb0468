"""Whole layers over a ring of given order: exact, by dynamic programming over (member, layers so far)."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
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
    n, reads, needs = costs.n_layers, costs.reads, costs.needs
    rooms = [seat.usable - costs.fixed(host=i == 0, device=seat.device.kind) for i, seat in enumerate(order)]
    if min(rooms) < 0:
        return None
    # least[end]: cost of the best way to put layers 0..end-1 on the members so far.
    least = [0.0] + [math.inf] * n
    choices: list[list[int]] = []
    for index, (seat, room) in enumerate(zip(order, rooms, strict=True)):
        fewest = 0 if index == 0 and not spread else 1
        # Written out, not called: these loops are nearly all of a plan's time.
        per_byte, per_layer = 1000 / seat.pace.bytes_per_second, seat.pace.layer_ms
        even = 0.0 if spread else BALANCE_MS / max(seat.usable, 1) ** 2
        behind = needs[n] - sum(rooms[index + 1 :])
        after = [math.inf] * (n + 1)
        choice = [-1] * (n + 1)
        for first, cost_before in enumerate(least):
            if cost_before == math.inf:
                continue
            most = bisect_right(needs, needs[first] + room) - 1
            # Fewer than that, and the members behind could not carry the rest.
            enough = max(first + fewest, bisect_left(needs, behind))
            if index > 0 and seat.most_layers is not None:
                most = min(most, first + seat.most_layers)
            for end in range(enough, most + 1):
                took = (reads[end] - reads[first]) * per_byte + (end - first) * per_layer
                held = needs[end] - needs[first]
                # Sharing out: a sum of squares over speeds is least when shares are as the speeds.
                cost = cost_before + took * (reads[end] - reads[first] if spread else 1) + even * held * held
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
