"""Memory for conversations that lost their slot is what nobody misses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.plan.costs import MIB, Costs
from mesh.plan.spare import prompt_cache_bytes
from tests.unit.test_plan_search import GB, a_model, a_node, layout_of


def costs_of(kv: list[int], ctx: int = 4096, parallel: int = 2) -> Costs:
    return Costs(a_model(n_layers=len(kv), layer_bytes=(1,) * len(kv), kv_bytes_per_token=tuple(kv)), ctx, parallel)


def kept(kv: list[int], counts: list[int], spares: list[int], **sizes: int) -> int:
    ends = [sum(counts[: n + 1]) for n in range(len(counts))]
    return prompt_cache_bytes(list(zip([0, *ends[:-1]], ends, strict=True)), spares, costs_of(kv, **sizes))


def test_the_member_with_the_least_for_its_share_decides() -> None:
    assert kept([1024] * 8, [4, 4], [20 * MIB, 40 * MIB]) == 20 * MIB
    assert kept([1024] * 8, [2, 6], [20 * MIB, 40 * MIB]) == 26 * MIB
    assert kept([1024] * 8, [2, 6], [10 * MIB, 400 * MIB]) == 20 * MIB


def test_who_has_no_cache_has_no_say() -> None:
    assert kept([1024] * 8, [0, 8], [0, 20 * MIB]) == 10 * MIB
    assert kept([0, 0, 1024, 1024], [2, 2], [0, 20 * MIB]) == 10 * MIB


def test_no_more_than_four_times_all_slots() -> None:
    assert kept([1024] * 8, [8], [100 * GB]) == 4 * 8 * 1024 * 4096 * 2


@pytest.mark.parametrize("spare", [0, -5 * MIB, 15 * MIB])
def test_a_sliver_is_left_alone(spare: int) -> None:
    assert kept([1024] * 8, [8], [spare]) == 0


def test_a_model_without_a_cache_keeps_nothing() -> None:
    assert kept([0, 0], [1, 1], [GB, GB]) == 0


# Whatever the layers and the members, nobody keeps more than half of what it has left; shares are within the whole.
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1 << 34)), min_size=1, max_size=6),
    st.integers(0, 1 << 20),
    st.randoms(use_true_random=False),
)
def test_nobody_gives_more_than_half_of_what_is_left(
    members: list[tuple[int, int]], largest: int, draw: object
) -> None:
    counts = [count for count, _ in members]
    if sum(counts) == 0:
        return
    kv = [draw.randint(0, largest) for _ in range(sum(counts))]  # type: ignore[attr-defined]
    total = kept(kv, counts, [spare for _, spare in members])
    assert total % MIB == 0
    at = shares = 0
    for count, spare in members:
        carried = sum(kv[at : at + count])
        share = total * carried // sum(kv) if carried else 0
        assert share <= spare / 2
        shares += share
        at += count
    assert shares <= total


def test_a_layout_says_what_is_kept_and_counts_it() -> None:
    model = a_model(kv_bytes_per_token=(1024,) * 8)
    tight = 900 * 1000 * 1000 // 2
    nodes = [a_node(n, tight + 300 * 1000 * 1000, models=(model,)) for n in range(2)]
    layout = layout_of(*nodes, model=model)
    assert layout.prompt_cache_bytes > 0
    costs = Costs(model, layout.ctx_size, layout.parallel)
    for index, member in enumerate(layout.ring):
        assert member.layers is not None
        need = costs.fixed(host=index == 0) + costs.layers(member.layers[0], member.layers[1] + 1)
        share = layout.prompt_cache_share(member.layers)
        assert share == layout.prompt_cache_bytes * (member.layers[1] + 1 - member.layers[0]) // 8
        assert member.bytes == need + share
