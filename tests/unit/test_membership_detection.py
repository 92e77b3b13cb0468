"""How fast, and how surely, a mesh of detectors notices: the figures of docs/invariants.md, in virtual time."""

from __future__ import annotations

import pytest

from tests.sim.detectors import Detectors, false_verdicts, verdicts


@pytest.mark.parametrize(("one_way_ms", "p50", "p99"), [(0.1, 1.5, 3.0), (10, 1.5, 3.0), (150, 2.5, 3.0)])
def test_a_crash_is_noticed_within_the_promised_time(one_way_ms: float, p50: float, p99: float) -> None:
    took = sorted(t for seed in range(40) for t in verdicts(5, seed, one_way_ms / 1000, one_way_ms / 5000))
    assert len(took) == 40 * 4
    assert took[len(took) // 2] <= p50
    assert took[int(len(took) * 0.99)] <= p99


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("one_way_ms", [0.1, 10, 150])
def test_a_stall_of_one_second_evicts_nobody(n: int, one_way_ms: float) -> None:
    for seed in range(15):
        mesh = Detectors(n, seed, one_way_ms / 1000, one_way_ms / 5000)
        mesh.connect()
        mesh.run(3.0 + mesh.rng.random())
        mesh.sleep(mesh.rng.choice(sorted(mesh.nodes)), 1.0)
        mesh.run(mesh.now + 6.0)
        assert mesh.lost == []


@pytest.mark.parametrize("seconds", [3.0, 10.0])
def test_a_long_stall_evicts_the_sleeper_alone_and_for_its_own_time_only(seconds: float) -> None:
    for seed in range(5):
        mesh = Detectors(5, seed, 0.001)
        mesh.connect()
        mesh.run(3.0)
        sleeper = mesh.rng.choice(sorted(mesh.nodes))
        mesh.sleep(sleeper, seconds)
        mesh.run(mesh.now + 3.0)
        assert {who for _, _, who in mesh.lost} == {sleeper}
        assert all(len(core.view().members) == 5 for core in mesh.nodes.values())


def test_loss_and_jitter_evict_nobody() -> None:
    """``bin/sim --evictions --hours 2000`` is the long run of this."""
    assert false_verdicts(1, 0.5, 5, 0.02, jitter=0.2, loss=0.05) == (2.5, 0)
