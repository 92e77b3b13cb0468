"""A layout carries every layer once, never over a budget, and is the same whoever computes it."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.plan.costs import GPU_HEADROOM, Costs, usable_bytes
from mesh.plan.divide import divide
from mesh.plan.eligible import seats_of
from mesh.plan.pace import MEMBER_MS, compute_ms
from mesh.plan.ring import ring_ms, shortest_rings
from mesh.plan.search import DEFAULT_CTX, DEFAULT_PARALLEL, SIMPLER, Planned, plan
from mesh.wire.facts import Device, Layout, ModelCost, NodeFacts, NodeId

MB = 1_000_000
GB = 1000 * MB
Rtts = Mapping[tuple[NodeId, NodeId], float]


def node_id(n: int) -> NodeId:
    return f"{'abcdefghijklmnopqrstuvwxyz'[n % 26]}{'234567'[n // 26 % 6]}" + "a" * 24


def a_model(**changes: Any) -> ModelCost:
    """8 layers of 100 MB, ends of 50 MB each, small buffers."""
    base = ModelCost(
        fingerprint="f" * 64, name="model", architecture="llama", size_bytes=900 * MB, n_layers=8, n_embd=64,
        n_vocab=1000, n_ctx_train=8192, layer_bytes=(100 * MB,) * 8, input_bytes=50 * MB, output_bytes=50 * MB,
        kv_bytes_per_token=(0,) * 8, n_ff=128,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


MODEL = a_model()
COSTS = Costs(MODEL, DEFAULT_CTX, DEFAULT_PARALLEL)
HOST = COSTS.fixed(host=True)
WORKER = COSTS.fixed(host=False)


def cpu(free: int, speed: float = 0.0) -> Device:
    """A CPU of which exactly ``free`` bytes are usable."""
    return Device("CPU", "cpu", "a processor", 0, free, speed)


def a_node(n: int, usable: int = 10 * GB, *, speed: float = 0.0, **changes: Any) -> NodeFacts:
    base = NodeFacts(
        id=node_id(n), version=1, name=f"node{n}", role="worker", mesh_version="1", engine="pin", backend="cpu",
        devices=(cpu(usable, speed),), budget_bytes=0, threads=4, models=(MODEL,), wants="", addresses=(),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def planned(
    *nodes: NodeFacts, rtts: Rtts | float = 1.0, current: Layout | None = None, model: ModelCost = MODEL
) -> Planned:
    if isinstance(rtts, int | float):
        rtts = {(a.id, b.id): float(rtts) for a in nodes for b in nodes if a.id < b.id}
    return plan(nodes, model, rtt_ms=rtts, current=current)


def layout_of(*nodes: NodeFacts, **how: Any) -> Layout:
    result = planned(*nodes, **how)
    assert result.layout is not None, result.reason
    return result.layout


def carried(layout: Layout) -> list[int]:
    return [i for m in layout.ring if m.layers for i in range(m.layers[0], m.layers[1] + 1)]


# -- who serves ----------------------------------------------------------------------------------------------------


def test_a_machine_that_holds_the_model_serves_alone() -> None:
    result = planned(a_node(1), a_node(2, 500 * MB))
    assert result.layout is not None
    assert (result.layout.mode, result.layout.host, len(result.layout.ring)) == ("solo", node_id(1), 1)
    assert "node1 alone holds model" in result.reason
    assert "would slow this mesh" in result.excluded[node_id(2)]
    assert "model fits without it" in result.excluded[node_id(2)]


def test_of_two_that_hold_it_the_faster_serves() -> None:
    assert layout_of(a_node(1, speed=1e9), a_node(2, speed=2e9)).host == node_id(2)


def test_what_no_machine_holds_alone_is_split() -> None:
    result = planned(a_node(1, HOST + 500 * MB), a_node(2, WORKER + 400 * MB))
    assert result.layout is not None
    assert (result.layout.mode, result.layout.host) == ("split", node_id(1))
    assert carried(result.layout) == list(range(8))
    assert "no machine alone has" in result.reason and "shares with node2" in result.reason


def test_the_fewest_machines_that_suffice_are_taken() -> None:
    nodes = [a_node(n, HOST + 450 * MB) for n in range(4)]
    assert len(layout_of(*nodes).ring) == 2


def test_the_nearest_machines_are_taken() -> None:
    nodes = [a_node(n, HOST + 450 * MB) for n in range(3)]
    rtts = {(node_id(0), node_id(1)): 80.0, (node_id(0), node_id(2)): 80.0, (node_id(1), node_id(2)): 2.0}
    assert {m.id for m in layout_of(*nodes, rtts=rtts).ring} == {node_id(1), node_id(2)}


def test_the_ring_is_short() -> None:
    """Four machines on a line must be visited there and back, not in zigzag."""
    model = a_model(n_layers=7, layer_bytes=(100 * MB,) * 7, kv_bytes_per_token=(0,) * 7, size_bytes=800 * MB)
    nodes = [a_node(n, HOST + 150 * MB, models=(model,)) for n in range(4)]
    rtts = {(node_id(a), node_id(b)): 10.0 * abs(a - b) for a in range(4) for b in range(4) if a != b}
    layout = layout_of(*nodes, rtts=rtts, model=model)
    assert len(layout.ring) == 4
    assert ring_ms([m.id for m in layout.ring], rtts) == pytest.approx(30 + 3 * MEMBER_MS)


def test_layers_go_to_the_fastest_first() -> None:
    slow, fast = a_node(1, HOST + 700 * MB, speed=1e9), a_node(2, HOST + 600 * MB, speed=50e9)
    layout = layout_of(slow, fast)
    shares = {m.id: m.layers[1] - m.layers[0] + 1 if m.layers else 0 for m in layout.ring}
    assert shares[fast.id] >= 6


def test_equally_fast_machines_share_the_load() -> None:
    layout = layout_of(a_node(1, HOST + 700 * MB), a_node(2, HOST + 700 * MB))
    assert all(m.layers is not None and 3 <= m.layers[1] - m.layers[0] + 1 <= 5 for m in layout.ring)


def test_the_host_has_the_first_layers_and_comes_first() -> None:
    layout = layout_of(a_node(1, HOST + 500 * MB), a_node(2, HOST + 500 * MB))
    assert layout.ring[0].id == layout.host
    assert layout.ring[0].layers is not None and layout.ring[0].layers[0] == 0


def test_a_host_with_room_for_the_ends_only_carries_no_layer() -> None:
    layout = layout_of(a_node(1, HOST + 50 * MB, speed=1e9), a_node(2, WORKER + 800 * MB, speed=1e9))
    assert (layout.host, layout.ring[0].layers) == (node_id(1), None)
    assert layout.ring[1].layers == (0, 7)


def test_bytes_are_weights_buffers_cache_and_conversations_kept() -> None:
    model = a_model(kv_bytes_per_token=(1000,) * 8)
    layout = layout_of(a_node(1, models=(model,)), model=model)
    costs = Costs(model, layout.ctx_size, layout.parallel)
    needs = costs.fixed(host=True) + 8 * (100 * MB + 1000 * DEFAULT_CTX * DEFAULT_PARALLEL)
    assert layout.ring[0].bytes == needs + layout.prompt_cache_bytes


# -- wishes --------------------------------------------------------------------------------------------------------


def test_split_always_uses_everyone_a_layer_or_more_each() -> None:
    layout = layout_of(a_node(1, split="always"), a_node(2), a_node(3))
    assert (layout.mode, len(layout.ring)) == ("split", 3)
    assert all(m.layers is not None for m in layout.ring)
    assert carried(layout) == list(range(8))


def test_split_always_gives_more_to_the_faster() -> None:
    layout = layout_of(a_node(1, split="always", speed=30e9), a_node(2, speed=10e9))
    shares = {m.id: m.layers[1] - m.layers[0] + 1 for m in layout.ring if m.layers}
    assert shares == {node_id(1): 6, node_id(2): 2}


def test_split_always_alone_serves_alone_and_says_so() -> None:
    result = planned(a_node(1, split="always"), a_node(2, 10 * MB))
    assert result.layout is not None and result.layout.mode == "solo"
    assert "no second machine" in result.reason
    assert "one layer" in result.excluded[node_id(2)]


def test_split_never_would_rather_not_serve() -> None:
    result = planned(a_node(1, HOST + 500 * MB, split="never"), a_node(2, HOST + 500 * MB))
    assert result.layout is None
    assert "300 MB" in result.reason and "node1" in result.reason


def test_contradicting_wishes_cancel_and_are_named() -> None:
    result = planned(a_node(1, split="never"), a_node(2, split="always"))
    assert result.layout is not None and result.layout.mode == "solo"
    assert "contradict" in result.reason


def test_the_largest_wish_for_context_and_slots_wins() -> None:
    layout = layout_of(a_node(1, ctx_size=2048, parallel=1), a_node(2, ctx_size=6000, parallel=4))
    assert (layout.ctx_size, layout.parallel) == (6000, 4)


def test_a_context_beyond_the_models_is_capped_aloud() -> None:
    result = planned(a_node(1, ctx_size=100_000))
    assert result.layout is not None and result.layout.ctx_size == 8192
    assert "100000" in result.reason


def test_a_short_model_has_a_short_context() -> None:
    model = a_model(n_ctx_train=512)
    assert layout_of(a_node(1, models=(model,)), model=model).ctx_size == 512


# -- who is left out, and why --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"role": "client"}, "lite client"),
        ({"draining": True}, "about to leave"),
        ({"engine": ""}, "mesh engine build"),
        ({"engine": "another-pin"}, "runs engine another-, this mesh runs pin"),
        ({"models": ()}, "no copy of model"),
        ({"devices": ()}, "no device"),
        ({"devices": (cpu(1 * MB),)}, "one layer of model"),
        ({"budget_bytes": 2 * MB}, "may use 2 MB on CPU"),
        ({"devices": (Device("CUDA0", "cuda", "", 80 * GB, 80 * GB),)}, "no device that its engine (cpu)"),
    ],
)
def test_who_cannot_carry_is_told_why(changes: dict[str, Any], said: str) -> None:
    result = planned(a_node(1), a_node(2), a_node(3, **changes))
    assert said in result.excluded[node_id(3)]
    assert result.layout is not None and node_id(3) not in {m.id for m in result.layout.ring}


def test_the_running_hosts_engine_decides_who_must_update() -> None:
    old = a_node(1, engine="old")
    current = layout_of(old)
    result = planned(old, a_node(2, engine="new"), a_node(3, engine="new"), current=current)
    assert result.layout is not None and result.layout.host == node_id(1)
    assert set(result.excluded) == {node_id(2), node_id(3)}


def test_every_member_is_in_the_ring_or_told_why_not() -> None:
    nodes = [a_node(0), a_node(1, 1 * MB), a_node(2, role="client"), a_node(3, models=()), a_node(4)]
    result = planned(*nodes)
    assert result.layout is not None
    assert {m.id for m in result.layout.ring} | set(result.excluded) == {n.id for n in nodes}


def test_what_is_missing_is_said_with_the_device() -> None:
    result = planned(a_node(1, HOST + 200 * MB), a_node(2, WORKER + 300 * MB))
    assert result.layout is None
    assert "300 MB is missing" in result.reason
    assert "node1 CPU" in result.reason and "node2 CPU" in result.reason
    assert "--ctx-size" in result.reason


def test_a_layer_too_large_for_any_machine_is_not_called_missing_memory() -> None:
    model = a_model(layer_bytes=(450 * MB, 450 * MB), n_layers=2, kv_bytes_per_token=(0, 0), size_bytes=1000 * MB)
    nodes = [a_node(n, WORKER + 440 * MB, models=(model,)) for n in range(3)]
    result = planned(*nodes, model=model)
    assert result.layout is None and "whole layers of up to 450 MB" in result.reason


def test_a_mesh_of_clients_serves_nothing() -> None:
    result = planned(a_node(1, role="client"))
    assert result.layout is None and "no machine can serve" in result.reason


def test_facts_that_contradict_each_other_plan_nothing() -> None:
    result = planned(a_node(1), model=a_model(layer_bytes=(1, 2)))
    assert result.layout is None and "contradict" in result.reason


def test_a_gpu_is_used_when_the_engine_can() -> None:
    gpu = Device("CUDA0", "cuda", "", 24 * GB, 24 * GB)
    layout = layout_of(a_node(1, backend="cuda", devices=(cpu(64 * GB), gpu)))
    assert layout.ring[0].device == "CUDA0"


def test_a_gpu_too_small_does_not_hide_main_memory() -> None:
    gpu = Device("CUDA0", "cuda", "", 1 * GB, 1 * GB)
    assert layout_of(a_node(1, backend="cuda", devices=(cpu(64 * GB), gpu))).ring[0].device == "CPU"


def test_a_budget_binds_before_free_memory_does() -> None:
    node = a_node(1, 100 * GB, budget_bytes=500 * MB)
    assert usable_bytes(node, node.devices[0]) == 500 * MB
    assert planned(node).layout is None


def test_a_twentieth_of_main_memory_stays_free() -> None:
    device = Device("CPU", "cpu", "", 8 * GB, 6 * GB)
    assert usable_bytes(a_node(1), device) == 6 * GB - 400 * MB


# -- speed ----------------------------------------------------------------------------------------------------------


def test_a_ring_serves_where_it_is_faster_than_the_only_machine_that_holds_the_model() -> None:
    """A large slow machine, and a fast one with room for most of the model."""
    large, fast = a_node(1, speed=2e9), a_node(2, WORKER + 700 * MB, speed=60e9)
    result = planned(large, fast)
    assert result.layout is not None and len(result.layout.ring) == 2
    assert "one machine alone would take" in result.reason


def test_a_slow_machine_that_is_in_the_way_is_left_out_and_told_by_how_much() -> None:
    fast = [a_node(n, HOST + 450 * MB, speed=20e9) for n in (1, 2)]
    result = planned(*fast, a_node(3, speed=0.2e9), rtts=1.0)
    assert result.layout is not None
    assert {m.id for m in result.layout.ring} == {node_id(1), node_id(2)}
    assert "would slow this mesh" in result.excluded[node_id(3)]
    assert "ms/token with it" in result.excluded[node_id(3)]


def test_the_time_of_experts_is_that_of_those_in_use() -> None:
    dense, sparse = a_model(), a_model(read_bytes=(10 * MB,) * 8)
    slow = layout_of(a_node(1, speed=10e9)).predicted_ms_per_token
    quick = layout_of(a_node(1, speed=10e9, models=(sparse,)), model=sparse).predicted_ms_per_token
    assert slow - quick == pytest.approx(8 * 9, abs=0.01)
    assert dense.layer_bytes == sparse.layer_bytes


def test_a_thin_link_is_avoided() -> None:
    model = a_model(n_embd=8192, n_ff=16384)
    nodes = [a_node(n, Costs(model, DEFAULT_CTX, DEFAULT_PARALLEL).fixed(host=True) + 450 * MB, models=(model,))
             for n in range(3)]  # fmt: skip
    rtts = {(a.id, b.id): 10.0 for a, b in itertools.combinations(nodes, 2)}
    rates = dict.fromkeys(rtts, 10e6)
    rates[node_id(0), node_id(1)] = rates[node_id(0), node_id(2)] = 1e6
    result = plan(nodes, model, rtt_ms=rtts, current=None, rates=rates)
    assert result.layout is not None and result.parts is not None
    assert {m.id for m in result.layout.ring} == {node_id(1), node_id(2)}
    assert result.parts.bytes == pytest.approx(2 * 8192 * 4 / 10e6 * 1000)


def test_the_parts_of_the_time_are_the_time() -> None:
    result = planned(a_node(1, HOST + 500 * MB), a_node(2, WORKER + 400 * MB), rtts=8.0)
    assert result.layout is not None and result.parts is not None
    assert result.parts.hops == 8.0
    assert result.parts.total == pytest.approx(result.layout.predicted_ms_per_token, abs=0.01)


def test_a_machine_on_battery_carries_only_what_the_others_cannot() -> None:
    nodes = [a_node(1, HOST + 450 * MB), a_node(2, HOST + 450 * MB), a_node(3, speed=90e9, battery=True)]
    result = planned(*nodes)
    assert result.layout is not None and {m.id for m in result.layout.ring} == {node_id(1), node_id(2)}
    assert "runs on battery" in result.excluded[node_id(3)]
    assert layout_of(nodes[0], nodes[2]).host == node_id(3)


# -- change --------------------------------------------------------------------------------------------------------


def test_a_running_layout_stays_for_less_than_a_tenth() -> None:
    current = layout_of(a_node(1, speed=10e9))
    result = planned(a_node(1, speed=10e9), a_node(2, speed=10.5e9), current=current)
    assert result.layout is not None and result.layout.shape() == current.shape()
    assert "kept" in result.reason


def test_a_clear_gain_moves_the_host() -> None:
    current = layout_of(a_node(1, speed=10e9))
    assert layout_of(a_node(1, speed=10e9), a_node(2, speed=20e9), current=current).host == node_id(2)


def test_a_layout_whose_member_died_is_replaced() -> None:
    nodes = [a_node(n, HOST + 450 * MB) for n in range(3)]
    current = layout_of(*nodes)
    left = [n for n in nodes if n.id != current.ring[1].id]
    layout = layout_of(*left, current=current)
    assert {m.id for m in layout.ring} == {n.id for n in left}


def test_a_layout_that_no_longer_fits_is_replaced() -> None:
    current = layout_of(a_node(1), a_node(2, 9 * GB))
    assert current.host == node_id(1)
    assert layout_of(a_node(1, 100 * MB), a_node(2, 9 * GB), current=current).host == node_id(2)


def test_another_context_is_another_layout() -> None:
    current = layout_of(a_node(1))
    assert layout_of(a_node(1, ctx_size=8192), current=current).ctx_size == 8192


def test_split_always_takes_a_newcomer_in() -> None:
    current = layout_of(a_node(1, split="always"), a_node(2))
    assert len(layout_of(a_node(1, split="always"), a_node(2), a_node(3), current=current).ring) == 3


# -- properties ----------------------------------------------------------------------------------------------------

layer_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)
node_specs = st.lists(
    st.tuples(st.integers(0, 120), st.sampled_from([1e9, 5e9, 10e9]), st.sampled_from([0, 40, 80])),
    min_size=1,
    max_size=5,
)


def instance(
    sizes: list[int], specs: list[tuple[int, float, int]], split: str, seed: int
) -> tuple[Any, ModelCost, Rtts]:
    model = a_model(
        n_layers=len(sizes), layer_bytes=tuple(s * 10 * MB for s in sizes), kv_bytes_per_token=(100,) * len(sizes)
    )
    base = Costs(model, DEFAULT_CTX, DEFAULT_PARALLEL).fixed(host=True)
    nodes = [
        a_node(n, base + free * 10 * MB, speed=speed, budget_bytes=base + cap * 10 * MB if cap else 0, models=(model,),
               split=split)
        for n, (free, speed, cap) in enumerate(specs)
    ]  # fmt: skip
    draw = random.Random(seed)
    rtts = {(a.id, b.id): draw.uniform(0.2, 80) for a, b in itertools.combinations(nodes, 2)}
    return nodes, model, rtts


splits = st.sampled_from(["auto", "always", "never"])


# Whatever the memory, the speeds, the links and the layers: every layer is carried once and nobody beyond its budget.
@given(layer_sizes, node_specs, splits, st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_every_layer_once_and_never_over_budget(
    sizes: list[int], specs: list[tuple[int, float, int]], split: str, seed: int
) -> None:
    nodes, model, rtts = instance(sizes, specs, split, seed)
    result = plan(nodes, model, rtt_ms=rtts, current=None)
    if result.layout is None:
        assert result.reason
        return
    layout = result.layout
    assert carried(layout) == list(range(len(sizes)))
    by_id = {n.id: n for n in nodes}
    costs = Costs(model, layout.ctx_size, layout.parallel)
    for index, member in enumerate(layout.ring):
        node = by_id[member.id]
        assert member.bytes <= usable_bytes(node, node.devices[0])
        first, end = (0, 0) if member.layers is None else (member.layers[0], member.layers[1] + 1)
        kept = layout.prompt_cache_share(member.layers)
        assert member.bytes == costs.fixed(host=index == 0) + costs.layers(first, end) + kept
    assert layout.ring[0].id == layout.host
    assert len({m.id for m in layout.ring}) == len(layout.ring)
    assert (layout.mode == "solo") == (len(layout.ring) == 1)
    assert all(m.layers is not None for m in layout.workers)


# All nodes compute the same layout, in whatever order they know the members.
@given(layer_sizes, node_specs, splits, st.integers(0, 99), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_the_order_of_members_does_not_matter(
    sizes: list[int], specs: list[tuple[int, float, int]], split: str, seed: int, shuffler: random.Random
) -> None:
    nodes, model, rtts = instance(sizes, specs, split, seed)
    shuffled = list(nodes)
    shuffler.shuffle(shuffled)
    turned = {(b, a): ms for (a, b), ms in rtts.items()}
    assert plan(nodes, model, rtt_ms=rtts, current=None) == plan(shuffled, model, rtt_ms=turned, current=None)


# More memory anywhere never makes a served model unserved, nor a token slower.
@given(layer_sizes, node_specs, st.integers(0, 99), st.integers(0, 4), st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_more_memory_never_hurts(
    sizes: list[int], specs: list[tuple[int, float, int]], seed: int, which: int, more: int
) -> None:
    which %= len(specs)
    specs = [(free, speed, 0) for free, speed, _ in specs]
    richer = [(free + more if i == which else free, speed, 0) for i, (free, speed, _) in enumerate(specs)]
    before = plan(
        *instance(sizes, specs, "auto", seed)[:2], rtt_ms=instance(sizes, specs, "auto", seed)[2], current=None
    )
    nodes, model, rtts = instance(sizes, richer, "auto", seed)
    after = plan(nodes, model, rtt_ms=rtts, current=None)
    if before.layout is None:
        return
    assert after.layout is not None
    # The even load of equals may cost a twentieth of a millisecond, and one machine alone a fiftieth of the time.
    assert after.layout.predicted_ms_per_token <= before.layout.predicted_ms_per_token / SIMPLER + 0.06


# A machine more, however slow or far, never makes the mesh slower, by more than the fiftieth that one machine is worth.
@given(layer_sizes, node_specs, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_machine_more_never_makes_it_slower(sizes: list[int], specs: list[tuple[int, float, int]], seed: int) -> None:
    nodes, model, rtts = instance(sizes, specs, "auto", seed)
    before = plan(nodes[:-1], model, rtt_ms=rtts, current=None)
    after = plan(nodes, model, rtt_ms=rtts, current=None)
    if before.layout is not None:
        assert after.layout is not None
        assert after.layout.predicted_ms_per_token <= 1.03 * before.layout.predicted_ms_per_token + 0.06


# A plan computed again from its own result is that result: nothing restarts for nothing.
@given(layer_sizes, node_specs, splits, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_plan_is_stable(sizes: list[int], specs: list[tuple[int, float, int]], split: str, seed: int) -> None:
    nodes, model, rtts = instance(sizes, specs, split, seed)
    first = plan(nodes, model, rtt_ms=rtts, current=None)
    again = plan(nodes, model, rtt_ms=rtts, current=first.layout)
    assert again.layout == first.layout


# Of all subsets, orders and divisions that fit, none is faster than the plan.
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5), node_specs.filter(lambda s: len(s) <= 3), st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_small_meshes_are_planned_exactly(sizes: list[int], specs: list[tuple[int, float, int]], seed: int) -> None:
    nodes, model, rtts = instance(sizes, specs, "auto", seed)
    result = plan(nodes, model, rtt_ms=rtts, current=None)
    costs = Costs(model, DEFAULT_CTX, DEFAULT_PARALLEL)
    fastest = None
    for k in range(1, len(nodes) + 1):
        for order in itertools.permutations(nodes, k):
            for cuts in itertools.combinations_with_replacement(range(len(sizes) + 1), k - 1):
                ranges = list(itertools.pairwise([0, *cuts, len(sizes)]))
                if any(a == b for a, b in ranges[1:]):
                    continue
                seats = [seats_of(n, model)[0] for n in order]
                if any(
                    costs.fixed(host=i == 0) + costs.layers(*r) > s.usable
                    for i, (s, r) in enumerate(zip(seats, ranges, strict=True))
                ):
                    continue
                ms = sum(
                    compute_ms(costs, *r, s.pace, host=i == 0)
                    for i, (s, r) in enumerate(zip(seats, ranges, strict=True))
                ) + ring_ms([n.id for n in order], rtts)
                fastest = ms if fastest is None else min(ms, fastest)
    if result.layout is None:
        assert fastest is None
    else:
        # One machine alone is taken unless a ring is faster by a fiftieth.
        assert fastest is not None and result.layout.predicted_ms_per_token <= fastest / SIMPLER + 0.06


def test_the_shortest_ring_is_the_shortest_of_all_orders() -> None:
    draw = random.Random(5)
    ids = [node_id(n) for n in range(6)]
    rtts = {pair: draw.uniform(1, 100) for pair in itertools.combinations(ids, 2)}
    best = shortest_rings(ids[0], ids[1:], rtts)
    for size in range(1, 6):
        for subset in itertools.combinations(ids[1:], size):
            shortest = min(ring_ms((ids[0], *order), rtts) for order in itertools.permutations(subset))
            assert ring_ms((ids[0], *best[frozenset(subset)]), rtts) == pytest.approx(shortest)


def a_gpu(n: int, gpu_layers: int | None, usable: int = 10 * GB) -> NodeFacts:
    device = Device("CUDA0", "cuda", "a GPU", 0, usable + GPU_HEADROOM, 1e12)
    return a_node(n, backend="cuda", devices=(device,), gpu_layers=gpu_layers)


@given(st.lists(st.none() | st.integers(1, 8), min_size=1, max_size=3), st.booleans())
def test_a_worker_takes_no_more_layers_on_its_gpu_than_its_owner_lets_it(
    bounds: list[int | None], spread: bool
) -> None:
    seats = [seats_of(node, MODEL)[0] for node in (a_node(9, HOST + 250 * MB), *map(a_gpu, range(3), bounds))]
    ranges = divide(seats, COSTS, spread=spread)
    most = 2 + sum(8 if bound is None else bound for bound in bounds)
    enough = most >= 8 and len(bounds) + spread <= 8
    assert (ranges is not None) == enough
    for (first, end), bound in zip(ranges[1:] if ranges else (), bounds, strict=False):
        assert bound is None or end - first <= bound


def test_a_bound_on_layers_is_no_bound_for_a_processor_or_a_host() -> None:
    assert seats_of(a_node(1, gpu_layers=2), MODEL)[0].most_layers is None
    assert layout_of(a_gpu(1, 2)).ring[0].layers == (0, 7)


def test_divide_refuses_what_does_not_fit() -> None:
    seats = [seats_of(a_node(n, HOST + 300 * MB), MODEL)[0] for n in range(2)]
    assert divide(seats, COSTS, spread=False) is None


@pytest.mark.parametrize("n", [8, 32])
def test_a_large_mesh_is_planned_in_a_moment(n: int) -> None:
    model = a_model(n_layers=80, layer_bytes=(100 * MB,) * 80, kv_bytes_per_token=(0,) * 80, size_bytes=8100 * MB)
    draw = random.Random(1)
    nodes = [
        a_node(i, HOST + draw.randrange(1000, 3000) * MB, speed=draw.uniform(5e9, 60e9), models=(model,))
        for i in range(n)
    ]
    rtts = {(a.id, b.id): draw.uniform(1, 60) for a, b in itertools.combinations(nodes, 2)}
    start = time.monotonic()
    result = plan(nodes, model, rtt_ms=rtts, current=None)
    taken = time.monotonic() - start
    assert result.layout is not None and carried(result.layout) == list(range(80))
    assert taken < 5
