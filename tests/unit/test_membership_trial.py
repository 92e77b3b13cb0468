"""What a trial of a link says of a token's way over it."""

from __future__ import annotations

import pytest

from mesh.membership.bulk import Trial
from mesh.transport.choice import Measured


@pytest.mark.parametrize(
    ("recent_ms", "expected_ms"),
    [
        (8.0, 10.5),  # as it was: the shortest, and what a usual one takes more
        (7.0, 9.5),  # the trial met a busy machine
        (48.0, 50.5),  # the way is another one now
    ],
)
def test_a_token_takes_as_long_as_a_usual_round_trip_and_not_as_the_shortest(
    recent_ms: float, expected_ms: float
) -> None:
    """On wifi two machines were predicted a fifth faster than they were."""
    trial = Trial(Measured(8.0, 12.0, bytes_per_second=9e6, jitter_ms=2.5), acknowledged_ms=8.0)
    assert trial.over("tcp", recent_ms) == (expected_ms, 9e6)
