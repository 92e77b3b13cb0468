"""Membership that ends ends live links, over every lane and path, within seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import pytest

from mesh.errors import MeshError, TransportError
from mesh.identity.grants import sign_grant, sign_revocation
from mesh.identity.key import NodeKey
from mesh.membership.join import JoinResult, join
from mesh.membership.lapse import EXPIRED
from mesh.transport.lane import Stream
from mesh.transport.tcpstream import TcpStream
from mesh.wire.codec import encode
from mesh.wire.facts import Epoch, Role
from mesh.wire.messages import Facts, Members, Opened, OpenHttp, OpenPush, OpenRpc, Ping, Propose, Revoke, Serving
from tests.eventually import eventually
from tests.net.party import Node, Party, facts_of
from tests.net.test_links_across import parted

EPOCH = Epoch(1, "a" * 26)
SOON_S = 5.0
"""What the contract says of revocations."""


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


def short_lived(party: Party, seconds: float, role: Role = "worker") -> NodeKey:
    """A key whose grant expires soon."""
    key = NodeKey.generate()
    until = int(party.wall + seconds) + 1
    party.grants.append(
        sign_grant(
            party.founder, mesh=party.founder.id, subject=key.public, role=role, wall=party.wall, expires_at=until
        )
    )
    return key


async def opened(dialer: Node, listener: Node) -> tuple[Stream, Stream]:
    """Both ends of a bulk stream with something on it."""
    opening = asyncio.create_task(dialer.links.open_bulk(listener.key.id, OpenRpc(EPOCH)))
    await eventually(lambda: listener.bulk)
    _, _, theirs = listener.bulk.pop()
    await theirs.write(encode(Opened()))
    ours = await opening
    await ours.write(b"there")
    assert await theirs.read_exactly(5) == b"there"
    return ours, theirs


async def broken(*streams: Stream) -> None:
    for stream in streams:
        with pytest.raises(TransportError):
            while await asyncio.wait_for(stream.read(), SOON_S):
                pass


async def test_a_grant_that_expires_closes_live_links_everywhere(party: Party) -> None:
    """It was looked at when a link came up, and never again."""
    carls = short_lived(party, 2)
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    carl = await party.node("carl", carls, knows=(anna, ben))
    await eventually(lambda: len(anna.ups) == len(ben.ups) == len(carl.ups) == 2)
    ours, theirs = await opened(carl, anna)
    await eventually(lambda: carls.id not in anna.links.peers() and carls.id not in ben.links.peers(), within=8)
    assert time.time() > party.wall + 2
    assert (carls.id, EXPIRED) in anna.downs
    await broken(ours, theirs)
    await eventually(lambda: carl.expelled)
    assert carls.id not in {member.id for member in anna.links.members}, "and nobody dials it any more"
    assert ben.key.id in anna.links.peers(), "the others stay linked"
    assert carls.id not in anna.links.peers()


async def test_a_node_notices_that_its_own_grant_expired(party: Party) -> None:
    carls = short_lived(party, 1)
    carl = await party.node("carl", carls)
    await eventually(lambda: carl.expelled, within=8)
    assert carl.expelled[0].code == "expired"


async def test_an_expired_member_does_not_come_back(party: Party) -> None:
    late = short_lived(party, -10)
    anna = await party.node("anna")
    carl = await party.node("carl", late, knows=(anna,))
    await eventually(lambda: carl.expelled)
    assert not anna.ups


async def test_a_revoked_members_bulk_over_tcp_ends_in_time(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    carl = await party.node("carl", knows=(anna, ben))
    await eventually(lambda: len(anna.ups) == len(ben.ups) == len(carl.ups) == 2)
    link = carl.links.link(ben.key.id)
    assert link
    await eventually(lambda: link.path == "tcp", within=15)
    ours, theirs = await opened(carl, ben)
    assert isinstance(ours, TcpStream)
    began = time.monotonic()
    anna.links.revoke(carl.key.id)
    await broken(theirs, ours)
    await eventually(lambda: ben.tcp.connections == 0 and carl.key.id not in ben.links.peers())
    assert time.monotonic() - began < SOON_S


async def test_a_revoked_members_relayed_links_and_its_relaying_end_in_time(party: Party) -> None:
    """As an end of a relayed path, and as the one that carries."""
    [relay, other], a, b, _ = await parted(party, "relay", "other")
    began = time.monotonic()
    other.links.revoke(a.key.id)
    await eventually(lambda: a.key.id not in b.links.peers() and a.key.id not in relay.links.peers())
    await eventually(lambda: relay.links.ways.relaying[0] == 0 and other.links.ways.relaying[0] == 0)
    assert time.monotonic() - began < SOON_S
    await eventually(lambda: any(refused.code == "revoked" for refused in a.expelled))
    assert a.key.id not in b.links.peers()


async def test_a_relay_that_is_revoked_carries_no_more(party: Party) -> None:
    [relay, other], a, b, _ = await parted(party, "relay", "other")
    link = a.links.link(b.key.id)
    assert link
    carrier = relay if link.address.endswith(relay.key.id) else other
    rest = other if carrier is relay else relay
    rest.links.revoke(carrier.key.id)
    await eventually(lambda: not carrier.links.peers())
    await eventually(lambda: carrier.links.ways.relaying[0] == 0)

    def carried_by_the_other() -> bool:
        way = a.links.link(b.key.id)
        return way is not None and way.address == f"relay:{rest.key.id}"

    await eventually(carried_by_the_other, within=15)


async def test_who_is_revoked_while_it_waits_at_the_door_is_not_let_in(party: Party) -> None:
    """Its Hello was weighed before; the answer to it was not."""
    bens = party.member_key()
    anna = await party.node("anna")
    waiting = asyncio.Event()
    go_on = asyncio.Event()

    async def outcome(peer: str, timeout: float) -> None:
        waiting.set()
        await go_on.wait()

    choices: Iterator[Literal["take", "wait"]] = iter(["wait", "take", "take", "take"])
    anna.links.choice = lambda peer: next(choices)  # type: ignore[method-assign]
    anna.links.outcome_of_our_dial = outcome  # type: ignore[method-assign]
    ben = await party.node("ben", bens, knows=(anna,))
    await asyncio.wait_for(waiting.wait(), 5)
    anna.links.revoke(bens.id)
    go_on.set()
    await eventually(lambda: ben.expelled)
    assert anna.ups == []
    assert anna.links.peers() == {}


# -- what a role allows ------------------------------------------------------------------------------------------------


async def worker_and_client(party: Party) -> tuple[Node, Node]:
    anna = await party.node("anna")
    dora = await party.node("dora", party.member_key("client"), role="client", knows=(anna,))
    await eventually(lambda: anna.ups and dora.ups)
    return anna, dora


async def test_a_client_gets_no_rpc_or_push_stream(party: Party) -> None:
    anna, dora = await worker_and_client(party)
    for request in (OpenRpc(EPOCH), OpenPush(EPOCH)):
        with pytest.raises(MeshError):
            await dora.links.open_bulk(anna.key.id, request, timeout=3)
    assert anna.bulk == []
    opening = asyncio.create_task(dora.links.open_bulk(anna.key.id, OpenHttp(EPOCH)))
    await eventually(lambda: anna.bulk)
    await anna.bulk[0][2].write(encode(Opened()))
    await opening


async def test_a_client_cannot_propose_layouts_or_pose_as_a_worker(party: Party) -> None:
    anna, dora = await worker_and_client(party)
    for word in (
        Propose(EPOCH, None, "mine"), Serving(EPOCH, "key"), Facts(facts_of(dora.key, "dora", "worker")),
        Facts(facts_of(anna.key, "anna")),
    ):  # fmt: skip
        assert dora.links.send(anna.key.id, word)
    dora.links.send(anna.key.id, Ping(1))
    await eventually(lambda: anna.messages)
    assert anna.messages == [(dora.key.id, Ping(1))]


async def test_a_client_vouches_for_nobody(party: Party) -> None:
    """Grants of a revoked issuer are taken from workers who had them before, not from those a thief could be."""
    anna, dora = await worker_and_client(party)
    thief = party.member_key()
    anna.roster.add(party.grants, party.wall, vouched=True)
    anna.links.revoke(thief.id)
    antedated = sign_grant(
        thief, mesh=party.founder.id, subject=NodeKey.generate().public, role="worker", wall=party.wall - 9999
    )
    dora.links.send(anna.key.id, Members((), (antedated,)))
    dora.links.send(anna.key.id, Ping(1))
    await eventually(lambda: anna.messages)
    assert antedated not in anna.roster.grants


async def test_what_was_said_before_is_not_news_when_it_is_said_again(party: Party) -> None:
    """Replayed and reordered: a revocation, grants, tickets that were told already change nothing and reach nobody."""
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    gone = party.member_key()
    anna.roster.add(party.grants, party.wall, vouched=True)
    revocation = anna.links.revoke(gone.id)
    older = sign_revocation(anna.key, mesh=party.founder.id, subject=gone.public, wall=party.wall - 50)
    again = sign_grant(party.founder, mesh=party.founder.id, subject=gone.public, role="worker", wall=time.time() + 60)
    anna.roster.add([again], time.time() + 61)
    assert not anna.roster.is_revoked(gone.public), "it was let in again since"
    saves = anna.saves
    for _ in range(3):
        for word in (Revoke(revocation), Revoke(older), Members((), tuple(party.grants)), Ping(1)):
            ben.links.send(anna.key.id, word)
    await eventually(lambda: len(anna.messages) == 3)
    assert anna.saves == saves
    assert not anna.roster.is_revoked(gone.public)
    assert anna.links.peers().keys() == {ben.key.id}


# -- tokens under races ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", [1, 3])
async def test_a_token_admits_as_many_as_it_says_when_all_come_at_once(party: Party, uses: int) -> None:
    anna = await party.node("anna")
    invite = anna.invite(uses=uses)
    lanes = [await party.lane() for _ in range(6)]
    results = await asyncio.gather(
        *(join(lane, invite, name="new", public=lane.key.public, wall=party.wall) for lane in lanes),
        return_exceptions=True,
    )
    for lane in lanes:
        await lane.close()
    assert sum(isinstance(result, JoinResult) for result in results) == uses
    assert {result.code for result in results if isinstance(result, MeshError)} == {"spent"}
    assert sum(anna.roster.role_of(lane.key.public, party.wall) is not None for lane in lanes) == uses


async def test_who_was_parted_when_somebody_was_revoked_learns_it_by_greeting(party: Party) -> None:
    """The greeting told, and the link to the revoked member stood on all the same."""
    anna = await party.node("anna")
    carl = await party.node("carl", knows=(anna,))
    await eventually(lambda: carl.key.id in anna.links.peers())
    ben = await party.node("ben")
    revocation = sign_revocation(party.founder, mesh=party.founder.id, subject=carl.key.public, wall=party.wall)
    ben.roster.revoke([revocation], party.wall)
    ben.links.learn(anna.where())
    await eventually(lambda: ben.key.id in anna.links.peers())
    await eventually(lambda: carl.key.id not in anna.links.peers(), within=SOON_S)
    assert (carl.key.id, "revoked") in anna.downs
    await eventually(lambda: carl.expelled)
