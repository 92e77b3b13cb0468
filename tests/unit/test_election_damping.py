"""Patience with what fails again and again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.election.damping import Agenda, Backoff, HoldOffs, StandIn
from mesh.wire.messages import HeldOff
from tests.sim.fakes import node_id

A = node_id(0)


def failed(times: int, jitter: float = 0.0) -> Backoff:
    backoff = Backoff(jitter)
    for _ in range(times):
        backoff.failed("ring", "segfault")
    return backoff


def test_the_first_retry_is_at_once_then_they_double_up_to_a_cap() -> None:
    assert [failed(n).delay("ring") for n in (0, 1, 2, 3, 4, 20, 5000)] == [0.0, 0.0, 0.5, 1.0, 2.0, 30.0, 30.0]


# Jitter only ever shortens the wait, by half at most.
@given(st.integers(2, 100), st.floats(0, 1))
def test_jitter_spreads_the_wait(times: int, jitter: float) -> None:
    full = failed(times).delay("ring")
    assert full / 2 <= failed(times, jitter).delay("ring") <= full


def test_five_failures_exhaust_a_layout_and_no_other() -> None:
    assert not failed(4).is_exhausted("ring")
    assert failed(5).is_exhausted("ring")
    assert not failed(5).is_exhausted("another")


def test_the_story_of_a_failure_names_the_last_one() -> None:
    assert failed(5).story("ring") == "the same layout failed 5 times; the last time: segfault"


def test_three_strikes_hold_a_node_off_longer_each_time() -> None:
    holds = HoldOffs()
    for at in (0.0, 1.0):
        holds.strike(A, "fell over", at)
    assert holds.held(1.0) == {}
    holds.strike(A, "fell over", 2.0)
    assert "fell over" in holds.held(2.0)[A]
    assert holds.next_end(2.0) == 17.0
    assert holds.held(17.0) == {}
    holds.strike(A, "fell over", 18.0)
    assert holds.next_end(18.0) == 48.0


def test_strikes_long_ago_are_forgotten() -> None:
    holds = HoldOffs()
    for at in (0.0, 1.0, 2.0, 500.0):
        holds.strike(A, "fell over", at)
    assert holds.held(500.0) == {}


def test_a_hold_off_goes_on_with_another_coordinator_and_never_grows_by_being_told() -> None:
    one, other = HoldOffs(), HoldOffs()
    for at in (0.0, 1.0, 2.0):
        one.strike(A, "fell over", at)
    for at in (3.0, 4.0, 5.0):
        other.hear(one.told(at), at)
        one.hear(other.told(at), at)
    assert other.next_end(5.0) == one.next_end(5.0) == 17.0
    assert one.told(17.0) == other.told(17.0) == {}


def test_a_member_cannot_have_another_held_off_for_ever() -> None:
    holds = HoldOffs()
    holds.hear({A: HeldOff(600.0, "I say so")}, 0.0)
    assert holds.next_end(0.0) == 300.0


def test_a_shorter_hold_off_does_not_cut_a_longer_one() -> None:
    holds = HoldOffs()
    holds.hold(A, "long", 100.0)
    holds.hold(A, "short", 10.0)
    assert holds.held(50.0) == {A: "long"}


def test_changes_push_the_look_back_up_to_a_limit() -> None:
    agenda = Agenda(0.7, 2.5)
    moments = []
    for tenth in range(0, 40, 5):
        agenda.settle(tenth / 10)
        moments.append(agenda.at)
    assert moments == [0.7, 1.2, 1.7, 2.2, 2.5, 2.5, 2.5, 2.5]


def test_what_is_urgent_is_not_pushed_back_by_joins() -> None:
    agenda = Agenda(0.7, 2.5)
    agenda.soon(0.1)
    agenda.settle(0.0)
    assert agenda.at == 0.1


def test_joins_that_settle_are_overtaken_by_what_is_urgent() -> None:
    agenda = Agenda(0.7, 2.5)
    agenda.settle(0.0)
    agenda.soon(0.1)
    assert agenda.is_due(0.1)


def test_the_first_in_rank_stands_in_first_and_waits_longer_next_time() -> None:
    first, second = StandIn(3.0), StandIn(3.0)
    first.wait(0, 10.0)
    second.wait(1, 10.0)
    assert (first.at, second.at) == (13.0, 16.0)
    assert first.begins(13.0)
    assert first.is_active
    first.end()
    first.wait(0, 20.0)
    assert first.at == 26.0
    first.all_is_well()
    first.rest()
    first.wait(0, 30.0)
    assert first.at == 33.0
