"""Who is alive, decided by one core from what it is told."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.membership.events import (
    Broadcast,
    CutsChanged,
    Down,
    Effect,
    Event,
    Expelled,
    FactsChanged,
    Heard,
    Leave,
    LinkDown,
    LinkUp,
    MemberAlive,
    MemberFacts,
    MemberLost,
    MemberSuspect,
    Received,
    Send,
    Tick,
)
from mesh.membership.standing import TRANSITIONS, Sign, Standing
from mesh.wire.codec import control_decoder, decode, encode
from mesh.wire.messages import Facts, Leaving, Ping, PingAck, PingReq, Pong, Rumour
from tests.sim.fakes import facts_of, node_id

ME, A, B, C, D = (node_id(i) for i in range(5))
BOOT = 1 << BOOT_SHIFT


class Told:
    """A core with a clock: ``do`` an event, ``wait`` for time to pass with every timer served."""

    def __init__(self, *linked: int, incarnation: int = BOOT) -> None:
        self.now = 100.0
        self.core = Membership(facts_of(0), incarnation)
        self.log: list[tuple[float, Effect]] = []
        for index in linked:
            self.do(LinkUp(node_id(index), facts_of(index)))

    def do(self, event: Event) -> list[Effect]:
        effects = self.core.handle(event, self.now)
        self.core.next_timer()
        self.log += [(self.now, effect) for effect in effects]
        return effects

    def wait(self, seconds: float, talking: tuple[str, ...] = ()) -> list[Effect]:
        """Let time pass; ``talking`` peers are heard every 0.1 s."""
        end, out = self.now + seconds, []
        beat = self.now
        while True:
            due = self.core.next_timer()
            beat_due = beat + 0.1 if talking else math.inf
            at = min(due if due is not None else math.inf, beat_due, end)
            self.now = max(self.now, at)
            if at == beat_due:
                beat = at
                for peer in talking:
                    out += self.do(Heard(peer))
            if due is not None and due <= self.now:
                out += self.do(Tick())
            if self.now >= end:
                return out

    @property
    def members(self) -> set[str]:
        return {m.id for m in self.core.view().members}


def lost(effects: list[Effect]) -> list[tuple[str, str]]:
    return [(e.node, e.reason) for e in effects if isinstance(e, MemberLost)]


def test_a_link_makes_a_member_and_tells_it_who_we_are() -> None:
    told = Told()
    effects = told.do(LinkUp(A, facts_of(1)))
    assert MemberAlive(A, facts_of(1)) in effects
    assert Send(A, Rumour(ME, BOOT, "alive")) in effects
    assert [m.id for m in told.core.view().members] == [ME, A]


def test_a_new_member_is_told_of_the_others_and_they_of_it() -> None:
    told = Told(1)
    effects = told.do(LinkUp(B, facts_of(2)))
    assert Send(B, Facts(facts_of(1))) in effects
    assert Send(B, Rumour(A, 0, "alive")) in effects
    assert Broadcast(Facts(facts_of(2))) in effects


def test_only_a_silent_peer_is_probed() -> None:
    told = Told(1)
    assert not [e for e in told.wait(2.0, talking=(A,)) if isinstance(e, Send)]
    assert [e for e in told.wait(0.3) if isinstance(e, Send) and isinstance(e.message, Ping)]


def test_a_ping_is_answered_with_its_number() -> None:
    assert Told(1).do(Received(A, Ping(7))) == [Send(A, Pong(7))]


def test_the_answer_to_a_probe_measures_the_round_trip() -> None:
    told = Told(1)
    pings = [e for e in told.wait(0.26) if isinstance(e, Send) and isinstance(e.message, Ping)]
    told.now += 0.04
    told.do(Received(A, Pong(pings[0].message.seq)))
    found = told.core.view().find(A)
    assert found is not None
    assert found.rtt_ms is not None
    assert 30 < found.rtt_ms < 70


def test_a_silent_member_is_suspected_and_three_others_are_asked() -> None:
    told = Told(1, 2, 3, 4, 5)
    others = tuple(node_id(i) for i in (2, 3, 4, 5))
    effects = told.wait(0.7, talking=others)
    assert MemberSuspect(A) in effects
    asked = {e.peer for e in effects if isinstance(e, Send) and isinstance(e.message, PingReq)}
    assert len(asked) == 3
    assert asked <= set(others)
    assert A in told.members


def test_a_member_nobody_hears_is_lost_within_the_promised_time() -> None:
    told = Told(1, 2)
    assert lost(told.wait(1.4, talking=(B,))) == []
    assert lost(told.wait(0.2, talking=(B,))) == [(A, "crashed")]
    assert told.members == {ME, B}


def test_a_stall_of_one_second_never_evicts() -> None:
    told = Told(1)
    told.wait(1.0, talking=(A,))
    told.wait(1.25)  # asleep for a second, right after a whole probe interval of silence
    effects = told.do(Heard(A))
    assert lost([e for _, e in told.log]) == []
    assert MemberAlive(A, facts_of(1)) in effects


def test_a_dead_member_is_back_when_it_is_heard() -> None:
    told = Told(1)
    assert lost(told.wait(2.0)) == [(A, "crashed")]
    assert told.do(Heard(A))[0] == MemberAlive(A, facts_of(1))
    assert A in told.members


def test_a_member_others_hear_stays_in_but_unreachable() -> None:
    told = Told(1, 2)
    effects: list[Effect] = []
    for _ in range(8):
        effects += told.wait(0.3, talking=(B,))
        told.do(Received(B, PingAck(A, 1)))
    assert lost(effects) == []
    view = told.core.view()
    assert view.unreachable == {A}
    assert view.cuts == {(ME, A)}
    assert Broadcast(Rumour(A, 0, "suspect")) in effects
    assert CutsChanged() in effects


def test_an_unreachable_member_is_lost_when_nobody_vouches_any_more() -> None:
    told = Told(1, 2)
    for _ in range(8):
        told.wait(0.3, talking=(B,))
        told.do(Received(B, PingAck(A, 1)))
    assert lost(told.wait(2.1, talking=(B,))) == [(A, "unreachable")]


def test_an_unreachable_member_that_is_heard_again_is_reachable() -> None:
    told = Told(1, 2)
    for _ in range(8):
        told.wait(0.3, talking=(B,))
        told.do(Received(B, PingAck(A, 1)))
    effects = told.do(Heard(A))
    assert Broadcast(Rumour(A, 0, "alive")) in effects
    assert told.core.view().unreachable == frozenset()
    assert told.core.view().cuts == frozenset()


def test_a_node_that_slept_itself_evicts_nobody() -> None:
    told = Told(1, 2)
    told.wait(0.5, talking=(A, B))
    told.now += 10.0  # stopped, and continued
    effects = told.do(Tick())
    effects += told.wait(1.0)
    assert lost(effects) == []
    assert {n for n, _ in lost(told.wait(1.0))} == {A, B}


def test_a_node_that_slept_and_hears_the_backlog_first_evicts_nobody() -> None:
    told = Told(1, 2)
    told.wait(0.5, talking=(A, B))
    told.now += 10.0
    effects = told.do(Heard(A))
    effects += told.wait(1.0, talking=(A,))
    assert lost(effects) == []


def test_a_farewell_costs_no_detection_time() -> None:
    told = Told(1)
    effects = told.do(Received(A, Leaving("asked to")))
    assert lost(effects) == [(A, "left")]
    assert [d.reason for d in told.core.view().departed] == ["left"]


def test_an_echo_of_someone_who_left_brings_nobody_back() -> None:
    told = Told(1, 2)
    told.do(Received(A, Leaving()))
    told.do(Heard(A))
    told.do(Received(B, Rumour(A, 0, "alive")))
    assert A not in told.members


def test_someone_who_left_may_come_back_by_a_new_link() -> None:
    told = Told(1)
    told.do(Received(A, Leaving()))
    told.do(LinkDown(A, Down.CLOSED))
    assert MemberAlive(A, facts_of(1)) in told.do(LinkUp(A, facts_of(1)))


def test_a_link_closed_by_the_other_side_hastens_the_verdict() -> None:
    told = Told(1)
    told.do(LinkDown(A, Down.CLOSED))
    assert lost(told.wait(0.7)) == []
    assert lost(told.wait(0.1)) == [(A, "crashed")]


def test_a_closed_link_that_is_dialed_again_in_time_loses_nobody() -> None:
    told = Told(1)
    told.do(LinkDown(A, Down.CLOSED))
    told.wait(0.6)
    told.do(LinkUp(A, facts_of(1)))
    assert lost(told.wait(1.0, talking=(A,))) == []


def test_a_link_that_broke_by_silence_alone_hastens_nothing() -> None:
    told = Told(1)
    told.do(LinkDown(A, Down.TIMEOUT))
    assert lost(told.wait(1.0)) == []


def test_a_revoked_member_is_out_and_stays_out() -> None:
    told = Told(1)
    assert lost(told.do(Expelled(A))) == [(A, "revoked")]
    told.do(Heard(A))
    assert A not in told.members


def test_a_rumour_that_could_not_be_refuted_does_not_make_us_say_what_nobody_may_read() -> None:
    """One message with the highest incarnation there is made us answer with one more: refused by all, with its link."""
    told = Told(1)
    for claimed in (2**62, 2**62 - 1, 2**62):
        effects = told.do(Received(A, Rumour(ME, claimed, "dead")))
        for effect in effects:
            if isinstance(effect, Send | Broadcast):
                decode(control_decoder, encode(effect.message)[4:])


def test_a_rumour_of_our_death_is_refuted_with_a_higher_incarnation() -> None:
    told = Told(1, 2)
    effects = told.do(Received(A, Rumour(ME, BOOT, "dead")))
    assert Broadcast(Rumour(ME, BOOT + 1, "alive")) in effects


def test_whoever_hears_someone_called_dead_vouches_for_it() -> None:
    told = Told(1, 2)
    assert Send(A, Rumour(B, 0, "alive")) in told.do(Received(A, Rumour(B, 0, "dead")))
    assert B in told.members


def test_hearsay_alone_does_not_raise_the_dead_for_long() -> None:
    told = Told(1, 2)
    told.wait(2.0, talking=(B,))
    told.do(Received(B, Rumour(A, 0, "alive")))
    assert A in told.members
    told.wait(4.5, talking=(B,))
    assert A not in told.members


def test_an_answer_that_was_under_way_when_the_verdict_fell_raises_nobody() -> None:
    told = Told(1, 2)
    told.wait(2.0, talking=(B,))
    told.do(Received(B, PingAck(A, 1)))
    assert A not in told.members


def test_a_node_known_by_hearsay_is_a_member_before_there_is_a_link() -> None:
    told = Told(1)
    told.do(Received(A, Facts(facts_of(3))))
    assert C not in told.members
    effects = told.do(Received(A, Rumour(C, 0, "alive")))
    assert MemberAlive(C, facts_of(3)) in effects
    assert C in told.members


def test_a_peer_asked_for_is_probed_and_answered_for_when_it_is_heard() -> None:
    told = Told(1, 2)
    effects = told.do(Received(A, PingReq(B, 9)))
    assert [e.peer for e in effects if isinstance(e, Send) and isinstance(e.message, Ping)] == [B]
    assert told.do(Heard(B)) == [Send(A, PingAck(B, 9))]
    assert told.do(Heard(B)) == []


def test_nobody_vouches_for_whom_it_did_not_hear_since_it_was_asked() -> None:
    told = Told(1, 2)
    assert not [e for e in told.do(Received(A, PingReq(B, 9))) if isinstance(e, Send) and e.peer == A]


def test_a_new_process_of_a_member_is_noticed_even_if_nobody_missed_the_old_one() -> None:
    told = Told(1)
    told.do(Received(A, Rumour(A, BOOT, "alive")))
    told.do(LinkUp(A, facts_of(1)))
    effects = told.do(Received(A, Rumour(A, 2 * BOOT, "alive")))
    assert effects == [MemberLost(A, "restarted"), MemberAlive(A, facts_of(1))]
    found = told.core.view().find(A)
    assert found is not None
    assert found.boot == 2


def test_a_refutation_is_not_taken_for_a_restart() -> None:
    told = Told(1)
    told.do(Received(A, Rumour(A, BOOT, "alive")))
    assert told.do(Received(A, Rumour(A, BOOT + 1, "alive"))) == []


def test_cuts_between_others_are_known_and_forgotten() -> None:
    told = Told(1, 2)
    assert CutsChanged() in told.do(Received(A, Rumour(B, 0, "suspect")))
    assert told.core.view().cuts == {(A, B)}
    told.do(Received(A, Rumour(B, 0, "alive")))
    assert told.core.view().cuts == frozenset()


def test_a_peer_that_cannot_hear_us_and_then_can_leaves_no_cut_behind() -> None:
    told = Told(1)
    told.do(Received(A, Rumour(ME, BOOT, "suspect")))
    assert told.core.view().cuts == {(ME, A)}
    told.do(Received(A, Rumour(ME, BOOT, "alive")))
    assert told.core.view().cuts == frozenset()


def test_newer_facts_are_passed_on_older_ones_ignored() -> None:
    told = Told(1)
    newer = facts_of(1, layers=9, version=5)
    assert told.do(Received(A, Facts(newer))) == [MemberFacts(A, newer)]
    assert told.do(Received(A, Facts(facts_of(1, version=4)))) == []


def test_our_own_change_is_told_to_everyone() -> None:
    told = Told(1)
    mine = replace(facts_of(0), version=2)
    assert Broadcast(Facts(mine)) in told.do(FactsChanged(mine))
    assert told.core.view().members[0].facts == mine


def test_leaving_says_farewell_and_ends_everything() -> None:
    told = Told(1)
    assert told.do(Leave("done")) == [Broadcast(Leaving("done"))]
    assert told.do(Heard(A)) == []
    assert told.core.next_timer() is None


def test_every_sign_that_can_come_in_a_standing_has_a_transition() -> None:
    asked = {Sign.LINKED, Sign.HEARD, Sign.VOUCHED, Sign.PARTED}
    assert all((standing, sign) in TRANSITIONS for standing in Standing for sign in asked)


class AnythingGoes(RuleBasedStateMachine):
    """Whatever happens in whatever order: no exception, a sorted view with ourselves in it, and timers that move on."""

    def __init__(self) -> None:
        super().__init__()
        self.told = Told(1, 2)

    peers = st.sampled_from([A, B, C, D])
    anyone = st.sampled_from([ME, A, B, C, D])
    numbers = st.integers(0, 3 * BOOT)

    @rule(peer=peers, version=st.integers(0, 9))
    def link(self, peer: str, version: int) -> None:
        self.told.do(LinkUp(peer, facts_of("abcde".index(peer[0]), version=version)))

    @rule(peer=peers, reason=st.sampled_from(Down))
    def unlink(self, peer: str, reason: Down) -> None:
        self.told.do(LinkDown(peer, reason))

    @rule(peer=peers)
    def hear(self, peer: str) -> None:
        self.told.do(Heard(peer))

    @rule(peer=peers, node=anyone, number=numbers, state=st.sampled_from(["alive", "suspect", "dead", "left"]))
    def rumour(self, peer: str, node: str, number: int, state: str) -> None:
        self.told.do(Received(peer, Rumour(node, number, state)))  # type: ignore[arg-type]

    @rule(
        peer=peers,
        message=st.one_of(
            st.builds(Ping, st.integers(0, 50)),
            st.builds(Pong, st.integers(0, 50)),
            st.builds(PingReq, anyone, st.integers(0, 50)),
            st.builds(PingAck, anyone, st.integers(0, 50)),
            st.builds(lambda i, v: Facts(facts_of(i, version=v)), st.integers(0, 4), st.integers(0, 9)),
            st.just(Leaving()),
        ),
    )
    def receive(self, peer: str, message: Ping) -> None:
        self.told.do(Received(peer, message))

    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.told.wait(seconds)

    @rule(seconds=st.sampled_from([0.3, 3.0]))
    def sleep(self, seconds: float) -> None:
        self.told.now += seconds

    @invariant()
    def view_is_sane(self) -> None:
        view = self.told.core.view()
        ids = [m.id for m in view.members]
        assert ids == sorted(set(ids))
        assert ME in ids
        assert all(a < b for a, b in view.cuts)

    @invariant()
    def timers_move_on(self) -> None:
        due = self.told.core.next_timer()
        if due is not None and due <= self.told.now:
            self.told.do(Tick())
            again = self.told.core.next_timer()
            assert again is None or again > self.told.now


AnythingGoes.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnythingGoes = AnythingGoes.TestCase
