"""How far a member is over the lane that bulk takes, whatever else its machine does, and when others are told."""

from __future__ import annotations

import pytest

from mesh.config import Settings
from mesh.membership.bulk import Trial
from mesh.node.facts import LINKS_EVERY_S, LINKS_SOON_S, OwnFacts
from mesh.transport.choice import Measured
from mesh.wire.facts import LinkFact
from tests.fakes.clock import FakeClock
from tests.unit.test_plan_search import node_id

NEAR = Trial(Measured(0.2, 0.6, bytes_per_second=1e8), acknowledged_ms=0.9)
FAR = Trial(Measured(40.0, 81.0, 43.0, 4e6, 41.0, 5e6), acknowledged_ms=40.5)


def test_a_lane_is_as_long_as_its_trial_found_while_acknowledgements_stay() -> None:
    assert NEAR.over("tcp", 1.4) == (0.2, 1e8)
    assert FAR.over("quic", 41.5) == (41.0, 5e6)


def test_a_path_that_grew_since_is_as_much_longer() -> None:
    assert NEAR.over("tcp", 20.9)[0] == pytest.approx(20.2)


def test_a_trial_that_met_a_busy_machine_is_not_believed() -> None:
    busy = Trial(Measured(65.0, 90.0, bytes_per_second=1e6), acknowledged_ms=60.0)
    assert busy.over("tcp", 0.8)[0] == 0.8


def own(clock: FakeClock) -> OwnFacts:
    return OwnFacts(Settings(name="kitchen"), node_id(1), None, (), None, clock)


def test_a_new_member_is_told_of_soon_and_a_round_trip_that_wanders_is_not() -> None:
    clock = FakeClock()
    facts = own(clock)
    assert facts.linked((LinkFact(node_id(2), 1.0),))
    assert facts.facts(()).links == (LinkFact(node_id(2), 1.0),)
    assert not facts.linked((LinkFact(node_id(2), 1.5),))
    assert not facts.linked((LinkFact(node_id(2), 1.0), LinkFact(node_id(3), 2.0)))
    clock.advance(LINKS_SOON_S)
    assert facts.linked((LinkFact(node_id(2), 1.0), LinkFact(node_id(3), 2.0)))


def test_what_has_changed_much_is_told_but_rarely() -> None:
    clock = FakeClock()
    facts = own(clock)
    facts.linked((LinkFact(node_id(2), 40.0),))
    clock.advance(LINKS_EVERY_S / 2)
    assert not facts.linked((LinkFact(node_id(2), 80.0),))
    clock.advance(LINKS_EVERY_S)
    assert not facts.linked((LinkFact(node_id(2), 45.0),))
    assert facts.linked((LinkFact(node_id(2), 80.0),))


def test_a_crowd_of_links_is_told_within_bounds() -> None:
    clock = FakeClock()
    facts = own(clock)
    facts.linked(tuple(LinkFact(node_id(n), 1.0) for n in range(100)))
    assert len(facts.facts(()).links) == 64
