"""A node asks servers on loopback where it is seen; some of them lie, or say nothing."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mesh.clock import SystemClock
from mesh.config import Settings
from mesh.discovery.stun import COOKIE
from mesh.identity.key import NodeKey
from mesh.node.whereabouts import Whereabouts
from mesh.transport.endpoint import Endpoint
from tests.eventually import eventually

NAT, LIE = "203.0.113.7:40000", "192.0.2.99:53"


class Server(asyncio.DatagramProtocol):
    """Answers with ``says``; nothing when that is None; noise when it is ``noise``."""

    def __init__(self, says: str | None) -> None:
        self.says = says
        self.asked: list[Any] = []

    async def start(self, host: str) -> Server:
        self.transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: self, local_addr=(host, 0)
        )
        self.address = f"{host}:{self.transport.get_extra_info('sockname')[1]}"
        return self

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.asked.append(addr)
        if self.says is None:
            return
        if self.says == "noise":
            for junk in (b"", b"\x01", b"\x01\x01\xff\xff" + COOKIE + data[8:], data[:8] + bytes(500), bytes(1500)):
                self.transport.sendto(junk, addr)
            return
        host, _, port = self.says.rpartition(":")
        value = bytes((0, 1)) + (int(port) ^ 0x2112).to_bytes(2, "big")
        value += bytes(a ^ b for a, b in zip(ipaddress.ip_address(host).packed, COOKIE, strict=True))
        self.transport.sendto(b"\x01\x01\x00\x0c" + COOKIE + data[8:20] + b"\x00\x20\x00\x08" + value, addr)


class Place:
    """One node's endpoint, and servers for it."""

    def __init__(self) -> None:
        self.endpoint = Endpoint(NodeKey.generate(), SystemClock(), on_connection=lambda connection: None)
        self.servers: list[Server] = []
        self.moves: list[tuple[str, ...]] = []
        self.own = ""

    async def servers_that_say(self, *says: str | None) -> None:
        for number, word in enumerate(says, start=2):
            self.servers.append(await Server(word).start(f"127.0.0.{number}"))

    async def look(self, *more: str, advertise: tuple[str, ...] = ()) -> Whereabouts:
        [self.own] = await self.endpoint.start([("127.0.0.1", 0)])
        settings = Settings(stun=(*(server.address for server in self.servers), *more), advertise=advertise)
        self.whereabouts = Whereabouts(settings, self.endpoint, [self.own], SystemClock(), self.moves.append)
        self.whereabouts.start()
        return self.whereabouts


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place()
    yield place
    await place.whereabouts.close()
    await place.endpoint.close()
    for server in place.servers:
        server.transport.close()


async def test_what_two_servers_say_is_told_after_what_the_owner_says(place: Place) -> None:
    await place.servers_that_say(NAT, NAT)
    where = await place.look(advertise=("home.example:7842",))
    await eventually(lambda: where.seen.addresses)
    assert where.addresses == ("home.example:7842", place.own, NAT)
    await eventually(lambda: place.moves and place.moves[-1] == where.addresses)
    assert {addr[1] for server in place.servers for addr in server.asked} == {int(place.own.rpartition(":")[2])}


async def test_servers_that_lie_babble_or_are_silent_or_do_not_exist_are_survived(place: Place) -> None:
    await place.servers_that_say(NAT, LIE, None, "noise", NAT)
    where = await place.look("no-such-host.invalid:3478")
    await eventually(lambda: where.seen.addresses == (NAT,), within=8)
    assert LIE not in where.addresses


async def test_a_liar_alone_against_another_server_convinces_nobody(place: Place) -> None:
    await place.servers_that_say(LIE, NAT)
    where = await place.look()
    await eventually(lambda: all(server.asked for server in place.servers))
    await eventually(lambda: where.seen.addresses == where.seen.unconfirmed == ())
    assert where.addresses == (place.own,)
    where.member_sees("a" * 26, NAT)  # a member's word settles it
    assert where.addresses == (place.own, NAT)
    where.member_gone("a" * 26)
    assert where.addresses == (place.own,)


async def test_without_servers_nothing_is_sent_and_members_tell_where_we_are(place: Place) -> None:
    sent: list[Any] = []
    where = await place.look()
    place.endpoint._sockets[0].send = sent.append  # type: ignore[method-assign,assignment]
    where.member_sees("a" * 26, NAT)
    assert where.addresses == (place.own, NAT)
    assert not sent


async def test_answers_nobody_asked_for_are_ignored(place: Place) -> None:
    await place.servers_that_say(None)
    where = await place.look()
    await eventually(lambda: place.servers[0].asked)
    stranger = await Server(LIE).start("127.0.0.9")
    try:
        stranger.datagram_received(b"\x00\x01\x00\x00" + COOKIE + bytes(12), place.servers[0].asked[0])
        place.servers[0].says = NAT
        await eventually(lambda: where.seen.unconfirmed == (NAT,))
        assert where.addresses == (place.own, NAT)
    finally:
        stranger.transport.close()


async def test_a_member_that_changes_its_mind_all_the_time_does_not_make_us_tell_everybody(place: Place) -> None:
    where = await place.look()
    for port in range(1, 500):
        where.member_sees("a" * 26, f"203.0.113.7:{port}")
        await asyncio.sleep(0)
    await eventually(lambda: place.moves and place.moves[-1] == (place.own, "203.0.113.7:499"))
    assert len(place.moves) <= 2
