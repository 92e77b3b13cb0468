"""What a lite client may say and ask for, and when grants run out."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from msgspec.structs import replace

from mesh.identity.grants import Roster, found_mesh, sign_grant, sign_revocation
from mesh.identity.key import NodeKey
from mesh.membership.lapse import DEMOTED, EXPIRED, REVOKED, Lapse, Lapses
from mesh.membership.rights import may_open, may_say
from mesh.wire.facts import Epoch, Role
from mesh.wire.messages import (
    Accepted,
    Control,
    EngineDown,
    Facts,
    LoadProgress,
    Open,
    OpenHttp,
    OpenProbe,
    OpenPush,
    OpenRpc,
    Propose,
    Rejected,
    Serving,
    WorkerReady,
)
from tests.sim.fakes import facts_of, node_id

ME = node_id(1)
EPOCH = Epoch(7, node_id(2))
MADE_BY_WORKERS = [
    Propose(EPOCH, None, ""), Serving(EPOCH, "key"), WorkerReady(EPOCH), EngineDown(EPOCH, ""),
    LoadProgress(EPOCH, ME, 1, 2),
]  # fmt: skip
FOUNDER, SUBJECT, INVITED = (NodeKey.from_seed(bytes([n]) * 32) for n in range(3))


@pytest.mark.parametrize("message", MADE_BY_WORKERS, ids=lambda message: type(message).__name__)
def test_a_client_has_no_part_in_layouts(message: Any) -> None:
    assert not may_say("client", ME, message)
    assert may_say("worker", ME, message)


def test_a_client_may_say_which_layouts_it_knows_of() -> None:
    assert may_say("client", ME, Accepted(EPOCH))
    assert may_say("client", ME, Rejected(EPOCH, EPOCH))


def test_a_client_speaks_for_itself_only_and_as_a_client() -> None:
    mine = replace(facts_of(1), role="client")
    assert may_say("client", mine.id, Facts(mine))
    assert not may_say("client", mine.id, Facts(facts_of(1))), "it would be planned with as a worker"
    assert not may_say("client", ME, Facts(facts_of(2)))
    assert may_say("worker", ME, Facts(facts_of(2)))


def test_a_client_may_not_ask_for_a_workers_streams() -> None:
    for request in (OpenRpc(EPOCH), OpenPush(EPOCH)):
        assert not may_open("client", request)
        assert may_open("worker", request)
    for harmless in (OpenHttp(EPOCH), OpenProbe()):
        assert may_open("client", harmless)


def test_every_message_and_stream_was_thought_of() -> None:
    """Who adds one decides here whether it is a worker's."""
    of_workers = {type(message) for message in MADE_BY_WORKERS}
    of_all = {
        "Join", "Joined", "Hello", "Move", "Refused", "Ping", "Pong", "PingReq", "PingAck", "Rumour", "Facts",
        "Members", "Revoke", "Leaving", "Knock", "Seen", "Introduce", "Meet", "Carry", "Carried", "Apart", "Accepted",
        "Rejected",
        "Ask", "Still", "Asked", "Prove", "Proven", "Mistyped", "Approve", "Approved",
    }  # fmt: skip
    assert {kind.__name__ for kind in get_args(Control)} == of_all | {kind.__name__ for kind in of_workers}
    assert {kind.__name__ for kind in get_args(Open)} == {
        "OpenControl", "OpenRpc", "OpenPush", "OpenHttp", "OpenProbe",
    }  # fmt: skip


def roster(*grants: tuple[NodeKey, NodeKey, Role, int]) -> Roster:
    chain = [found_mesh(FOUNDER, 1000)]
    for issuer, subject, role, expires_at in grants:
        chain.append(
            sign_grant(
                issuer, mesh=FOUNDER.id, subject=subject.public, role=role, wall=1000, expires_at=expires_at
            )
        )  # fmt: skip
    return Roster(FOUNDER.id, FOUNDER.public, chain)


def linked(*members: tuple[NodeKey, Role]) -> dict[str, tuple[bytes, Role]]:
    return {key.id: (key.public, role) for key, role in members}


def test_a_grant_that_expires_ends_the_standing_of_its_holder() -> None:
    lapses = Lapses(roster((FOUNDER, SUBJECT, "worker", 2000)), 1500)
    assert not lapses.due(1999)
    assert lapses.lapsed(linked((SUBJECT, "worker"), (FOUNDER, "worker")), 1999) == []
    assert lapses.due(2000)
    assert lapses.lapsed(linked((SUBJECT, "worker"), (FOUNDER, "worker")), 2000) == [Lapse(SUBJECT.id, EXPIRED)]
    assert not lapses.due(2001), "asked once"


def test_who_was_invited_by_somebody_whose_time_is_over_goes_with_it() -> None:
    lapses = Lapses(roster((FOUNDER, SUBJECT, "worker", 2000), (SUBJECT, INVITED, "worker", 0)), 1500)
    assert lapses.lapsed(linked((INVITED, "worker")), 1999) == []
    assert lapses.lapsed(linked((INVITED, "worker")), 2000) == [Lapse(INVITED.id, EXPIRED)]


def test_a_worker_who_is_only_a_client_any_more_is_one_no_longer() -> None:
    lapses = Lapses(roster((FOUNDER, SUBJECT, "worker", 2000), (FOUNDER, SUBJECT, "client", 0)), 1500)
    [lapse] = lapses.lapsed(linked((SUBJECT, "worker")), 2000)
    assert lapse == Lapse(SUBJECT.id, DEMOTED)
    assert not lapse.is_out
    assert lapses.lapsed(linked((SUBJECT, "client")), 2000) == []


def test_a_longer_grant_takes_over_from_one_that_expires() -> None:
    lapses = Lapses(roster((FOUNDER, SUBJECT, "worker", 2000), (FOUNDER, SUBJECT, "worker", 3000)), 1500)
    assert lapses.due(2500)
    assert lapses.lapsed(linked((SUBJECT, "worker")), 2500) == []


def test_a_clock_that_jumps_over_the_end_does_not_miss_it() -> None:
    lapses = Lapses(roster((FOUNDER, SUBJECT, "worker", 2000)), 1500)
    assert lapses.due(1e9)


def test_the_revoked_are_told_from_the_expired() -> None:
    found = roster((FOUNDER, SUBJECT, "worker", 0))
    found.revoke([sign_revocation(FOUNDER, mesh=FOUNDER.id, subject=SUBJECT.public, wall=1600)], 1600)
    assert Lapses(found, 1500).lapsed(linked((SUBJECT, "worker")), 1700) == [Lapse(SUBJECT.id, REVOKED)]
