"""Who hosts, decided by one core from what it is told."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from mesh.election.coordinate import rightful
from mesh.election.core import Election
from mesh.election.events import (
    Adopt,
    Effect,
    EngineFailed,
    EngineListening,
    EngineServing,
    Event,
    LinkUp,
    NeedPlan,
    Planned,
    Received,
    Remember,
    Served,
    Shutdown,
    Tick,
    Unserved,
    ViewChanged,
    WorkersReady,
)
from mesh.membership.events import Broadcast, Send
from mesh.membership.view import Departed, Member, View
from mesh.wire.codec import control_decoder, decode, encode
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeFacts, RingMember
from mesh.wire.messages import Accepted, EngineDown, HeldOff, Propose, Rejected, Serving, WorkerReady
from tests.sim.fakes import MODEL, facts_of, node_id, plan

A, B, C, D = (node_id(i) for i in range(4))
LONE = 12
"""Layers a node must carry to hold the model alone."""


def layout_of(*ring: int) -> Layout:
    members = tuple(RingMember(node_id(i), f"n{i}", (0, 0), 1, "CPU") for i in ring)
    return Layout("split" if len(ring) > 1 else "solo", node_id(ring[0]), MODEL, members, 1, 1)


def propose(number: int, by: int, *ring: int, lifts: Epoch = NO_EPOCH) -> Propose:
    return Propose(Epoch(number, node_id(by)), layout_of(*ring) if ring else None, "because", lifts=lifts)


class Told:
    """A core whose view is what we say, whose plans are made at once, and whose timers are served while we wait."""

    def __init__(self, me: int, *others: int, seen: int = 0, **facts: NodeFacts) -> None:
        self.now = 100.0
        self.me = node_id(me)
        self.core = Election(self.me, seen=seen, jitter=0.0)
        self.known = {i: facts_of(i) for i in (me, *others)}
        self.known |= {f.id[0].encode()[0] - ord("a"): f for f in facts.values()}
        self.boots: dict[int, int] = {}
        self.gone: dict[int, str] = {}
        self.plans = True
        self.nothing_fits = ""
        self.asked: list[tuple[float, NeedPlan]] = []
        self.see()

    def do(self, event: Event) -> list[Effect]:
        effects = list(self.core.handle(event, self.now))
        for effect in list(effects):
            if isinstance(effect, NeedPlan):
                self.asked.append((self.now, effect))
                if self.plans:
                    layout, why = plan(effect.members, effect.current, effect.excluded, effect.cuts)
                    layout = None if self.nothing_fits else layout
                    effects += self.do(Planned(effect.request_id, layout, self.nothing_fits or why))
        return effects

    def see(self, cuts: tuple[tuple[str, str], ...] = ()) -> list[Effect]:
        members = tuple(
            Member(f, boot=self.boots.get(i, 1)) for i, f in sorted(self.known.items()) if i not in self.gone
        )
        departed = tuple(Departed(self.known[i], why) for i, why in self.gone.items())
        return self.do(ViewChanged(View(self.me, members, departed, frozenset(cuts))))

    def lose(self, *who: int, reason: str = "crashed") -> list[Effect]:
        self.gone |= dict.fromkeys(who, reason)
        return self.see()

    def join(self, *facts: NodeFacts) -> list[Effect]:
        for f in facts:
            self.known[ord(f.id[0]) - ord("a")] = f
            self.gone.pop(ord(f.id[0]) - ord("a"), None)
        return self.see()

    def hear(self, sender: int, message: object) -> list[Effect]:
        return self.do(Received(node_id(sender), message))  # type: ignore[arg-type]

    def wait(self, seconds: float) -> list[Effect]:
        end = self.now + seconds
        out: list[Effect] = []
        for _ in range(10_000):
            due = self.core.next_timer()
            if due is None or due > end:
                self.now = end
                return out
            self.now = max(self.now, due)
            out += self.do(Tick())
        raise AssertionError("the timers do not move on")

    @property
    def state(self) -> str:
        return self.core.status().state


def serving(me: int, *others: int) -> Told:
    """``me`` follows a layout of everyone, which the first hosts and serves; epoch (1, a)."""
    told = Told(me, *others)
    ring = sorted((me, *others))
    told.hear(0, propose(1, 0, *ring)) if me != 0 else None
    if me == 0:
        told.wait(1.5)
        assert told.state == "starting"
    host = told.core.status().layout.host  # type: ignore[union-attr]
    if host == told.me:
        told.do(EngineServing(told.core.epoch, "key"))
    else:
        told.hear(ord(host[0]) - ord("a"), Serving(told.core.epoch, "key"))
    assert told.state == "serving"
    return told


def adopted(effects: list[Effect]) -> list[Epoch]:
    return [e.epoch for e in effects if isinstance(e, Adopt)]


def proposed(effects: list[Effect]) -> list[Propose]:
    return [e.message for e in effects if isinstance(e, Broadcast) and isinstance(e.message, Propose)]


# -- lies --------------------------------------------------------------------------------------------------------------


def test_one_message_cannot_use_up_all_numbers() -> None:
    """A number near the last one made every later proposal one that nobody could read, for ever."""
    told = serving(0, 1, 2)
    before = told.core.epoch
    far = Epoch(2**53, node_id(1))
    for lie in (Rejected(before, far), Propose(far, None, "mine"), Serving(far, "k"), Accepted(far)):
        told.hear(1, lie)
    assert told.core.epoch == before
    effects = told.hear(1, Rejected(before, Epoch(7, node_id(1)))) + told.wait(10)
    assert proposed(effects)
    for effect in effects:
        if isinstance(effect, Send | Broadcast):
            decode(control_decoder, encode(effect.message)[4:])
    assert told.core.epoch == Epoch(8, node_id(0))


def test_a_mesh_that_was_far_ahead_is_believed() -> None:
    told = serving(0, 1, 2)
    told.hear(1, Rejected(told.core.epoch, Epoch(5000, node_id(1))))
    told.wait(10)
    assert told.core.epoch.number == 5001


# -- beginning ---------------------------------------------------------------------------------------------------------


def test_a_machine_alone_listens_for_a_while_then_proposes_and_remembers_first() -> None:
    told = Told(0, a=facts_of(0, layers=LONE))
    assert told.wait(0.9) == []
    effects = told.wait(0.2)
    kinds = [type(e) for e in effects]
    assert kinds.index(Remember) < kinds.index(Adopt) < kinds.index(Broadcast)
    assert adopted(effects) == [Epoch(1, A)]
    assert WorkersReady(Epoch(1, A)) in effects
    assert told.state == "starting"


def test_the_lowest_worker_coordinates_a_client_never() -> None:
    told = Told(1, 2, a=facts_of(0, role="client"))
    assert told.core.status().coordinator == B
    assert adopted(told.wait(2.0)) == [Epoch(1, B)]


def test_a_client_alone_waits_without_ever_proposing() -> None:
    told = Told(0, a=facts_of(0, role="client"))
    assert told.wait(60.0) == []
    assert told.state == "electing"


def test_whoever_is_not_the_coordinator_leaves_it_to_it() -> None:
    told = Told(1, 0)
    assert told.wait(2.9) == []


def test_nobody_waits_for_ever_for_a_coordinator_that_stays_silent() -> None:
    told = Told(1, 0)
    assert proposed(told.wait(7.0))


def test_when_nothing_fits_everyone_is_told_why_once() -> None:
    told = Told(0, 1)
    told.nothing_fits = "3 GB are missing"
    effects = told.wait(60.0)
    assert [p.layout for p in proposed(effects)] == [None]
    assert told.state == "waiting"
    assert "3 GB are missing" in told.core.status().reason


def test_memory_that_becomes_free_is_worth_another_look_while_nothing_runs() -> None:
    told = Told(0, a=facts_of(0, layers=6))
    told.wait(2.0)
    assert told.state == "waiting"
    assert adopted(told.join(facts_of(0, layers=LONE)) + told.wait(1.0)) == [Epoch(2, A)]


# -- following ---------------------------------------------------------------------------------------------------------


def test_what_is_newer_is_followed_and_accepted() -> None:
    told = Told(1, 0)
    effects = told.hear(0, propose(3, 0, 0, 1))
    assert adopted(effects) == [Epoch(3, A)]
    assert Send(A, Accepted(Epoch(3, A))) in effects
    assert Remember(3) in effects


def test_what_is_older_is_refused_with_what_is_newest() -> None:
    told = Told(1, 0)
    told.hear(0, propose(3, 0, 0, 1))
    effects = told.hear(0, propose(2, 0, 0, 1))
    assert adopted(effects) == []
    assert Send(A, Rejected(Epoch(2, A), Epoch(3, A))) in effects
    assert Send(A, propose(3, 0, 0, 1)) in effects


def test_what_is_followed_already_is_accepted_again_and_restarts_nothing() -> None:
    told = Told(1, 0)
    told.hear(0, propose(3, 0, 0, 1))
    assert told.hear(0, propose(3, 0, 0, 1)) == [Send(A, Accepted(Epoch(3, A)))]


def test_a_stranger_is_not_listened_to() -> None:
    told = Told(1, 0)
    assert told.hear(3, propose(3, 3, 3)) == []


def test_after_a_restart_older_epochs_stay_refused() -> None:
    told = Told(1, 0, seen=7)
    assert adopted(told.hear(0, propose(6, 0, 0, 1))) == []
    assert adopted(told.hear(0, propose(7, 0, 0, 1))) == [Epoch(7, A)]


def test_after_a_restart_the_first_proposal_is_above_what_was_remembered() -> None:
    told = Told(0, seen=7, a=facts_of(0, layers=LONE))
    assert adopted(told.wait(1.5)) == [Epoch(8, A)]


def test_a_coordinator_that_is_back_before_it_was_missed_does_not_go_on_under_its_old_number() -> None:
    """The others told it of its own layout, and it took that up again: killed and started under the same epoch."""
    told = Told(0, 1, 2, seen=4)
    effects = told.hear(1, propose(4, 0, 0, 1, 2)) + told.wait(1.0)
    assert adopted(effects)[-1] == Epoch(5, A)
    assert "restarted" in proposed(effects)[-1].reason


def test_a_bystander_that_is_back_follows_the_number_it_knew() -> None:
    told = Told(0, 1, 2, seen=4, c=facts_of(2, layers=LONE))
    assert adopted(told.hear(2, propose(4, 2, 2)) + told.wait(0.2)) == [Epoch(4, C)]


def test_a_running_layout_is_not_given_up_for_a_bystanders_proposal_at_once() -> None:
    told = serving(1, 0)
    told.join(facts_of(2))
    assert adopted(told.hear(2, propose(5, 2, 2))) == []
    assert told.state == "serving"


def test_a_ring_member_that_follows_something_else_has_ended_its_part() -> None:
    told = serving(1, 0, 2)
    assert adopted(told.hear(2, propose(5, 2, 2))) == [Epoch(5, C)]


def test_a_bystanders_proposal_is_followed_when_the_coordinator_says_nothing() -> None:
    told = serving(1, 0)
    told.join(facts_of(2))
    told.hear(2, propose(5, 2, 2))
    effects = told.wait(2.1)
    assert adopted(effects) == [Epoch(5, C)]
    assert Send(A, propose(5, 2, 2)) in effects


def test_the_coordinator_learns_of_a_number_that_only_we_can_hear() -> None:
    told = serving(1, 0)
    told.join(facts_of(2))
    assert Send(A, Rejected(Epoch(1, A), Epoch(5, C))) in told.hear(2, propose(5, 2, 2))


def test_the_coordinators_proposal_is_followed_at_once() -> None:
    told = serving(1, 0, 2)
    assert adopted(told.hear(0, propose(5, 0, 0, 1))) == [Epoch(5, A)]


def test_word_that_nothing_can_run_does_not_stop_what_runs() -> None:
    told = Told(1, 0, 2)
    told.hear(0, propose(1, 0, 2, 1))
    told.hear(2, Serving(Epoch(1, A), "key"))
    effects = told.hear(0, propose(5, 0))
    assert Send(A, propose(1, 0, 2, 1)) in effects
    assert adopted(effects + told.wait(30.0)) == []
    assert told.state == "serving"


# -- fencing and routing -----------------------------------------------------------------------------------------------


def test_a_bystander_that_missed_the_failure_follows_the_coordinator_that_gives_up() -> None:
    """It held the layout to be well, for it had not heard that the engine failed, and stayed with it for ever."""
    told = Told(2, 0, 1, 3)
    told.hear(0, propose(1, 0, 0, 1))
    assert told.state == "starting"
    told.hear(3, Propose(Epoch(2, D), None, "nothing fits"))
    assert told.core.epoch == Epoch(1, A), "anybody else is not believed"
    told.hear(0, Propose(Epoch(3, A), None, "FAILED: the same layout failed 5 times"))
    assert told.core.epoch == Epoch(3, A)


def test_a_worker_carries_for_the_host_of_its_epoch_only() -> None:
    told = Told(1, 0, 2)
    told.hear(0, propose(3, 0, 0, 1))
    assert told.core.may_carry(A, Epoch(3, A))
    assert not told.core.may_carry(C, Epoch(3, A))
    assert not told.core.may_carry(A, Epoch(2, A))
    told.hear(0, propose(4, 0, 2, 1))
    assert not told.core.may_carry(A, Epoch(3, A))
    assert told.core.may_carry(C, Epoch(4, A))


def test_requests_go_to_the_host_once_it_serves() -> None:
    told = Told(1, 0)
    told.hear(0, propose(1, 0, 0, 1))
    assert told.hear(0, Serving(Epoch(1, A), "key")) == [Served(Epoch(1, A), A, "key")]


def test_word_that_the_host_serves_may_come_before_the_proposal() -> None:
    told = Told(1, 0, 2)
    told.hear(2, Serving(Epoch(1, A), "key"))
    assert Served(Epoch(1, A), C, "key") in told.hear(0, propose(1, 0, 2, 1))


def test_only_the_host_can_say_that_it_serves() -> None:
    told = Told(1, 0, 2)
    told.hear(0, propose(1, 0, 0, 1, 2))
    told.hear(2, Serving(Epoch(1, A), "mine"))
    assert told.state == "starting"


def test_requests_are_held_when_the_host_is_lost() -> None:
    told = serving(1, 0, 2)
    assert Unserved("n0 crashed") in told.lose(0)


def test_the_host_tells_everyone_that_it_serves_and_says_so_again() -> None:
    told = serving(0, 1, 2)
    assert Broadcast(Serving(Epoch(1, A), "key")) in told.wait(5.1)


def test_a_shutdown_holds_requests_and_ends_everything() -> None:
    told = serving(1, 0)
    assert told.do(Shutdown()) == [Unserved("this machine is shutting down")]
    assert told.hear(0, propose(9, 0, 0)) == []
    assert told.core.next_timer() is None


# -- starting ----------------------------------------------------------------------------------------------------------


def test_the_host_starts_when_every_worker_listens() -> None:
    told = Told(1, 0, 2)
    told.hear(0, propose(1, 0, 1, 0, 2))
    assert WorkersReady(Epoch(1, A)) not in told.hear(0, WorkerReady(Epoch(1, A)))
    assert WorkersReady(Epoch(1, A)) in told.hear(2, WorkerReady(Epoch(1, A)))
    assert told.hear(2, WorkerReady(Epoch(1, A))) == []


def test_a_worker_may_be_ready_before_the_host_has_heard_of_the_layout() -> None:
    told = Told(1, 0, 2)
    told.hear(2, WorkerReady(Epoch(1, A)))
    assert WorkersReady(Epoch(1, A)) in told.hear(0, propose(1, 0, 1, 2))


def test_a_worker_tells_the_host_that_it_listens_and_again_on_a_new_link() -> None:
    told = Told(1, 0)
    told.hear(0, propose(1, 0, 0, 1))
    assert told.do(EngineListening(Epoch(1, A))) == [Send(A, WorkerReady(Epoch(1, A)))]
    assert Send(A, WorkerReady(Epoch(1, A))) in told.do(LinkUp(A))


def test_a_host_whose_engine_failed_is_not_told_to_start() -> None:
    told = Told(1, 0, 2)
    told.hear(0, propose(1, 0, 1, 2))
    told.do(EngineFailed(Epoch(1, A), "no memory"))
    assert told.hear(2, WorkerReady(Epoch(1, A))) == []


def test_each_side_says_where_it_stands_on_a_new_link() -> None:
    told = serving(0, 1, 2)
    status = told.core.status()
    effects = told.do(LinkUp(B))
    assert [type(e.message) for e in effects if isinstance(e, Send)] == [Propose, Serving]
    assert all(e.peer == B and e.message.epoch == status.epoch for e in effects if isinstance(e, Send))


def test_whoever_comes_back_on_a_link_that_never_broke_is_told_where_we_stand() -> None:
    told = serving(0, 1, 2)
    told.known[3] = facts_of(3)
    told.see()
    told.lose(3)
    effects = told.join(facts_of(3))
    assert [type(e.message) for e in effects if isinstance(e, Send) and e.peer == D] == [Propose, Serving]


def test_a_member_that_does_not_accept_is_left_out() -> None:
    told = Told(0, 1, 2)
    told.wait(1.1)
    assert [m.id for m in told.core.status().layout.ring] == [A, B]  # type: ignore[union-attr]
    effects = told.wait(3.1)
    assert [m.id for p in proposed(effects) for m in p.layout.ring] == [A, C]  # type: ignore[union-attr]
    assert "does not answer" in told.core.status().excluded[B]


def test_a_start_that_takes_for_ever_is_given_up() -> None:
    told = Told(0, a=facts_of(0, layers=LONE))
    told.wait(1.1)
    effects = told.wait(121.0)
    assert adopted(effects) == [Epoch(2, A)]


# -- change ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_ring_member_restarts_at_once() -> None:
    told = serving(0, 1, 2)
    ring = [m.id for m in told.core.status().layout.ring]  # type: ignore[union-attr]
    assert ring == [A, B]
    effects = told.lose(1)
    assert adopted(effects) == [Epoch(2, A)]
    assert Unserved("n1 crashed") in effects
    assert told.core.status().reason == "n1 crashed; fewest machines"


def test_the_loss_of_a_bystander_restarts_nothing() -> None:
    told = serving(0, 1, 2)
    assert adopted(told.lose(2) + told.wait(20.0)) == []
    assert told.state == "serving"


def test_a_lite_client_coming_and_going_restarts_nothing() -> None:
    told = serving(0, 1)
    asked = len(told.asked)
    told.join(facts_of(2, role="client"))
    told.wait(5.0)
    told.lose(2)
    told.wait(5.0)
    assert len(told.asked) == asked
    assert told.core.epoch == Epoch(1, A)


def test_a_join_settles_before_the_layout_is_looked_at() -> None:
    told = serving(0, 1)
    told.join(facts_of(2, layers=LONE))
    assert adopted(told.wait(0.6)) == []
    assert adopted(told.wait(0.2)) == [Epoch(2, A)]
    assert told.core.status().reason.startswith("n2 joined")


def test_joins_without_end_do_not_put_the_look_off_for_ever() -> None:
    told = serving(0, 1)
    start = told.now
    for i in range(2, 9):
        told.join(facts_of(i, layers=LONE))
        told.wait(0.5)
    assert told.asked[-1][0] <= start + 3.5
    assert told.core.epoch.number > 1


def test_a_join_that_leaves_the_layout_as_it_is_restarts_nothing() -> None:
    told = serving(0, 1)
    told.join(facts_of(2, layers=2))
    assert adopted(told.wait(20.0)) == []


def test_a_ring_member_about_to_leave_is_planned_away_at_once() -> None:
    told = serving(0, 1, 2)
    effects = told.join(facts_of(1, version=2, draining=True))
    assert adopted(effects) == [Epoch(2, A)]
    assert [m.id for m in told.core.status().layout.ring] == [A, C]  # type: ignore[union-attr]


def drains(effects: list[Effect]) -> list[float]:
    return [e.drain_s for e in effects if isinstance(e, Adopt | Unserved)]


def test_a_planned_change_lets_requests_finish_first() -> None:
    told = serving(0, 1, 2)
    effects = told.join(facts_of(1, version=2, draining=True))
    assert [p.drain_s for p in proposed(effects)] == [10.0]
    assert drains(effects) == [10.0, 10.0]


def test_a_follower_lets_requests_finish_for_as_long_as_it_is_told() -> None:
    told = serving(1, 0, 2)
    assert drains(told.hear(0, replace(propose(2, 0, 0, 1), drain_s=4.0))) == [4.0, 4.0]


def test_a_loss_waits_for_nobody() -> None:
    told = serving(0, 1, 2)
    effects = told.lose(1)
    assert [p.drain_s for p in proposed(effects)] == [0.0]
    assert drains(effects) == [0.0, 0.0]


def test_who_sees_a_loss_that_the_coordinator_does_not_see_waits_for_nobody() -> None:
    told = serving(1, 0, 2)
    told.lose(2)
    assert drains(told.hear(0, replace(propose(2, 0, 0, 1), drain_s=4.0)))[0] == 0.0


def test_what_does_not_serve_yet_has_nothing_to_finish() -> None:
    told = Told(1, 0, 2)
    told.hear(0, propose(1, 0, 0, 1, 2))
    assert drains(told.hear(0, replace(propose(2, 0, 0, 1), drain_s=4.0))) == [0.0]


def test_a_second_planned_change_leaves_the_first_its_time_and_no_more() -> None:
    told = serving(0, 1, 2)
    told.join(facts_of(1, version=2, draining=True))
    told.hear(2, Accepted(told.core.epoch))
    told.now += 4.0
    effects = told.join(facts_of(2, version=2, draining=True))
    assert drains(effects) == [6.0]


def test_a_loss_during_a_drain_ends_it() -> None:
    told = serving(0, 1, 2, 3)
    told.join(facts_of(1, version=2, draining=True))
    assert told.core.status().layout is not None
    lost = told.core.status().layout.ring[-1].id  # type: ignore[union-attr]
    effects = told.lose(ord(lost[0]) - ord("a"))
    assert drains(effects) == [0.0]


def test_who_is_called_back_to_what_runs_elsewhere_may_finish_what_it_has_begun() -> None:
    """A parted mesh has healed: the coordinator keeps its layout under a new number, and we ran another one."""
    told = serving(1, 0, 2)
    effects = told.hear(0, replace(propose(9, 0, 0, 2, lifts=Epoch(8, A)), drain_s=5.0))
    assert drains(effects) == [5.0, 5.0]


def test_a_layout_that_is_only_renumbered_drains_nothing() -> None:
    told = serving(1, 0, 2)
    effects = told.hear(0, replace(propose(2, 0, 0, 1, 2, lifts=Epoch(1, A)), drain_s=5.0))
    assert [(e.lifts, e.drain_s) for e in effects if isinstance(e, Adopt)] == [(Epoch(1, A), 0.0)]


def test_requests_finish_before_a_leaver_goes_that_cannot_be_spared() -> None:
    told = serving(0, 1)
    effects = told.join(facts_of(1, version=2, draining=True))
    (proposal,) = proposed(effects)
    assert proposal.layout is None and proposal.drain_s == 10.0
    assert "n1 is about to leave" in proposal.reason or "machine is about to leave" in proposal.reason


def test_a_newcomer_that_leads_takes_nobody_for_lost_that_it_has_not_met_yet() -> None:
    """A restarted node with the lowest id broke the ring that ran, for want of the links it was about to make."""
    told = Told(0, 1)
    effects = told.hear(1, propose(9, 1, 1, 2))
    assert adopted(effects + told.wait(0.5)) == [Epoch(9, B)]
    told.join(facts_of(2))
    assert adopted(told.wait(10.0)) == []
    told = Told(0, 1)
    told.hear(1, propose(9, 1, 1, 2))
    assert adopted(told.wait(1.1)) == [Epoch(10, A)], "who does not come is lost after all"


def test_the_next_lowest_takes_over_when_the_coordinator_dies() -> None:
    told = serving(1, 0, 2)
    effects = told.lose(0)
    assert [p.epoch for p in proposed(effects)] == [Epoch(2, B)]


def test_whoever_takes_over_a_start_tells_it_again() -> None:
    told = Told(1, 0, 2)
    told.hear(0, propose(1, 0, 1, 2))
    effects = told.lose(0)
    assert propose(1, 0, 1, 2) in proposed(effects)


def test_a_coordinator_that_learns_of_an_epoch_from_others_passes_it_on() -> None:
    told = Told(0, 1, 2)
    assert propose(4, 0, 0, 1) in proposed(told.hear(1, propose(4, 0, 0, 1)))


def test_a_coordinator_that_follows_anothers_decision_thinks_it_over() -> None:
    told = Told(0, 1)
    told.wait(1.1)
    told.hear(1, propose(2, 1))
    assert told.state == "waiting"
    assert adopted(told.wait(1.0)) == [Epoch(3, A)]


def test_a_host_that_serves_an_epoch_we_missed_is_asked_for_it() -> None:
    told = Told(2, 0, 1)
    told.hear(0, propose(3, 0))
    assert told.hear(1, Serving(Epoch(4, A), "key")) == [Send(B, propose(3, 0))]


def test_a_new_process_of_a_ring_member_restarts_the_layout() -> None:
    told = serving(0, 1, 2)
    told.boots[1] = 2
    assert adopted(told.see()) == [Epoch(2, A)]


def test_a_layout_whose_members_are_cut_off_from_each_other_is_looked_at_again() -> None:
    told = serving(0, 1, 2)
    effects = told.see(cuts=((A, B),)) + told.wait(1.0)
    assert [m.id for p in proposed(effects) for m in p.layout.ring] == []  # C coordinates now: it reaches both
    assert told.core.status().coordinator == C


def test_the_coordinator_is_whoever_reaches_most_then_the_lowest() -> None:
    members = tuple(Member(facts_of(i)) for i in range(3))
    assert rightful(View(A, members)) == A
    assert rightful(View(A, members, cuts=frozenset({(A, C)}))) == B


def test_a_machine_about_to_leave_does_not_coordinate() -> None:
    members = (Member(facts_of(0, draining=True)), Member(facts_of(1)))
    assert rightful(View(A, members)) == B


# -- engines that fail -------------------------------------------------------------------------------------------------


def test_a_failed_engine_is_told_to_everyone_and_restarted_at_once() -> None:
    told = serving(0, 1)
    effects = told.do(EngineFailed(Epoch(1, A), "segfault"))
    assert Broadcast(EngineDown(Epoch(1, A), "segfault")) in effects
    assert adopted(effects) == [Epoch(2, A)]
    assert "segfault" in told.core.status().reason


def test_a_failure_of_an_older_epoch_means_nothing() -> None:
    told = serving(0, 1)
    told.do(EngineFailed(Epoch(1, A), "segfault"))
    assert adopted(told.hear(1, EngineDown(Epoch(1, A), "connection lost"))) == []


def test_a_crash_loop_backs_off_and_ends_in_a_clear_failure() -> None:
    told = Told(0, a=facts_of(0, layers=LONE))
    told.wait(1.1)
    starts = [told.now]
    for _ in range(10):
        effects = told.do(EngineFailed(told.core.epoch, "segfault")) + told.wait(40.0)
        if told.state == "waiting":
            break
        assert len(adopted(effects)) == 1
        starts.append(told.now)
    assert len(starts) == 5
    assert told.core.status().reason.startswith("FAILED")
    assert "segfault" in told.core.status().reason
    assert adopted(told.wait(600.0)) == []


def test_a_second_failure_waits_longer_than_the_first() -> None:
    told = Told(0, a=facts_of(0, layers=LONE))
    told.wait(1.1)
    assert adopted(told.do(EngineFailed(told.core.epoch, "x")))
    assert not adopted(told.do(EngineFailed(told.core.epoch, "x")))
    assert adopted(told.wait(0.51))


def test_what_failed_is_tried_again_when_the_mesh_has_changed() -> None:
    told = Told(0, a=facts_of(0, layers=LONE))
    told.wait(1.1)
    while told.state != "waiting":
        told.do(EngineFailed(told.core.epoch, "segfault"))
        told.wait(31.0)
    assert adopted(told.join(facts_of(1, layers=2)) + told.wait(1.0))


def test_serving_for_a_while_forgives_earlier_failures() -> None:
    told = Told(0, a=facts_of(0, layers=LONE))
    told.wait(1.1)
    for _ in range(12):
        told.do(EngineFailed(told.core.epoch, "x"))
        told.wait(31.0)
        assert told.state == "starting"
        told.do(EngineServing(told.core.epoch, "key"))
        told.wait(6.0)


def test_a_worker_that_fails_again_and_again_is_held_off_with_a_reason() -> None:
    told = Told(0, 1, 2)
    told.wait(1.1)
    for _ in range(3):
        told.hear(1, Accepted(told.core.epoch))
        told.hear(1, EngineDown(told.core.epoch, "no memory"))
        told.wait(2.0)
    status = told.core.status()
    assert [m.id for m in status.layout.ring] == [A, C]  # type: ignore[union-attr]
    assert "no memory" in status.excluded[B]
    assert "held off" in status.excluded[B]


def test_a_worker_that_cannot_be_spared_is_used_even_if_it_failed() -> None:
    told = Told(0, 1)
    told.wait(1.1)
    for _ in range(3):
        told.hear(1, Accepted(told.core.epoch))
        told.hear(1, EngineDown(told.core.epoch, "no memory"))
        told.wait(2.0)
    assert [m.id for m in told.core.status().layout.ring] == [A, B]  # type: ignore[union-attr]


def test_a_worker_that_keeps_going_away_is_held_off() -> None:
    told = serving(0, 1, 2)
    for _ in range(3):
        told.lose(1)
        told.join(facts_of(1))
        told.wait(1.0)
    assert any("keeps going away" in asked.excluded.get(B, "") for _, asked in told.asked)


def test_a_coordinator_that_keeps_going_away_is_told_so_when_it_comes_back() -> None:
    told = serving(1, 0, 2)
    for _ in range(3):
        told.lose(0)
        told.wait(1.0)
        effects = told.join(facts_of(0))
        told.wait(1.0)
    (said,) = [e.message for e in effects if isinstance(e, Send) and e.peer == A and isinstance(e.message, Propose)]
    assert said.held_off.keys() == {A} and 13 <= said.held_off[A].seconds <= 15
    decode(control_decoder, encode(said)[4:])
    assert "keeps going away" in told.core.status().excluded[A], "everybody knows, and can say so"


def test_a_coordinator_that_is_held_off_leaves_itself_out_and_what_runs_alone() -> None:
    told = Told(0, 1, 2)
    held_off = {A: HeldOff(15.0, "n0 keeps going away, 3 times of late")}
    told.hear(1, replace(propose(4, 1, 1, 2), held_off=held_off))
    told.hear(1, Serving(Epoch(4, B), "key"))
    effects = told.wait(12.0)
    assert not proposed(effects) and told.state == "serving", "what runs without it is left alone"
    assert "keeps going away" in told.core.status().excluded[A]
    told.wait(6.0)
    assert [A in asked.excluded for _, asked in told.asked] == [True, False], "and thought of again when it is over"
    effects = told.join(facts_of(3))
    said = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Propose)]
    assert [propose.held_off for propose in said] == [{}], "and is not passed on as if it were new"


# -- healing -----------------------------------------------------------------------------------------------------------


def test_whoever_comes_back_with_a_higher_number_and_nothing_to_run_restarts_nothing() -> None:
    told = serving(0, 1)
    epoch = told.core.epoch
    told.join(facts_of(2, layers=2))
    told.hear(2, propose(5, 2))
    effects = told.wait(1.0)
    assert [(e.epoch, e.lifts) for e in effects if isinstance(e, Adopt)] == [(Epoch(6, A), epoch)]
    assert told.state == "serving"
    assert told.core.may_carry(A, epoch)


def test_a_coordinator_with_nothing_to_run_takes_up_what_others_serve() -> None:
    told = Told(0, seen=3)
    told.wait(2.0)
    assert told.state == "waiting"
    told.join(facts_of(1), facts_of(2))
    told.hear(1, propose(2, 1, 1, 2))
    told.hear(1, Serving(Epoch(2, B), "key"))
    effects = told.wait(3.0)
    assert [(p.epoch, p.lifts) for p in proposed(effects)] == [(Epoch(5, A), Epoch(2, B))]


def test_a_worker_that_goes_on_under_a_new_number_tells_its_host_again() -> None:
    told = Told(1, 0)
    told.hear(0, propose(1, 0, 0, 1))
    told.do(EngineListening(Epoch(1, A)))
    effects = told.hear(0, propose(4, 0, 0, 1, lifts=Epoch(1, A)))
    assert Send(A, WorkerReady(Epoch(4, A))) in effects
    assert [e.lifts for e in effects if isinstance(e, Adopt)] == [Epoch(1, A)]


def test_whoever_did_not_follow_what_is_lifted_starts_it() -> None:
    told = Told(1, 0)
    told.hear(0, propose(2, 0, 0))
    effects = told.hear(0, propose(4, 0, 0, 1, lifts=Epoch(1, A)))
    assert [e.lifts for e in effects if isinstance(e, Adopt)] == [NO_EPOCH]


def test_a_broken_layout_is_not_taken_for_running_because_somebody_knows_it_by_an_older_number() -> None:
    told = Told(0, 1, 2, seen=4)
    told.hear(1, propose(5, 1, 0, 1))
    told.hear(2, propose(4, 1, 0, 1))
    effects = told.hear(1, EngineDown(Epoch(5, B), "segfault"))
    assert [e.lifts for e in effects if isinstance(e, Adopt)] == [NO_EPOCH]


def test_of_two_layouts_the_coordinators_own_goes_on_under_a_higher_number() -> None:
    told = serving(0, 1)
    told.join(facts_of(2, layers=2), facts_of(3, layers=2))
    told.hear(2, propose(5, 2, 2, 3))
    told.hear(2, Serving(Epoch(5, C), "other"))
    effects = told.wait(1.0)
    assert [(p.epoch.number, p.layout.host) for p in proposed(effects)] == [(6, A)]  # type: ignore[union-attr]
    assert told.state == "serving"


def test_a_higher_number_reported_by_a_refusal_is_risen_above() -> None:
    told = serving(0, 1)
    told.hear(1, Rejected(told.core.epoch, Epoch(8, B)))
    assert [p.epoch for p in proposed(told.wait(1.0))] == [Epoch(9, A)]


def test_a_refusal_reaches_the_coordinator_through_whoever_got_it() -> None:
    told = serving(1, 0, 2)
    refusal = Rejected(Epoch(1, A), Epoch(8, C))
    assert told.hear(2, refusal) == [Send(A, refusal)]
    assert told.hear(2, refusal) == []


def test_two_who_both_think_they_lead_do_not_race() -> None:
    told = serving(0, 1, 2)
    start = told.core.epoch.number
    for _ in range(50):
        told.hear(2, propose(told.core.epoch.number + 1, 2, 2))
        told.wait(0.2)
    assert told.core.epoch.number - start < 2 * 12


# -- anything ----------------------------------------------------------------------------------------------------------


class AnythingGoes(RuleBasedStateMachine):
    """Whatever is said in whatever order: epochs never go back, routes are told once, and timers move on."""

    def __init__(self) -> None:
        super().__init__()
        self.told = Told(1, 0, 2, 3)
        self.epoch = NO_EPOCH
        self.served = False

    nodes = st.sampled_from([0, 2, 3])
    epochs = st.builds(lambda n, i: Epoch(n, node_id(i)), st.integers(0, 8), st.integers(0, 3))
    rings = st.sampled_from([(), (0,), (1,), (0, 1), (1, 2), (2, 1, 3), (3, 2)])

    def check(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Adopt):
                assert effect.epoch > self.epoch
                self.epoch = effect.epoch
            elif isinstance(effect, Served):
                assert effect.epoch == self.told.core.epoch or effect.epoch <= self.epoch
                self.served = True
            elif isinstance(effect, Unserved):
                assert self.served
                self.served = False

    @rule(sender=nodes, epoch=epochs, ring=rings, lifts=epochs)
    def propose(self, sender: int, epoch: Epoch, ring: tuple[int, ...], lifts: Epoch) -> None:
        message = Propose(epoch, layout_of(*ring) if ring else None, "", lifts=lifts)
        self.check(self.told.hear(sender, message))

    @rule(
        sender=nodes,
        message=st.one_of(
            st.builds(Accepted, epochs),
            st.builds(Rejected, epochs, epochs),
            st.builds(Serving, epochs, st.sampled_from(["k1", "k2"])),
            st.builds(WorkerReady, epochs),
            st.builds(EngineDown, epochs, st.just("x")),
        ),
    )
    def say(self, sender: int, message: Accepted) -> None:
        self.check(self.told.hear(sender, message))

    @rule(event=st.sampled_from([EngineListening, EngineServing, EngineFailed]))
    def engine(self, event: type) -> None:
        epoch = self.told.core.epoch
        self.check(self.told.do(event(epoch) if event is EngineListening else event(epoch, "k")))

    @rule(node=nodes, how=st.sampled_from(["crashed", "left"]))
    def lose(self, node: int, how: str) -> None:
        self.check(self.told.lose(node, reason=how))

    @rule(node=nodes, layers=st.sampled_from([2, 6, 12]), draining=st.booleans())
    def join(self, node: int, layers: int, draining: bool) -> None:
        self.check(self.told.join(facts_of(node, layers=layers, draining=draining)))

    @rule(node=nodes)
    def restart(self, node: int) -> None:
        self.told.boots[node] = self.told.boots.get(node, 1) + 1
        self.check(self.told.see())

    @rule(pair=st.sampled_from([(A, B), (A, C), (B, D), (C, D)]))
    def cut(self, pair: tuple[str, str]) -> None:
        self.check(self.told.see(cuts=(pair,)))

    @rule(node=nodes)
    def link(self, node: int) -> None:
        self.check(self.told.do(LinkUp(node_id(node))))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.check(self.told.wait(seconds))

    @invariant()
    def status_can_be_shown(self) -> None:
        status = self.told.core.status()
        assert status.state in {"electing", "starting", "serving", "waiting"}
        assert (status.state == "serving") == self.served
        assert not math.isnan(self.told.core.next_timer() or 0.0)


AnythingGoes.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnythingGoes = AnythingGoes.TestCase


@pytest.mark.parametrize("me", [0, 1])
def test_nothing_happens_in_a_quiet_mesh(me: int) -> None:
    told = serving(me, 1 - me)
    told.wait(20.0)
    quiet = [e for e in told.wait(120.0) if not (isinstance(e, Broadcast) and isinstance(e.message, Serving))]
    assert quiet == []
