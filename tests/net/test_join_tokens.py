"""What a token opens, and what people are told when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from mesh.errors import AdmissionError, MeshError, TransportError
from mesh.identity.grants import Roster
from mesh.identity.invite import Invite, InviteBook
from mesh.identity.key import NodeKey
from mesh.membership.join import JoinResult, join
from mesh.transport.endpoint import Endpoint
from tests.eventually import eventually
from tests.net.party import Node, Party


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


@pytest.fixture
async def lane(party: Party) -> AsyncIterator[Endpoint]:
    lane = await party.lane()
    yield lane
    await lane.close()


async def knock(lane: Endpoint, invite: Invite, party: Party, timeout: float = 5.0) -> JoinResult:
    return await join(lane, invite, name="new", public=lane.key.public, wall=party.wall, timeout=timeout)


async def refusal(lane: Endpoint, invite: Invite, party: Party, timeout: float = 5.0) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await knock(lane, invite, party, timeout)
    assert caught.value.remedy
    return caught.value


async def test_a_token_makes_a_member(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: ben.ups)
    key = NodeKey.generate()
    lane = await party.lane(key)
    result = await knock(lane, Invite.decode(anna.invite().encode()), party)
    await lane.close()
    assert (result.mesh, result.mesh_name, result.founder) == (party.founder.id, "home", party.founder.public)
    assert {member.id for member in result.members} == {anna.key.id, ben.key.id}

    new = Node("new", key, Roster(result.mesh, result.founder, result.grants), InviteBook(None), members=result.members)
    party.nodes.append(await new.start())
    await eventually(lambda: {*new.ups} == {anna.key.id, ben.key.id})
    assert anna.saves > 0
    assert ben.roster.role_of(key.public, party.wall) == "worker", "the others learned of it"


async def test_a_member_that_was_let_in_can_invite_in_turn(party: Party) -> None:
    anna = await party.node("anna")
    key = NodeKey.generate()
    lane = await party.lane(key)
    result = await knock(lane, anna.invite(), party)
    await lane.close()
    new = Node("new", key, Roster(result.mesh, result.founder, result.grants), InviteBook(None), members=result.members)
    party.nodes.append(await new.start())
    other = await party.lane()
    grandchild = await knock(other, new.invite(role="client"), party)
    await other.close()
    roster = Roster(grandchild.mesh, grandchild.founder, grandchild.grants)
    assert roster.role_of(other.key.public, party.wall) == "client"


async def test_a_client_token_makes_a_client(party: Party, lane: Endpoint) -> None:
    anna = await party.node("anna")
    result = await knock(lane, anna.invite(role="client"), party)
    assert Roster(result.mesh, result.founder, result.grants).role_of(lane.key.public, party.wall) == "client"


async def test_a_spent_token_admits_nobody(party: Party, lane: Endpoint) -> None:
    anna = await party.node("anna")
    invite = anna.invite(uses=1)
    await knock(lane, invite, party)
    other = await party.lane()
    assert (await refusal(other, invite, party)).code == "spent"
    await other.close()
    assert anna.roster.role_of(other.key.public, party.wall) is None


async def test_one_use_admits_one_of_many_who_come_at_once(party: Party) -> None:
    anna = await party.node("anna")
    invite = anna.invite(uses=1)
    lanes = [await party.lane() for _ in range(5)]
    results = await asyncio.gather(*(knock(lane, invite, party) for lane in lanes), return_exceptions=True)
    for lane in lanes:
        await lane.close()
    assert sum(isinstance(result, JoinResult) for result in results) == 1
    assert {result.code for result in results if isinstance(result, MeshError)} == {"spent"}


async def test_joining_twice_after_a_lost_answer_burns_one_use(party: Party, lane: Endpoint) -> None:
    anna = await party.node("anna")
    invite = anna.invite(uses=1)
    first = await knock(lane, invite, party)
    assert (await knock(lane, invite, party)).grants == first.grants


async def test_an_expired_token_admits_nobody(party: Party, lane: Endpoint) -> None:
    anna = await party.node("anna")
    error = await refusal(lane, anna.invite(lifetime_s=60, wall=party.wall - 3600), party)
    assert (type(error), error.code) == (AdmissionError, "expired")


async def test_an_unknown_token_admits_nobody(party: Party, lane: Endpoint) -> None:
    anna = await party.node("anna")
    invite = msgspec.structs.replace(anna.invite(), secret=b"guess" * 4)
    assert (await refusal(lane, invite, party)).code == "unknown"


async def test_the_secret_does_not_leave_for_another_key(party: Party, lane: Endpoint) -> None:
    anna, mallory = await party.node("anna"), await party.node("mallory")
    invite = msgspec.structs.replace(anna.invite(), addresses=(mallory.address,))
    error = await refusal(lane, invite, party)
    assert error.code == "wrong-key"
    assert anna.key.id in error.message
    assert mallory.key.id in error.message


async def test_one_good_address_among_bad_ones_is_enough(party: Party, lane: Endpoint) -> None:
    anna, mallory = await party.node("anna"), await party.node("mallory")
    bad = ("127.0.0.1:9", mallory.address, "no.such.host.invalid:7842")
    invite = msgspec.structs.replace(anna.invite(), addresses=(*bad, anna.address))
    assert (await knock(lane, invite, party)).address == anna.address


async def test_what_was_tried_is_listed_when_nobody_answers(party: Party, lane: Endpoint) -> None:
    anna = await party.node("anna")
    invite = msgspec.structs.replace(anna.invite(), addresses=("127.0.0.1:9", "127.0.0.1:11"))
    error = await refusal(lane, invite, party, timeout=0.3)
    assert (type(error), error.code) == (TransportError, "unreachable")
    assert "127.0.0.1:9" in error.message
    assert "127.0.0.1:11" in error.message


async def test_guessing_is_slowed_down(party: Party, lane: Endpoint) -> None:
    anna = await party.node("anna")
    codes = []
    for n in range(12):
        guess = msgspec.structs.replace(anna.invite(), secret=bytes([n]) * 16)
        codes.append((await refusal(lane, guess, party)).code)
    assert codes[0] == "unknown"
    assert codes[-1] == "too-many"
    assert (await refusal(lane, anna.invite(), party)).code == "too-many", "even with a good token, for a minute"


async def test_a_client_cannot_invite(party: Party, lane: Endpoint) -> None:
    client = await party.node("carl", party.member_key("client"), role="client")
    assert (await refusal(lane, client.invite(), party)).code == "unknown"
