"""Announcements on the local network: what is believed, what is told of them, and what a hostile neighbour can do."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.discovery.interfaces import Address, choose
from mesh.discovery.lan import (
    HINT_EVERY_S,
    MAX_ADDRESSES,
    MAX_DOORS,
    MAX_MESHES,
    MAX_SERVICES,
    Announcement,
    Door,
    Effect,
    Fields,
    Hint,
    Lan,
    Mesh,
    Meshes,
    Moved,
    Seen,
    Tick,
    Vanished,
    announcement,
    mesh_tag,
    near,
    read_fields,
)
from mesh.transport.address import split_address

OURS, OTHERS = mesh_tag("a" * 26), mesh_tag("b" * 26)
HOME = [ipaddress.ip_network("192.168.1.0/24"), ipaddress.ip_network("2001:db8:1::/64")]


def fields(tag: str = OURS, prefix: str = "kitchen2", name: str = "home", **changes: Any) -> Fields:
    made = {key.encode(): value.encode() for key, value in Announcement(tag, prefix, name).fields().items()}
    return {**made, **{key.encode(): value for key, value in changes.items()}}


def seen(service: str = "s1", addresses: tuple[str, ...] = ("192.168.1.5",), port: int = 7842, **said: Any) -> Seen:
    return Seen(service, fields(**said), addresses, port)


def a_lan(tag: str | None = OURS) -> Lan:
    return Lan(tag, "ourself2", HOME)


def hints(effects: list[Effect]) -> list[Hint]:
    return [effect for effect in effects if isinstance(effect, Hint)]


# -- fields ----------------------------------------------------------------------------------------------------------


def test_what_is_announced_is_read_back() -> None:
    made = announcement("kitchen2" + "a" * 18, "a" * 26, "home")
    assert read_fields({key.encode(): value.encode() for key, value in made.fields().items()}) == made


def test_an_announcement_tells_strangers_neither_the_meshs_id_nor_the_nodes() -> None:
    node, mesh = "kitchen2" + "x" * 18, "m" * 26
    said = announcement(node, mesh, "home").fields().values()
    assert not any(mesh in value or node in value or mesh[:8] in value for value in said)


@pytest.mark.parametrize(
    "changes",
    [
        {"v": b"2"}, {"v": None}, {"v": b"99999"}, {"v": b"-1"}, {"t": b"short"}, {"t": b"ABCDEFGHIJ"},
        {"n": b"kitchen2x"}, {"n": b"kitchen\n"}, {"n": None}, {"m": b""}, {"m": b"  "}, {"m": None},
        {"m": b"home\x1b[2J"}, {"m": b"a\nb"}, {"m": b"x" * 65}, {"m": b"\xff"}, {"m": "a\u202eb".encode()},
        {"m": b"y" * 1000},
    ],
)  # fmt: skip
def test_fields_that_are_not_ours_are_nothing(changes: dict[str, Any]) -> None:
    assert read_fields(fields(**changes)) is None


anything = st.dictionaries(
    st.sampled_from([b"v", b"t", b"n", b"m", b"p"]) | st.binary(max_size=8), st.none() | st.binary(max_size=300)
)


@given(anything)
def test_whatever_is_announced_is_nothing_or_an_announcement_in_bounds(given_fields: Fields) -> None:
    said = read_fields({**fields(), **given_fields})
    if said is not None:
        assert (len(said.tag), len(said.prefix)) == (10, 8)
        assert 0 < len(said.name) <= 64
        assert said.name.isprintable()


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["192.168.1.5", "10.1.2.3", "172.16.0.9", "fd00::5", "2001:db8:1::77", "fe80::1%eth0", "169.254.3.4"]
)
def test_addresses_of_local_networks_are_tried(address: str) -> None:
    assert near([address], HOME) == [address]


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "2a00::1", "127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.251", "ff02::fb", "fe80::1", "192.168.1.255",
     "kitchen.local", "", "1.2.3.4.5"],
)  # fmt: skip
def test_nobody_makes_us_send_far_away_or_to_everybody(address: str) -> None:
    assert near([address], HOME) == []


def test_loopback_is_near_for_a_node_on_loopback() -> None:
    assert near(["127.0.0.1"], [ipaddress.ip_network("127.0.0.0/8")]) == ["127.0.0.1"]


# -- members ---------------------------------------------------------------------------------------------------------


def test_a_member_of_our_mesh_is_a_hint() -> None:
    assert a_lan().handle(seen(), 0.0) == [Hint("kitchen2", ("192.168.1.5:7842",))]


def test_our_own_announcement_is_no_news() -> None:
    assert a_lan().handle(seen(prefix="ourself2"), 0.0) == []


def test_what_was_told_is_not_told_again() -> None:
    lan = a_lan()
    lan.handle(seen(), 0.0)
    assert lan.handle(seen(), 5.0) == []


def test_a_new_address_is_told_and_the_newest_comes_first() -> None:
    lan = a_lan()
    lan.handle(seen(), 0.0)
    moved = lan.handle(seen(addresses=("192.168.1.9", "2001:db8:1::9"), port=8000), 5.0)
    assert moved == [Hint("kitchen2", ("192.168.1.9:8000", "[2001:db8:1::9]:8000"))]
    (both,) = hints(lan.handle(seen("s2"), 10.0))
    assert both.addresses == ("192.168.1.5:7842", "192.168.1.9:8000", "[2001:db8:1::9]:8000")


def test_a_member_that_says_good_bye_is_no_hint_any_more() -> None:
    lan = a_lan()
    lan.handle(seen(), 0.0)
    assert lan.handle(Vanished("s1"), 5.0) == [Hint("kitchen2", ())]
    assert lan.handle(Vanished("s1"), 9.0) == []


def test_somebody_who_keeps_changing_is_heard_once_a_second() -> None:
    lan = a_lan()
    told = 0
    for n in range(100):
        told += len(hints(lan.handle(seen(port=1000 + n), n / 100)))
    assert told == 1
    due = lan.next_timer()
    assert due == HINT_EVERY_S
    assert lan.handle(Tick(), due) == [Hint("kitchen2", ("192.168.1.5:1099",))]
    assert lan.next_timer() is None


def test_networks_that_come_and_go_count_for_what_is_heard_next() -> None:
    lan = Lan(OURS, "ourself2", ())
    assert lan.handle(seen(addresses=("2001:db8:1::5",)), 0.0) == []
    lan.handle(Moved(tuple(HOME)), 0.0)
    assert lan.handle(seen(addresses=("2001:db8:1::5",)), 0.0) == [Hint("kitchen2", ("[2001:db8:1::5]:7842",))]


# -- other meshes ----------------------------------------------------------------------------------------------------


def test_another_mesh_is_told_with_its_doors() -> None:
    (effect,) = a_lan().handle(seen(tag=OTHERS, name="office"), 0.0)
    assert effect == Meshes((Mesh(OTHERS, "office", (Door("kitchen2", ("192.168.1.5:7842",)),)),))


def test_a_mesh_that_goes_is_told_too() -> None:
    lan = a_lan(None)
    lan.handle(seen(), 0.0)
    assert lan.handle(Vanished("s1"), 1.0) == [Meshes(())]


def test_a_mesh_whose_members_take_no_requests_is_none_for_a_newcomer() -> None:
    assert a_lan(None).handle(seen(p=b"0"), 0.0) == []


def test_a_flood_of_names_leaves_another_mesh_its_doors() -> None:
    lan = a_lan(None)
    lan.handle(seen("real", name="home"), 0.0)
    meshes: tuple[Mesh, ...] = ()
    for n in range(MAX_SERVICES - 1):
        for effect in lan.handle(seen(f"x{n}", prefix="floodaaa", tag=OTHERS, port=1000 + n), n):
            assert isinstance(effect, Meshes)
            meshes = effect.meshes
    assert [mesh.name for mesh in meshes] == ["home", "home"]
    assert meshes[0].doors == (Door("kitchen2", ("192.168.1.5:7842",)),)
    assert sum(len(mesh.doors) for mesh in meshes) <= MAX_DOORS


def test_a_larger_flood_drops_what_was_heard_longest_ago() -> None:
    lan = a_lan()
    for n in range(3 * MAX_SERVICES):
        lan.handle(seen(f"x{n}", prefix="floodaaa", port=1000 + n), n)
    assert len(lan._services) == MAX_SERVICES
    (hint,) = hints(lan.handle(seen("real"), 1000.0))
    assert hint == Hint("kitchen2", ("192.168.1.5:7842",)), "whoever is announced now is heard now"


# Whatever is announced, what is kept and told stays within bounds, and every address is one to dial.
@given(
    st.lists(
        st.one_of(
            st.builds(
                Seen,
                st.integers(0, 300).map(str),
                st.builds(
                    lambda tag, prefix, name: fields(tag, prefix, name),
                    st.sampled_from([OURS, OTHERS, mesh_tag("c" * 26), mesh_tag("d" * 26), mesh_tag("e" * 26)]),
                    st.sampled_from(["kitchen2", "attic222", "ourself2"]),
                    st.text(min_size=1, max_size=20),
                )
                | anything,
                st.lists(st.ip_addresses().map(str) | st.sampled_from(["192.168.1.5", "10.0.0.1"]), max_size=20).map(
                    tuple
                ),
                st.integers(-1, 70000),
            ),
            st.builds(Vanished, st.integers(0, 300).map(str)),
            st.just(Tick()),
        ),
        max_size=60,
    )
)
def test_any_announcements_leave_bounded_hints(events: list[Seen | Vanished | Tick]) -> None:
    lan = a_lan()
    for now, event in enumerate(events):
        for effect in lan.handle(event, now / 3):
            if isinstance(effect, Hint):
                assert effect.prefix != "ourself2"
                assert len(effect.addresses) <= MAX_ADDRESSES
                addresses = list(effect.addresses)
            else:
                assert len(effect.meshes) <= MAX_MESHES
                doors = [door for mesh in effect.meshes for door in mesh.doors]
                assert len(doors) <= MAX_DOORS
                addresses = [address for door in doors for address in door.addresses]
            for address in addresses:
                host, port = split_address(address)
                assert near([host], HOME)
                assert 0 < port < 65536
    assert len(lan._services) <= MAX_SERVICES
    assert len(lan._due) + len(lan._told) + len(lan._told_at) <= 3 * MAX_SERVICES


# -- interfaces ------------------------------------------------------------------------------------------------------

FOUND = {
    "lo": [Address("127.0.0.1", 8), Address("::1", 128)],
    "eth0": [Address("192.168.1.5", 24), Address("2001:db8:1::5", 64), Address("fe80::5%eth0", 64)],
    "wlan0": [Address("10.0.0.5", 8)],
}
INDEXES = {"lo": 1, "eth0": 2, "wlan0": 3}


def test_a_node_that_listens_everywhere_is_announced_on_every_network_but_loopback() -> None:
    ground = choose(("0.0.0.0", "::"), FOUND, INDEXES)
    assert ground.sources == ("192.168.1.5", 2, "10.0.0.5")
    assert ground.announced == ("192.168.1.5", "2001:db8:1::5", "10.0.0.5")
    assert ipaddress.ip_network("10.0.0.0/8") in ground.networks


def test_bind_host_limits_discovery_to_its_network() -> None:
    ground = choose(("10.0.0.5",), FOUND, INDEXES)
    assert (ground.sources, ground.announced) == (("10.0.0.5",), ("10.0.0.5",))
    assert ground.networks == (ipaddress.ip_network("10.0.0.0/8"),)


def test_a_node_on_loopback_stays_there() -> None:
    assert choose(("127.0.0.1",), FOUND, INDEXES).sources == ("127.0.0.1",)


def test_a_machine_without_a_network_has_no_ground_yet() -> None:
    assert choose(("0.0.0.0", "::"), {"lo": FOUND["lo"]}, INDEXES).sources == ()
