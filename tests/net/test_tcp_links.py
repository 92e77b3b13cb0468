"""Members open bulk streams over TCP where it works, over QUIC where it does not, and neither outlives its link."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mesh.errors import AdmissionError, TransportError
from mesh.identity.key import NodeKey
from mesh.membership import bulk
from mesh.node.run import listen_over_tcp
from mesh.notice import Notice
from mesh.transport.choice import LaneChoice, TcpFailed
from mesh.transport.lane import Stream
from mesh.transport.tcp import TcpLane, new_ticket
from mesh.transport.tcpstream import TcpStream
from mesh.wire.codec import encode
from mesh.wire.facts import Epoch
from mesh.wire.messages import Knock, Opened, OpenFailed, OpenHttp, OpenRpc
from tests.eventually import eventually
from tests.net.party import Node, Party

EPOCH = Epoch(1, "a" * 26)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that a busy machine spoils is repeated soon."""
    monkeypatch.setattr("mesh.transport.choice.FIRST_RETRY_S", 0.3)


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


async def two(party: Party, *, tcp: bool = True) -> tuple[Node, Node]:
    """Anna, who listens, and Ben, who found out which lane leads to her."""
    anna = await party.node("anna", tcp=tcp)
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: anna.ups and ben.ups)
    if tcp and anna.tcp.listening:
        await eventually(lambda: path(ben, anna) == "tcp")
        await eventually(lambda: anna.tcp.connections == 0)
    return anna, ben


def path(node: Node, to: Node) -> str:
    link = node.links.link(to.key.id)
    assert link
    return link.path


async def opened(dialer: Node, listener: Node) -> tuple[Stream, Stream]:
    """Both ends of a bulk stream."""
    opening = asyncio.create_task(dialer.links.open_bulk(listener.key.id, OpenRpc(EPOCH)))
    await eventually(lambda: listener.bulk)
    peer, request, theirs = listener.bulk.pop()
    assert (peer, request) == (dialer.key.id, OpenRpc(EPOCH))
    await theirs.write(encode(Opened()))
    return await opening, theirs


async def test_bulk_goes_over_tcp_both_ways_when_both_listen(party: Party) -> None:
    anna, ben = await two(party)
    await eventually(lambda: path(anna, ben) == "tcp")
    for dialer, listener in ((ben, anna), (anna, ben)):
        ours, theirs = await opened(dialer, listener)
        assert isinstance(ours, TcpStream)
        assert isinstance(theirs, TcpStream)
        await ours.write(b"there")
        await theirs.write(b"back")
        assert await theirs.read_exactly(5) == b"there"
        assert await ours.read_exactly(4) == b"back"


async def test_a_refusal_comes_through_and_is_no_fault_of_the_lane(party: Party) -> None:
    anna, ben = await two(party)
    opening = asyncio.create_task(ben.links.open_bulk(anna.key.id, OpenHttp(EPOCH)))
    await eventually(lambda: anna.bulk)
    await anna.bulk.pop()[2].write(encode(OpenFailed("fenced", "a newer layout is in force")))
    with pytest.raises(AdmissionError, match="newer layout"):
        await opening
    assert path(ben, anna) == "tcp"


async def test_a_member_that_does_not_listen_over_tcp_is_not_tried(party: Party) -> None:
    anna, ben = await two(party, tcp=False)
    ours, _theirs = await opened(ben, anna)
    assert not isinstance(ours, TcpStream)
    assert path(ben, anna) == "quic"
    await eventually(lambda: path(anna, ben) == "tcp")


async def test_a_dial_to_where_a_member_was_says_nothing_of_where_it_is(party: Party) -> None:
    """It ended a second after the move, and TCP to the new address was shown as QUIC for five minutes."""
    anna, ben = await two(party)
    link, lanes = ben.links.link(anna.key.id), ben.links._bulk
    assert link
    before = lanes._ways[anna.key.id]
    lanes.moved(link)
    await eventually(lambda: lanes._ways[anna.key.id].settled.is_set())
    lanes._learn(link, before, TcpFailed())
    assert path(ben, anna) == "tcp"


async def test_a_port_that_is_blocked_later_means_quic_at_once(party: Party) -> None:
    anna, ben = await two(party)
    before, _ = await opened(ben, anna)
    assert isinstance(before, TcpStream)
    await anna.tcp.stop_listening()
    began = time.monotonic()
    ours, theirs = await opened(ben, anna)
    assert time.monotonic() - began < bulk.TCP_WITHIN_S + 0.5
    assert not isinstance(ours, TcpStream)
    await ours.write(b"still here")
    assert await theirs.read_exactly(10) == b"still here"
    await before.write(b"this one stays")  # what is open is not touched


async def test_a_port_that_swallows_everything_costs_a_stream_a_second(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna, ben = await two(party)
    mute = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    link = ben.links.link(anna.key.id)
    assert link
    mute_address = f"127.0.0.1:{mute.sockets[0].getsockname()[1]}"
    monkeypatch.setattr(type(link), "address", property(lambda self: mute_address))
    began = time.monotonic()
    ours, _ = await opened(ben, anna)
    assert bulk.TCP_WITHIN_S * 0.9 < time.monotonic() - began < bulk.TCP_WITHIN_S + 1
    assert not isinstance(ours, TcpStream)
    mute.close()


async def test_a_port_that_is_open_again_is_used_again(party: Party) -> None:
    anna, ben = await two(party)
    await anna.tcp.stop_listening()
    assert not isinstance((await opened(ben, anna))[0], TcpStream)
    host, _, port = anna.address.rpartition(":")
    await anna.tcp.start([(host, int(port))])
    await eventually(lambda: path(ben, anna) == "tcp")


async def test_a_ticket_shown_before_its_knock_has_come_is_waited_for(party: Party) -> None:
    anna, ben = await two(party)
    ticket, digest = new_ticket()
    dialing = asyncio.create_task(
        ben.tcp.dial(anna.address, expect=anna.key.id, ticket=ticket, opening=encode(OpenRpc(EPOCH)), timeout=5)
    )
    await eventually(lambda: anna.links._bulk._awaited)
    ben.links.send(anna.key.id, Knock(digest))
    stream = await dialing
    await eventually(lambda: anna.bulk)
    stream.abort()


async def test_a_ticket_that_nobody_announces_is_waited_for_in_vain(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "KNOCK_WITHIN_S", 0.1)
    anna, ben = await two(party)
    with pytest.raises(TransportError):
        await ben.tcp.dial(
            anna.address, expect=anna.key.id, ticket=new_ticket()[0], opening=encode(OpenRpc(EPOCH)), timeout=5
        )
    assert not anna.bulk
    assert not anna.links._bulk._awaited


async def test_tickets_end_with_the_link_they_were_announced_on(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "KNOCK_WITHIN_S", 0.1)
    anna, ben = await two(party)
    ticket, digest = new_ticket()
    ben.links.send(anna.key.id, Knock(digest))
    await eventually(lambda: len(anna.links._bulk._knocks) == 1)
    anna.links.revoke(ben.key.id)
    await eventually(lambda: anna.downs)
    with pytest.raises(TransportError):
        await ben.tcp.dial(anna.address, expect=anna.key.id, ticket=ticket, opening=encode(OpenRpc(EPOCH)), timeout=5)
    assert not anna.bulk


async def test_streams_end_with_the_link_at_once(party: Party) -> None:
    """Whether membership declares a peer dead, or a new link takes the place of the old."""
    anna, ben = await two(party)
    ours, theirs = await opened(ben, anna)
    back, forth = await opened(anna, ben)
    reading = [asyncio.create_task(stream.read()) for stream in (ours, theirs, back, forth)]
    await asyncio.sleep(0)
    anna.links.drop(ben.key.id, "it is silent")
    for task in reading:
        with pytest.raises(TransportError):
            await asyncio.wait_for(task, 2)
    assert theirs.closed
    with pytest.raises(TransportError):
        await theirs.write(b"x")


async def test_a_revoked_members_streams_end(party: Party) -> None:
    anna, ben = await two(party)
    ours, theirs = await opened(ben, anna)
    anna.links.revoke(ben.key.id)
    with pytest.raises(TransportError):
        await asyncio.wait_for(ours.read(), 5)
    assert theirs.closed


async def test_a_member_that_vanishes_takes_its_streams_with_it(party: Party) -> None:
    anna, ben = await two(party)
    ours, _theirs = await opened(ben, anna)
    await anna.vanish()
    with pytest.raises(TransportError):
        await asyncio.wait_for(ours.read(), 2)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"], ids=["another port", "another address"])
async def test_streams_over_tcp_do_not_wait_at_an_address_that_the_peer_has_left(
    party: Party, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """A ring hung for minutes: its link had followed a machine to another address, and its bytes had not."""
    anna, ben = await two(party)
    ours, theirs = await opened(ben, anna)
    reading = asyncio.create_task(ours.read())
    await asyncio.sleep(0)
    link = ben.links.link(anna.key.id)
    assert link
    monkeypatch.setattr(type(link), "address", f"{host}:{anna.address.rpartition(':')[2]}")
    ben.links._bulk.moved(link)
    if host == "127.0.0.2":
        with pytest.raises(TransportError, match=r"is reached at 127\.0\.0\.2"):
            await asyncio.wait_for(reading, 2)
    else:
        await theirs.write(b"still here")
        assert await asyncio.wait_for(reading, 2) == b"still here"


async def test_a_node_that_stops_leaves_no_socket(party: Party) -> None:
    anna, ben = await two(party)
    await opened(ben, anna)
    await anna.stop()
    assert anna.tcp.connections == 0
    await eventually(lambda: ben.tcp.connections == 0)


async def test_many_at_once_all_go_over_tcp(party: Party) -> None:
    anna, ben = await two(party)
    openings = [asyncio.create_task(ben.links.open_bulk(anna.key.id, OpenRpc(EPOCH))) for _ in range(60)]
    for _ in openings:
        await eventually(lambda: anna.bulk)
        await anna.bulk.pop()[2].write(encode(Opened()))
    streams = await asyncio.gather(*openings)
    assert all(isinstance(stream, TcpStream) for stream in streams)


async def test_a_stream_asked_for_before_the_first_trial_is_over_waits_for_it_a_moment(
    party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = asyncio.Event()
    dial = TcpLane.dial

    async def slow(self: TcpLane, *args: object, **named: object) -> TcpStream:
        await held.wait()
        return await dial(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(TcpLane, "dial", slow)
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: ben.ups)
    opening = asyncio.create_task(ben.links.open_bulk(anna.key.id, OpenRpc(EPOCH)))
    await eventually(lambda: anna.bulk)  # it waited no longer than SETTLE_WITHIN_S, and took QUIC
    assert not isinstance(anna.bulk[0][2], TcpStream)
    await anna.bulk.pop()[2].write(encode(Opened()))
    await opening
    second = asyncio.create_task(ben.links.open_bulk(anna.key.id, OpenRpc(EPOCH)))
    held.set()
    await eventually(lambda: anna.bulk)
    assert isinstance(anna.bulk[0][2], TcpStream)
    await anna.bulk.pop()[2].write(encode(Opened()))
    await second


async def test_a_long_path_is_compared_over_both_lanes(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing counted as near, TCP on loopback still wins: its burst is measured against QUIC's."""
    monkeypatch.setattr("mesh.membership.bulk.is_near", lambda rtt_ms: False)
    monkeypatch.setattr("mesh.transport.choice.is_near", lambda rtt_ms: False)
    seen: list[object] = []
    handle = LaneChoice.handle

    def watched(self: LaneChoice, event: Any, now: float) -> None:
        seen.append(event)
        handle(self, event, now)

    monkeypatch.setattr(LaneChoice, "handle", watched)
    anna = await party.node("anna")
    ben = await party.node("ben", knows=(anna,))
    await eventually(lambda: seen)
    assert not any(isinstance(event, TcpFailed) or event.quic_burst_ms is None for event in seen)  # type: ignore[attr-defined]
    assert ben.ups


async def test_a_tcp_port_that_is_taken_is_one_warning_and_no_end() -> None:
    shown: list[Notice] = []

    class Lines:
        def show(self, notice: Notice) -> None:
            shown.append(notice)

        def progress(self, label: str, done: float, total: float, unit: str = "B") -> None: ...

        def close(self) -> None: ...

    other, ours = TcpLane(NodeKey.generate()), TcpLane(NodeKey.generate())
    bound = await other.start([("127.0.0.1", 0)])
    await listen_over_tcp(ours, bound, Lines())
    assert not ours.listening
    [notice] = shown
    assert notice.kind == "warning"
    assert f"TCP port {bound[0].rpartition(':')[2]}" in notice.text
    assert "slower on a LAN" in notice.text
    await other.close()
    await listen_over_tcp(ours, bound, Lines())
    assert ours.listening
    assert len(shown) == 1
    await ours.close()
