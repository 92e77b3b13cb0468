"""Hundreds of lives of meshes, and proof that the simulation would notice if the cores were wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from mesh.election.core import Election
from mesh.wire.facts import Epoch, NodeId
from tests.sim.world import InvariantError, run_seed

SEEDS = 300
CHUNK = 25


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_every_seed_keeps_the_invariants_and_converges(start: int) -> None:
    for seed in range(start, start + CHUNK):
        try:
            run_seed(seed)
        except Exception as error:
            raise AssertionError(f"replay with: bin/sim --start {seed} --seeds 1 --trace") from error


def test_a_seed_replays_exactly_also_in_another_process() -> None:
    story: list[str] = []
    run_seed(11, story=story)
    program = "from tests.sim.world import run_seed; story = []; run_seed(11, story=story); print(chr(10).join(story))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert again.stdout.splitlines() == story


class FollowsOlder(Election):
    """Planted: any other epoch will do, be it older."""

    def _is_newer(self, epoch: Epoch) -> bool:
        return epoch != self.epoch


class CarriesForAnyone(Election):
    """Planted: no fencing at the tunnel."""

    def may_carry(self, peer: NodeId, epoch: Epoch) -> bool:
        return True


class ForgetsItsEpoch(Election):
    """Planted: begins anew at every start."""

    def __init__(self, me: NodeId, *, seen: int = 0, jitter: float = 0.5) -> None:
        super().__init__(me, jitter=jitter)


@pytest.mark.parametrize("planted", [FollowsOlder, CarriesForAnyone, ForgetsItsEpoch])
def test_a_planted_bug_is_caught(planted: Callable[..., Election]) -> None:
    for seed in range(150):
        try:
            run_seed(seed, planted)
        except InvariantError:
            return
    pytest.fail(f"{planted.__name__} lived through 150 seeds")
