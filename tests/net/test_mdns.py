"""Announcements over real multicast, on loopback alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

import mesh.discovery.mdns as adapter
from mesh.clock import SystemClock
from mesh.discovery.interfaces import Address, choose
from mesh.discovery.lan import Announcement, Effect, Hint, Lan, Moved, Seen, Tick, announcement, mesh_tag
from mesh.discovery.mdns import SERVICE, Mdns
from mesh.errors import TransportError
from mesh.identity.key import NodeKey
from mesh.membership import dialer
from mesh.pump import Pump
from mesh.wire.messages import MemberAddress
from tests.eventually import eventually
from tests.net.party import Party

MESH = NodeKey.generate().id


class Host:
    """One node's discovery on loopback; nodes of other people's tests may be there too."""

    def __init__(self, port: int = 7842) -> None:
        self.id = NodeKey.generate().id
        self.prefix = self.id[:8]
        self.heard: list[Effect] = []
        self.pump = Pump(Lan(mesh_tag(MESH), self.prefix, ()), self.heard.append, Tick, SystemClock())
        self.mdns = Mdns(("127.0.0.1",), port, announcement(self.id, MESH, "home"), self.pump.feed)

    def hints(self) -> dict[str, tuple[str, ...]]:
        return {effect.prefix: effect.addresses for effect in self.heard if isinstance(effect, Hint)}


@pytest.fixture
async def hosts() -> AsyncIterator[list[Host]]:
    hosts = [Host(7001), Host(7002)]
    yield hosts
    for host in hosts:
        host.pump.stop()
        await host.mdns.close()


def uses_mdns(pid: int | None = None) -> bool:
    return any(c.laddr and c.laddr.port == 5353 for c in psutil.Process(pid).net_connections("udp"))


async def test_two_nodes_of_a_mesh_hear_of_each_other_and_of_a_good_bye(hosts: list[Host]) -> None:
    one, two = hosts
    for host in hosts:
        await host.mdns.start()
    await eventually(lambda: one.hints().get(two.prefix) == ("127.0.0.1:7002",))
    await eventually(lambda: two.hints().get(one.prefix) == ("127.0.0.1:7001",))
    await two.mdns.close()
    await eventually(lambda: one.hints()[two.prefix] == ())


async def test_a_node_that_comes_back_on_another_port_is_heard_there(hosts: list[Host]) -> None:
    one, two = hosts
    for host in hosts:
        await host.mdns.start()
    await eventually(lambda: one.hints().get(two.prefix))
    await two.mdns.close()
    two.mdns = Mdns(("127.0.0.1",), 7009, announcement(two.id, MESH, "home"), two.pump.feed)
    await two.mdns.start()
    await eventually(lambda: one.hints().get(two.prefix) == ("127.0.0.1:7009",))


async def test_an_interface_that_comes_later_is_followed(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    up: dict[str, list[Address]] = {}
    monkeypatch.setattr(adapter, "look", lambda bound: choose(bound, up, {}))
    monkeypatch.setattr(adapter, "LOOK_EVERY_S", 0.05)
    for host in hosts:
        await host.mdns.start()
    assert not uses_mdns()
    up["lo"] = [Address("127.0.0.1", 8)]
    await eventually(lambda: hosts[0].hints().get(hosts[1].prefix) == ("127.0.0.1:7002",))
    del up["lo"]
    await eventually(lambda: not uses_mdns())
    hosts[0].heard.clear()
    up["lo"] = [Address("127.0.0.1", 8)]
    hosts[1].mdns._port = 7003
    await eventually(lambda: hosts[0].hints().get(hosts[1].prefix) == ("127.0.0.1:7003",))


async def test_where_the_port_cannot_be_used_it_says_so_in_one_sentence(
    hosts: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zeroconf._core.create_sockets", refuse)
    with pytest.raises(TransportError) as caught:
        await hosts[0].mdns.start()
    assert caught.value.code == "no-discovery"
    assert "5353" in caught.value.message
    assert "\n" not in caught.value.message
    await hosts[0].mdns.close()


async def test_nothing_listens_before_the_start_nor_after_the_close(hosts: list[Host]) -> None:
    assert not uses_mdns()
    await hosts[0].mdns.start()
    assert uses_mdns()
    await hosts[0].mdns.close()
    assert not uses_mdns()


async def test_garbage_on_the_port_of_mdns_disturbs_nothing(hosts: list[Host]) -> None:
    one, two = hosts
    await one.mdns.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for n in range(200):
            sender.sendto(bytes([n]) * (n * 7 % 1400), ("224.0.0.251", 5353))
            sender.sendto(b"\0\0\x84\0\0\0\0\1\0\0\0\0" + bytes([n]) * 40, ("224.0.0.251", 5353))
    await two.mdns.start()
    await eventually(lambda: one.hints().get(two.prefix) == ("127.0.0.1:7002",))


async def test_hostile_announcements_over_the_wire_are_no_hints(hosts: list[Host]) -> None:
    """A neighbour that speaks mDNS well, but announces what is no node, or far away."""
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

    one, two = hosts
    await one.mdns.start()
    tag = mesh_tag(MESH)
    bad = [
        ("evil2222", {"v": "1", "t": tag, "n": "evil2222", "m": "home", "p": "1"}, "8.8.8.8", 53),
        ("evil3333", {"v": "1", "t": tag, "n": "evil3333", "m": "\x1b[2Jhome"}, "127.0.0.1", 7000),
        ("evil4444", {"v": "x" * 200, "t": tag * 9}, "127.0.0.1", 7000),
        ("evil.dot.s", {"v": "1"}, "127.0.0.1", 7000),
        ("evil5555", {}, "127.0.0.1", 0),
    ]
    neighbour = AsyncZeroconf(interfaces=["127.0.0.1"])
    for name, said, address, port in bad:
        info = AsyncServiceInfo(
            SERVICE, f"{name}.{SERVICE}", port=port, properties=dict(said), server=f"{name[:8]}.local.",
            parsed_addresses=[address],
        )  # fmt: skip
        await neighbour.async_register_service(info, cooperating_responders=True, strict=False)
    await two.mdns.start()
    await eventually(lambda: two.prefix in one.hints())
    assert set(one.hints()) == {two.prefix}
    await neighbour.async_close()


async def test_a_hint_brings_two_members_together_that_have_lost_each_other() -> None:
    party = Party()
    keys = party.member_key(), party.member_key()
    anna, ben = await party.node("anna", keys[0]), await party.node("ben", keys[1])
    anna.links.hint(ben.key.id[:8], (ben.address,))
    await eventually(lambda: anna.ups == [ben.key.id])
    assert ben.address in anna.links.members[0].addresses
    await party.over()


async def test_a_hint_to_another_node_leads_nowhere() -> None:
    """Who is announced as a member is none for that: the key is looked at first, and the hint is not kept."""
    party, others = Party(), Party()
    keys = party.member_key(), party.member_key()
    anna, ben = await party.node("anna", keys[0]), await party.node("ben", keys[1])
    eve = await others.node("eve")
    anna.links.hint(ben.key.id[:8], (eve.address,))
    anna.links.hint(eve.key.id[:8], (eve.address,))
    await asyncio.sleep(0)
    anna.links.hint(ben.key.id[:8], (eve.address, ben.address))
    await eventually(lambda: anna.ups == [ben.key.id])
    assert eve.asked == [] and eve.ups == []
    assert eve.address not in str(anna.links.members)
    await party.over()
    await others.over()


async def test_a_hint_that_comes_while_old_addresses_are_tried_is_tried_at_once() -> None:
    party = Party()
    keys = party.member_key(), party.member_key()
    anna, ben = await party.node("anna", keys[0]), await party.node("ben", keys[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{deaf.getsockname()[1]}"
        anna.links.learn(MemberAddress(ben.key.id, "ben", (silent,)))
        await eventually(lambda: anna.links._dialer.is_dialing(ben.key.id))
        anna.links.hint(ben.key.id[:8], (ben.address,))
        await eventually(lambda: anna.ups == [ben.key.id], within=dialer.DIAL_TIMEOUT_S / 2)
    await party.over()


async def test_hints_that_keep_changing_do_not_keep_a_member_from_its_known_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialer, "DIAL_TIMEOUT_S", 0.2)
    party = Party()
    keys = party.member_key(), party.member_key()
    anna, ben = await party.node("anna", keys[0]), await party.node("ben", keys[1])
    port = await ben.vanish()
    dialed: list[str] = []
    dial = anna.endpoint.dial

    async def noted(address: str, **options: Any) -> Any:
        dialed.append(address)
        return await dial(address, **options)

    monkeypatch.setattr(anna.endpoint, "dial", noted)
    anna.links.learn(ben.where())

    async def flood() -> None:
        for n in range(10_000):
            anna.links.hint(ben.key.id[:8], tuple(f"127.0.0.1:{20000 + (n * 8 + m) % 40000}" for m in range(8)))
            await asyncio.sleep(0.02)

    flooding = asyncio.ensure_future(flood())
    await eventually(lambda: len(dialed) > 8)
    assert dialed.count(ben.address) == 1, "one long attempt"
    await ben.start(port)
    await eventually(lambda: ben.key.id in anna.ups, within=15)
    flooding.cancel()
    await party.over()


async def test_events_reach_the_core_in_the_shape_it_takes(hosts: list[Host]) -> None:
    events: list[object] = []
    hosts[0].mdns = Mdns(("127.0.0.1",), 0, None, events.append)
    await hosts[0].mdns.start()
    assert isinstance(events[0], Moved)
    await hosts[1].mdns.start()

    def announced() -> Seen | None:
        name = f"{hosts[1].prefix}.{SERVICE}"
        return next((e for e in events if isinstance(e, Seen) and e.service == name), None)

    seen = await eventually(announced)
    assert (seen.addresses, seen.port) == (("127.0.0.1",), 7002)
    expected = Announcement(mesh_tag(MESH), hosts[1].prefix, "home").fields()
    assert {key.decode(): value.decode() for key, value in seen.fields.items()} == expected
