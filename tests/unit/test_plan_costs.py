"""Memory needs against what the engine itself printed, and time by the formula."""

from __future__ import annotations

import pytest

from mesh.plan.costs import Costs, sound
from mesh.plan.pace import MEMBER_MS, UNKNOWN_RTT_MS, Pace, compute_ms, host_ms, rtt
from mesh.plan.ring import ring_ms
from tests.unit.test_plan_search import a_model, node_id

MIB = 1 << 20
TINY = a_model(kv_bytes_per_token=(64,) * 8, n_embd=64, n_ff=256, n_vocab=32000)
DEMO = a_model(kv_bytes_per_token=(64,) * 8, n_embd=256, n_ff=1024, n_vocab=32000)
MID = a_model(kv_bytes_per_token=(64,) * 8, n_embd=1024, n_ff=2816, n_vocab=32000)


# "compute buffer size" as printed by llama-server, MiB: (model, tokens of a slot, host's, worker's).
@pytest.mark.parametrize(
    ("model", "ctx", "embeddings", "host", "worker"),
    [
        (DEMO, 2048, False, 10.01, 9.01),
        (DEMO, 4096, False, 12.01, 11.01),
        (DEMO, 8192, False, 16.01, None),
        (DEMO, 667, False, 8.78, None),
        (MID, 2048, False, 26.51, 22.51),
        (MID, 4096, False, 28.51, 24.51),
        (MID, 8192, False, 32.51, None),
        (TINY, 4096, False, 6.01, None),
        (DEMO, 4096, True, 67.02, None),
        (DEMO, 1024, True, 64.02, None),
        (MID, 4096, True, 68.52, None),
        (MID, 1024, True, 65.52 + 4, None),
    ],
)
def test_compute_buffers_are_what_the_engine_allocates(
    model: object, ctx: int, embeddings: bool, host: float, worker: float | None
) -> None:
    assert isinstance(model, type(DEMO))
    costs = Costs(model, ctx, 1)
    if embeddings:
        # One figure (four slots of the mid model) is 4 MiB above the formula.
        assert host - 4.1 <= costs.buffer(0, 8, host=True) / MIB <= host + 0.1
    else:
        # Without /v1/embeddings the logits of a whole batch are not there.
        rows = 512 * (4 * (4 * model.n_embd + 3 * model.n_ff) + 2 * costs.context)
        assert rows / MIB == pytest.approx(host, abs=0.1)
        assert costs.host_buffer >= rows
    if worker is not None:
        # Between some layers another residual lies in a gap.
        assert worker - 0.1 <= costs.worker_buffer / MIB <= worker + 512 * 4 * model.n_embd / MIB + 0.1


def test_cache_is_reserved_in_steps_for_every_slot() -> None:
    costs = Costs(a_model(kv_bytes_per_token=(10,) * 8, layer_bytes=(1,) * 8), 667, 3)
    assert costs.layers(0, 8) == 8 * (1 + 10 * 768 * 3)
    assert costs.layers(2, 4) == 2 * (1 + 10 * 768 * 3)


def test_a_tied_embedding_is_in_main_memory_once_and_on_a_gpu_twice() -> None:
    untied = Costs(a_model(size_bytes=900_000_000), 512, 1)
    tied = Costs(a_model(size_bytes=850_000_000), 512, 1)
    assert untied.fixed(host=True) - tied.fixed(host=True) == 50_000_000
    assert untied.fixed(host=True, device="cuda") == tied.fixed(host=True, device="cuda")


def test_time_is_weights_by_speed_and_the_host_reads_the_output_too() -> None:
    costs = Costs(a_model(), 512, 1)
    assert compute_ms(costs, 0, 8, Pace(10e9), host=True) == pytest.approx(85 + host_ms(costs))
    assert compute_ms(costs, 0, 8, Pace(10e9), host=False) == pytest.approx(80)
    assert compute_ms(costs, 0, 8, Pace(10e9, layer_ms=0.5), host=False) == pytest.approx(84)


def test_a_ring_costs_its_hops_and_its_members() -> None:
    a, b, c = (node_id(n) for n in range(3))
    rtts = {(a, b): 10.0, (b, c): 20.0, (a, c): 30.0}
    assert ring_ms([a], rtts) == 0
    assert ring_ms([a, b], rtts) == 10 + MEMBER_MS
    assert ring_ms([a, b, c], rtts) == 30 + 2 * MEMBER_MS


def test_a_link_counts_in_either_direction_and_an_unknown_one_is_slow() -> None:
    a, b = node_id(1), node_id(2)
    assert rtt({(b, a): 3.0}, a, b) == 3.0
    assert rtt({(b, a): 3.0, (a, b): 5.0}, a, b) == rtt({(b, a): 3.0, (a, b): 5.0}, b, a) == 5.0
    assert rtt({}, a, b) == UNKNOWN_RTT_MS


def test_facts_must_agree_with_each_other() -> None:
    assert sound(a_model())
    assert not sound(a_model(n_layers=9))
    assert not sound(a_model(kv_bytes_per_token=(0,) * 7))
