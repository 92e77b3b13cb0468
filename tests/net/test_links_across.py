"""Members that cannot reach each other: introduced or relayed by a third, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any

import pytest

from mesh.transport.address import split_address
from mesh.transport.lane import Stream
from mesh.wire.codec import encode
from mesh.wire.facts import Epoch
from mesh.wire.messages import Carried, Meet, Opened, OpenHttp
from tests.eventually import eventually
from tests.net.party import Node, Party

RATE = 50_000_000
REQUEST = OpenHttp(Epoch(1, "a" * 26))


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    party = Party()
    yield party
    await party.over()


class Wall:
    """Swallows what these nodes send to each other directly, until it is taken down."""

    def __init__(self, *nodes: Node) -> None:
        self.standing = True
        self.swallowed = 0
        for node in nodes:
            behind = {split_address(other.address) for other in nodes if other is not node}
            for udp in node.endpoint._sockets:
                udp.send = self._filtered(udp.send, behind)  # type: ignore[method-assign]

    def _filtered(self, send: Any, behind: set[tuple[str, int]]) -> Any:
        def filtered(datagrams: Iterable[tuple[bytes, Any]]) -> None:
            passed = []
            for data, addr in datagrams:
                if self.standing and addr[:2] in behind:
                    self.swallowed += 1
                else:
                    passed.append((data, addr))
            send(passed)

        return filtered


def path(node: Node, to: Node) -> str | None:
    link = node.links.link(to.key.id)
    return None if link is None else link.connection.path


async def parted(party: Party, *relays: str, rate: int = RATE) -> tuple[list[Node], Node, Node, Wall]:
    """Members who are all linked to the relays, and two among them that are walled off from each other."""
    carriers: list[Node] = []
    for name in relays:
        carriers.append(await party.node(name, knows=tuple(carriers), relay_rate=rate, tcp=False))
    a = await party.node("anna", knows=tuple(carriers), tcp=False)
    b = await party.node("berta", tcp=False)
    wall = Wall(a, b)
    for carrier in carriers:
        b.links.learn(carrier.where())
    await eventually(lambda: path(a, b) == path(b, a) == "relay", within=15)
    return carriers, a, b, wall


async def open_echo(a: Node, b: Node) -> tuple[Stream, asyncio.Task[None]]:
    """A bulk stream from ``a`` that ``b`` sends back."""
    opening = asyncio.ensure_future(a.links.open_bulk(b.key.id, REQUEST))
    await eventually(lambda: b.bulk)
    _, _, theirs = b.bulk.pop()

    async def echo() -> None:
        await theirs.write(encode(Opened()))
        while data := await theirs.read():
            await theirs.write(data)

    task = asyncio.ensure_future(echo())
    return await opening, task


async def round_trip(stream: Stream, size: int) -> None:
    writing = asyncio.ensure_future(stream.write(bytes(size)))
    assert await stream.read_exactly(size) == bytes(size)
    await writing


async def test_two_that_cannot_reach_each_other_are_linked_through_a_third(party: Party) -> None:
    [relay], a, b, _ = await parted(party, "relay")
    stream, _ = await open_echo(a, b)
    await round_trip(stream, 500_000)
    link = a.links.link(b.key.id)
    assert link is not None
    assert (link.path, link.address) == ("relay", f"relay:{relay.key.id}")
    pairs, carried, _ = relay.links.ways.relaying
    assert pairs == 1
    assert carried > 1_000_000
    # The third cannot be in the conversation: what it holds are datagrams of a connection between the two keys.
    assert link.connection.peer_key == b.key.public


async def test_the_third_sees_nothing_of_what_it_carries_and_cannot_change_it(party: Party) -> None:
    [relay], a, b, _ = await parted(party, "relay")
    secret = b"the words of this prompt" * 10
    seen: list[bytes] = []
    count = 0

    def meddling(send: Any) -> Any:
        def sent(data: bytes) -> bool:
            nonlocal count
            seen.append(data)
            count += 1
            if count % 7 == 0:  # a flipped bit
                data = data[:-1] + bytes((data[-1] ^ 1,))
            if count % 11 == 0:  # again, what was carried before
                send(seen[count // 2])
            return bool(send(data))

        return sent

    for peer in (a, b):
        link = relay.links.link(peer.key.id)
        assert link is not None
        link.connection.send_datagram = meddling(link.connection.send_datagram)  # type: ignore[method-assign]
    stream, _ = await open_echo(a, b)
    for _ in range(30):
        await stream.write(secret)
        assert await stream.read_exactly(len(secret)) == secret
    assert count > 60
    assert not any(secret[:8] in data for data in seen)


async def test_a_relayed_link_moves_to_a_direct_path_and_its_streams_go_on(party: Party) -> None:
    [relay], a, b, wall = await parted(party, "relay")
    stream, _ = await open_echo(a, b)
    await round_trip(stream, 10_000)
    wall.standing = False
    a.links.ways.own_addresses_changed()  # rather than wait for the next try
    await eventually(lambda: path(a, b) == path(b, a) == "quic", within=10)
    await round_trip(stream, 200_000)
    _, carried, _ = relay.links.ways.relaying
    await round_trip(stream, 200_000)
    assert relay.links.ways.relaying[1] == carried
    assert not [peer for peer, _ in a.downs if peer == b.key.id]
    link = a.links.link(b.key.id)
    assert link is not None
    assert link.path == "quic"


def goes_by(node: Node, peer: Node, relay: Node) -> bool:
    return node.links.peers()[peer.key.id].address == f"relay:{relay.key.id}"


async def test_when_a_relay_dies_another_takes_over_and_streams_go_on(party: Party) -> None:
    carriers, a, b, _ = await parted(party, "one", "two")
    stream, _ = await open_echo(a, b)
    link = a.links.link(b.key.id)
    assert link is not None
    used = next(node for node in carriers if link.address == f"relay:{node.key.id}")
    other = next(node for node in carriers if node is not used)
    await used.stop("its machine is switched off")
    for node, peer in ((a, b), (b, a)):
        await eventually(partial(goes_by, node, peer, other), within=15)
    await round_trip(stream, 50_000)
    assert not [peer for peer, _ in a.downs if peer == b.key.id]


async def test_a_link_that_falls_silent_is_given_another_path_with_its_streams(party: Party) -> None:
    relay = await party.node("relay", relay_rate=RATE, tcp=False)
    a = await party.node("anna", knows=(relay,), tcp=False)
    b = await party.node("berta", knows=(relay,), tcp=False)
    await eventually(lambda: path(a, b) == path(b, a) == "quic", within=10)
    stream, _ = await open_echo(a, b)
    wall = Wall(a, b)  # as when a NAT forgets what it knew
    await eventually(lambda: path(a, b) == path(b, a) == "relay", within=15)
    await round_trip(stream, 50_000)
    wall.standing = False
    for node in (a, b):
        node.links.ways.own_addresses_changed()
    await eventually(lambda: path(a, b) == path(b, a) == "quic", within=15)
    await round_trip(stream, 50_000)
    assert not [peer for peer, _ in (*a.downs, *b.downs) if peer != relay.key.id]


async def test_a_relay_slows_down_who_sends_more_than_its_rate(party: Party) -> None:
    [relay], a, b, _ = await parted(party, "relay", rate=400_000)
    stream, _ = await open_echo(a, b)
    began = asyncio.get_running_loop().time()
    _, before, _ = relay.links.ways.relaying
    await round_trip(stream, 500_000)
    took = asyncio.get_running_loop().time() - began
    _, carried, dropped = relay.links.ways.relaying
    assert dropped > 0
    assert (carried - before - 100_000) / took <= 400_000 * 1.1
    assert relay.links.link(a.key.id) is not None


async def test_who_does_not_relay_is_not_made_to(party: Party) -> None:
    middle = await party.node("middle", tcp=False)
    a = await party.node("anna", knows=(middle,), tcp=False)
    b = await party.node("berta", tcp=False)
    wall = Wall(a, b)
    b.links.learn(middle.where())
    await eventually(lambda: wall.swallowed > 20, within=20)
    await eventually(lambda: path(a, middle) == path(b, middle) == "quic")
    assert path(a, b) is None
    assert middle.links.ways.relaying == (0, 0, 0)


async def test_members_tell_each_other_where_they_see_them(party: Party) -> None:
    anna = await party.node("anna")
    berta = await party.node("berta", knows=(anna,))
    await eventually(lambda: (anna.key.id, berta.address) in berta.seen and (berta.key.id, anna.address) in anna.seen)


async def test_a_member_cannot_make_another_send_packets_where_it_likes(party: Party) -> None:
    anna = await party.node("anna")
    mallory = await party.node("mallory", knows=(anna,))
    victim = party.member_key()
    await eventually(lambda: anna.ups and mallory.ups)
    anna.roster.add(party.grants, party.wall, vouched=True)
    sent: list[Any] = []
    udp = anna.endpoint._sockets[0]
    send = udp.send
    udp.send = lambda datagrams: send([sent.append(one[1]) or one for one in datagrams])  # type: ignore[func-returns-value,method-assign]
    targets = ("127.0.0.1:9", "224.0.0.1:9", "0.0.0.0:9", "kitchen.example:9", "255.255.255.255:9", "169.254.0.1:9")
    for _ in range(50):
        mallory.links.send(anna.key.id, Meet(victim.id, targets, 1.0))
        mallory.links.send(anna.key.id, Carried(victim.id, 5))
    await eventually(lambda: ("127.0.0.1", 9) in sent)
    await eventually(lambda: len(mallory.messages) or True)
    await asyncio.sleep(0.5)
    elsewhere = [addr for addr in sent if addr[1] == 9]
    assert {addr[0] for addr in elsewhere} == {"127.0.0.1"}
    assert len(elsewhere) <= 3


async def test_nobody_is_dialed_who_is_no_member(party: Party) -> None:
    anna = await party.node("anna")
    mallory = await party.node("mallory", knows=(anna,))
    await eventually(lambda: anna.ups and mallory.ups)
    before = anna.endpoint.connections
    mallory.links.send(anna.key.id, Meet("z" * 26, ("127.0.0.1:9",), 1.0))
    mallory.links.send(anna.key.id, Meet(anna.key.id, ("127.0.0.1:9",), 1.0))
    await asyncio.sleep(0.3)
    assert anna.endpoint.connections == before


async def test_garbage_in_datagrams_is_dropped(party: Party) -> None:
    anna = await party.node("anna", relay_rate=RATE)
    mallory = await party.node("mallory", knows=(anna,))
    await eventually(lambda: anna.ups and mallory.ups)
    link = mallory.links.link(anna.key.id)
    assert link is not None
    for size in (0, 1, 2, 3, 50, 1200, 1202):
        for first in (0x00, 0x7F, 0x80, 0xFF):
            link.connection.send_datagram(bytes([first]) * size)
    opening = asyncio.ensure_future(mallory.links.open_bulk(anna.key.id, REQUEST))
    await eventually(lambda: anna.bulk)
    await anna.bulk[0][2].write(encode(Opened()))
    await opening
    assert anna.links.ways.relaying == (0, 0, 0)
