"""Members find each other, keep one link each, and part properly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh.errors import AdmissionError, TransportError
from mesh.identity.key import NodeKey
from mesh.wire.codec import encode
from mesh.wire.facts import Epoch
from mesh.wire.messages import Accepted, Leaving, Opened, OpenFailed, OpenHttp, OpenRpc, Ping, Pong
from tests.eventually import eventually
from tests.net.party import Party

EPOCH = Epoch(1, "a" * 26)


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


async def test_messages_arrive_once_and_in_order(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    for seq in range(500):
        assert ben.links.send(anna.key.id, Ping(seq))
        anna.links.broadcast(Pong(seq))
    await eventually(lambda: len(anna.messages) == 500 and len(ben.messages) == 500)
    assert anna.messages == [(ben.key.id, Ping(seq)) for seq in range(500)]
    assert ben.messages == [(anna.key.id, Pong(seq)) for seq in range(500)]


async def test_a_message_to_nobody_is_not_sent(party: Party) -> None:
    anna = await party.node("anna")
    assert not anna.links.send("b" * 26, Ping(1))
    with pytest.raises(TransportError):
        await anna.links.open_bulk("b" * 26, OpenRpc(EPOCH))


@pytest.mark.parametrize("attempt", range(6))
async def test_two_who_dial_at_once_keep_the_same_one_link(party: Party, attempt: int) -> None:
    anna, ben = await asyncio.gather(party.node("anna"), party.node("ben"))
    anna.links.learn(ben.where())
    ben.links.learn(anna.where())
    await eventually(lambda: anna.links.peers() and ben.links.peers())
    anna.links.broadcast(Ping(1))
    ben.links.broadcast(Ping(2))
    await eventually(lambda: anna.messages and ben.messages)
    await eventually(lambda: anna.endpoint.connections == 1 and ben.endpoint.connections == 1)
    at_anna, at_ben = anna.links.link(ben.key.id), ben.links.link(anna.key.id)
    assert at_anna and at_ben
    assert at_anna.connection.dialed != at_ben.connection.dialed, "both kept the same one"
    assert (anna.ups, ben.ups) == ([ben.key.id], [anna.key.id]), "no flapping"
    assert not anna.downs
    assert not ben.downs


async def test_one_introduction_is_enough_for_all(party: Party) -> None:
    """Ben and Carl know only Anna; gossip makes them find each other."""
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: ben.ups)
    carl = await party.node("carl", knows=(anna,))
    await eventually(lambda: carl.key.id in ben.ups and ben.key.id in carl.ups)
    assert {member.id for member in carl.links.members} == {anna.key.id, ben.key.id}
    assert ben.saves > 0


async def test_a_grant_that_one_member_lacks_comes_with_the_newcomer(party: Party) -> None:
    anna = await party.node("anna")
    key = party.member_key()  # granted after Anna's roster was made
    ben = await party.node("ben", key, knows=(anna,))
    await eventually(lambda: anna.ups == [ben.key.id])
    assert anna.roster.role_of(key.public, party.wall) == "worker"


async def test_a_good_bye_queued_before_the_close_is_heard(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    ben.links.broadcast(Leaving("going home"))
    await ben.stop("going home")
    await eventually(lambda: anna.downs)
    assert anna.messages == [(ben.key.id, Leaving("going home"))]
    assert anna.links.peers() == {}


async def test_a_restarted_member_is_linked_again(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    port = int(ben.address.rpartition(":")[2])
    await ben.stop("restart")
    await eventually(lambda: anna.downs)
    again = await party.node("ben", ben.key, port=port)  # it knows nobody: Anna must dial
    await eventually(lambda: again.ups == [anna.key.id], within=10)
    anna.links.send(ben.key.id, Ping(7))
    await eventually(lambda: (anna.key.id, Ping(7)) in again.messages)


async def test_a_member_that_crashed_and_came_back_replaces_its_dead_link(party: Party) -> None:
    """Nobody told Anna that the old link is dead; the new connection does, long before any timeout."""
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    link = anna.links.link(ben.key.id)
    assert link
    link.since -= 60
    port = await ben.vanish()
    assert anna.links.link(ben.key.id) is link
    again = await party.node("ben", ben.key, knows=(anna,), port=port)
    await eventually(lambda: again.ups == [anna.key.id] and len(anna.ups) == 2, within=10)
    assert [peer for peer, _ in anna.downs] == [ben.key.id]


async def test_a_dropped_link_comes_back(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    anna.links.drop(ben.key.id, "test")
    await eventually(lambda: len(anna.ups) == 2 and len(ben.ups) == 2)
    assert anna.downs == [(ben.key.id, "test")]
    assert ben.downs == [(anna.key.id, "test")]


async def test_bulk_streams_are_opened_answered_and_refused(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)

    opening = asyncio.create_task(ben.links.open_bulk(anna.key.id, OpenRpc(EPOCH)))
    await eventually(lambda: anna.bulk)
    peer, request, stream = anna.bulk.pop()
    assert (peer, request) == (ben.key.id, OpenRpc(EPOCH))
    await stream.write(encode(Opened()) + b"raw")
    ours = await opening
    assert await ours.read_exactly(3) == b"raw"
    await ours.write(b"back")
    assert await stream.read_exactly(4) == b"back"

    opening = asyncio.create_task(anna.links.open_bulk(ben.key.id, OpenHttp(EPOCH)))
    await eventually(lambda: ben.bulk)
    await ben.bulk.pop()[2].write(encode(OpenFailed("fenced", "a newer layout is in force")))
    with pytest.raises(AdmissionError, match="newer layout") as caught:
        await opening
    assert caught.value.code == "fenced"


async def test_an_unanswered_bulk_stream_times_out_and_is_reset(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    with pytest.raises(TransportError, match="did not answer"):
        await ben.links.open_bulk(anna.key.id, OpenRpc(EPOCH), timeout=0.2)
    await eventually(lambda: anna.bulk)
    with pytest.raises(TransportError):
        await anna.bulk[0][2].read()


async def test_small_messages_do_not_queue_behind_bulk(party: Party) -> None:
    """A bulk stream that nobody reads fills its window; control messages still go through at once."""
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    opening = asyncio.create_task(ben.links.open_bulk(anna.key.id, OpenRpc(EPOCH)))
    await eventually(lambda: anna.bulk)
    await anna.bulk[0][2].write(encode(Opened()))
    stream = await opening
    flood = asyncio.create_task(stream.write(bytes(64 << 20)))
    ben.links.send(anna.key.id, Ping(1))
    await eventually(lambda: anna.messages, within=2)
    assert not flood.done()
    flood.cancel()


async def test_any_packet_is_a_sign_of_life(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    before = anna.links.last_heard(ben.key.id)
    assert before is not None
    ben.links.send(anna.key.id, Accepted(EPOCH))
    await eventually(lambda: (anna.links.last_heard(ben.key.id) or 0) > before)


async def test_a_flood_of_unread_messages_drops_the_link(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    note = Leaving("x" * 1000)
    for _ in range(20_000):  # without ever letting the loop run: nobody can read
        ben.links.send(anna.key.id, note)
    assert [peer for peer, _ in ben.downs] == [anna.key.id]


async def test_revocation_closes_live_links_everywhere(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    carl = await party.node("carl", knows=(anna, ben))
    await eventually(lambda: len(anna.ups) == len(ben.ups) == len(carl.ups) == 2)
    anna.links.revoke(carl.key.id)
    await eventually(lambda: carl.key.id not in anna.links.peers() and carl.key.id not in ben.links.peers())
    await eventually(lambda: carl.expelled)
    assert ben.roster.is_revoked(carl.key.public)
    assert carl.key.id not in {member.id for member in ben.links.members}
    assert ben.key.id in anna.links.peers()


async def test_a_revoked_member_does_not_come_back(party: Party) -> None:
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    anna.links.revoke(ben.key.id)
    await eventually(lambda: any(refused.code == "revoked" for refused in ben.expelled))
    again = await party.node("ben", ben.key, knows=(anna,))
    await eventually(lambda: again.expelled)
    assert again.expelled[0].code == "revoked"
    assert anna.links.peers() == {}


async def test_only_known_nodes_are_revoked(party: Party) -> None:
    anna = await party.node("anna")
    with pytest.raises(AdmissionError, match="knows no node"):
        anna.links.revoke(NodeKey.generate().id)


async def test_a_clients_grant_does_not_make_a_worker(party: Party) -> None:
    anna = await party.node("anna")
    client = await party.node("dora", party.member_key("client"), role="client", knows=(anna,))
    await eventually(lambda: anna.ups == [client.key.id])
    link = anna.links.link(client.key.id)
    assert link
    assert link.role == "client"
    client.role = "worker"  # claims more at the next Hello
    client.links.drop(anna.key.id, "test")
    await eventually(lambda: anna.downs)
    await asyncio.sleep(1)
    assert anna.ups == [client.key.id]
    assert not anna.links.peers()


async def test_a_lite_client_that_left_is_not_looked_for(party: Party) -> None:
    anna = await party.node("anna")
    client = await party.node("dora", party.member_key("client"), role="client", knows=(anna,))
    await eventually(lambda: anna.ups and client.ups)
    await client.stop()
    await eventually(lambda: anna.downs)
    assert anna.links.members == ()
    await eventually(lambda: anna.endpoint.connections == 0)
