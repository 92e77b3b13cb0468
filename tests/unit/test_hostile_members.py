"""A member that says anything at all, in any order: it crashes nobody, and makes nobody say what others would refuse.

The second half matters: a node that could be made to send one message over its bounds would lose every link with it.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from mesh.election.core import Election
from mesh.election.events import NeedPlan, Planned, Tick, ViewChanged
from mesh.election.events import Received as ElectionReceived
from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.membership.events import Broadcast, LinkUp, Received, Send
from mesh.membership.events import Tick as MembershipTick
from mesh.membership.view import Member, View
from mesh.node.planning import describe_plan
from mesh.wire.codec import control_decoder, decode, encode
from mesh.wire.facts import NodeFacts
from mesh.wire.messages import (
    Accepted,
    Control,
    EngineDown,
    Facts,
    Leaving,
    Ping,
    PingAck,
    PingReq,
    Pong,
    Propose,
    Rejected,
    Rumour,
    Serving,
    WorkerReady,
)
from tests.hostile import values
from tests.sim.fakes import facts_of, node_id, plan

ME = 0
OTHERS = (1, 2)
SENDERS = st.sampled_from([node_id(number) for number in (*OTHERS, 3)])
PATIENT = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GOSSIP = values(Ping | Pong | PingReq | PingAck | Rumour | Facts | Leaving)
VOTES = values(Propose | Accepted | Rejected | Serving | WorkerReady | EngineDown)
ANYTHING = values(Control)


def words(mostly: st.SearchStrategy[Any]) -> st.SearchStrategy[list[tuple[str, Any, int, float]]]:
    """Who says what how often, and the time that passes after."""
    word = st.tuples(SENDERS, mostly | mostly | ANYTHING, st.sampled_from([1, 1, 2]), st.floats(0, 30))
    return st.lists(word, max_size=12)


def check(effects: list[Any]) -> None:
    for effect in effects:
        if isinstance(effect, Send | Broadcast):
            decode(control_decoder, encode(effect.message)[4:])
    assert len(effects) < 1000


@PATIENT
@given(words(GOSSIP))
def test_any_gossip_is_survived_and_answered_within_bounds(said: list[tuple[str, Any, int, float]]) -> None:
    core, now = Membership(facts_of(ME), 1_700_000_000 << BOOT_SHIFT), 100.0
    for other in OTHERS:
        core.handle(LinkUp(node_id(other), facts_of(other)), now)
    for sender, message, times, pause in said:
        for _ in range(times):
            check(core.handle(Received(sender, message), now))
        due = core.next_timer()
        assert due is None or due >= 0
        now += pause
        check(core.handle(MembershipTick(), now))
    assert core.view().facts


@PATIENT
@given(words(VOTES))
def test_any_votes_are_survived_and_answered_within_bounds(said: list[tuple[str, Any, int, float]]) -> None:
    core, now = Election(node_id(ME), seen=0, jitter=0.0), 100.0

    def do(event: Any) -> None:
        effects = list(core.handle(event, now))
        check(effects)
        for effect in effects:
            if isinstance(effect, NeedPlan):
                layout, why = plan(effect.members, effect.current, effect.excluded, effect.cuts)
                do(Planned(effect.request_id, layout, why))

    do(ViewChanged(View(node_id(ME), tuple(Member(facts_of(i), boot=1) for i in (ME, *OTHERS)), (), frozenset())))
    for sender, message, times, pause in said:
        for _ in range(times):
            do(ElectionReceived(sender, message))
        now += pause
        do(Tick())
    assert core.status().state


# Members may say anything of themselves, of models and of links, each with facts of its own or those of an honest one.
@given(st.lists(values(NodeFacts), min_size=1, max_size=2), st.booleans())
@settings(PATIENT, max_examples=25)
def test_whatever_members_say_of_themselves_a_plan_is_made_or_refused(said: list[NodeFacts], agree: bool) -> None:
    members = [facts_of(ME)]
    for number, facts in enumerate(said, 1):
        honest = facts_of(number)
        wanted = {"models": honest.models, "wants": honest.wants, "engine": honest.engine} if agree else {}
        members.append(structs.replace(facts, id=honest.id, **wanted))
    answer = describe_plan(NeedPlan(1, tuple(members), None, {}, frozenset()), members[0].id, ())
    assert answer["layout"] is not None or answer["reason"]
    if answer["layout"] is not None:
        assert 0 <= answer["layout"]["predicted_ms_per_token"] < float("inf")
