"""Who is where in a lab with homes, and where packets go, without a network."""

from __future__ import annotations

import ipaddress
import random

import pytest

from bench.lab.links import LINKS
from bench.lab.namespaces import LabError
from bench.lab.nat import KINDS, Nat
from bench.lab.packet import UDP, Endpoint, Flow, flow_of
from bench.lab.places import Home, Places
from bench.lab.routes import HomeNetwork, Routes
from tests.unit.test_lab_packet import build, is_sound


def test_a_lab_without_homes_is_one_network() -> None:
    places = Places(["a", "b"])
    assert [places.address(node) for node in "ab"] == ["10.77.0.1", "10.77.0.2"]
    assert places.public_address("b") == "10.77.0.2"


def test_behind_a_nat_the_address_is_private_and_outside_it_is_not() -> None:
    places = Places(["a", "b", "p"], nat={"a": "symmetric"}, homes={"attic": ("full-cone", ["b"])})
    private = [ipaddress.ip_address(places.address(node)) for node in "ab"]
    public = [ipaddress.ip_address(places.public_address(name)) for name in ("a", "b", "p")]
    assert all(address.is_private for address in private)
    assert all(address.is_global for address in public)
    assert len({*private, *public}) == 5
    assert places.address("p") == places.public_address("p")
    assert places.public_address("attic") == places.public_address("b")


def test_machines_of_a_home_share_its_address_and_its_link() -> None:
    places = Places(["a", "b", "c"], homes={"flat": Home("full-cone", ("a", "b"), link="wifi")})
    assert places.public_address("a") == places.public_address("b") != places.public_address("c")
    assert places.address("a").rpartition(".")[0] == places.address("b").rpartition(".")[0]
    assert places.default_link("a", "b") is LINKS["wifi"]
    assert places.default_link("a", "c") is None


def test_homes_may_use_the_same_private_addresses() -> None:
    flats = {name: Home("full-cone", (name[0],), subnet="192.168.0") for name in ("aflat", "bflat")}
    places = Places(["a", "b"], homes=flats)
    assert places.address("a") == places.address("b") == "192.168.0.2"
    assert places.public_address("a") != places.public_address("b")


def test_a_machine_that_moves_gets_an_address_nobody_had() -> None:
    places = Places(["a", "p"], nat={"a": "full-cone"})
    seen = [places.address("a"), places.public_address("a"), places.address("p")]
    for to in (None, "a", None, None):
        places.move("a", to)
        assert places.address("a") not in seen
        assert places.home_of("a") == to
        seen.append(places.address("a"))
    places.renumber("a")
    assert places.public_address("a") == places.address("a")


def test_what_makes_no_sense_is_refused() -> None:
    for homes in (
        {"flat": ("round-cone", ["a"])},
        {"flat": ("full-cone", ["x"])},
        {"b": ("full-cone", ["a"])},
        {"flat": ("full-cone", ["a"]), "hut": ("full-cone", ["a"])},
    ):
        with pytest.raises(LabError):
            Places(["a", "b"], homes=homes)
    with pytest.raises(LabError, match="NAT"):
        Places(["a", "b"], nat={"a": "full-cone"}).need_home("b")
    with pytest.raises(LabError, match="no home"):
        Places(["a", "b"], nat={"a": "full-cone"}).move("b", "hut")
    for subnet in ("11.0.0", "192.168", "x"):
        with pytest.raises(LabError, match="subnet"):
            Home("full-cone", (), subnet=subnet)


A, B, C = (bytes((192, 168, 1, 2)), bytes((192, 168, 1, 3)), bytes((192, 168, 1, 2)))
P, NAT1, NAT2 = (bytes((11, 77, 0, n)) for n in (9, 1, 2))


def streets(kind: str = "port-restricted", *, hairpin: bool = False) -> Routes:
    """Machines 0 and 1 behind one NAT, 2 behind another with the same private addresses, 3 outside."""
    nats = [Nat(public, KINDS[kind], random.Random(1).random, hairpin=hairpin) for public in (NAT1, NAT2)]
    routes = Routes(4, [HomeNetwork(nat) for nat in nats])
    for machine, (address, home) in enumerate([(A, 0), (B, 0), (C, 1), (P, None)]):
        routes.place(machine, [address], home)
    return routes


def datagram(source: bytes, goal: bytes, source_port: int = 7, goal_port: int = 7) -> bytes:
    return build(Flow(UDP, Endpoint(source, source_port), Endpoint(goal, goal_port)), b"hello")


def carry(routes: Routes, machine: int, packet: bytes, now: float = 0.0) -> tuple[int, Flow] | None:
    """Send, cross the link without delay, and say who gets it and what it says."""
    left = routes.leave(machine, packet, now, partial=False)
    got = None if left is None else routes.arrive(*left, now, partial=False)
    if got is None:
        return None
    assert is_sound(got[1])
    flow = flow_of(got[1])
    assert flow is not None
    return got[0], flow


def test_a_home_is_near_itself_and_nobody_else() -> None:
    routes = streets()
    assert routes.near(0) == {A: 0, B: 1}
    assert routes.near(2) == {C: 2}
    assert routes.near(3) == {P: 3}
    assert [routes.neighbours(machine) for machine in range(4)] == [[1], [0], [], []]


def test_a_packet_out_and_its_answer() -> None:
    routes = streets()
    assert carry(routes, 0, datagram(A, P)) == (3, Flow(UDP, Endpoint(NAT1, 7), Endpoint(P, 7)))
    assert carry(routes, 3, datagram(P, NAT1)) == (0, Flow(UDP, Endpoint(P, 7), Endpoint(A, 7)))
    assert carry(routes, 3, datagram(P, NAT1, source_port=8)) is None


def test_a_private_address_outside_its_home_is_nobodys() -> None:
    routes = streets()
    assert carry(routes, 3, datagram(P, A)) is None
    assert carry(routes, 0, datagram(A, bytes((10, 0, 0, 1)))) is None


def test_two_that_open_at_once_meet_though_neither_was_first() -> None:
    routes = streets()
    there = routes.leave(0, datagram(A, NAT2), 0.0, partial=False)
    back = routes.leave(2, datagram(C, NAT1), 0.0, partial=False)
    assert there is not None
    assert back is not None
    for crossing, machine in ((there, 2), (back, 0)):
        arrived = routes.arrive(*crossing, 0.02, partial=False)
        assert arrived is not None
        assert arrived[0] == machine


def test_the_second_machine_of_a_home_gets_its_own_packets() -> None:
    routes = streets()
    assert carry(routes, 0, datagram(A, P)) is not None
    sent = carry(routes, 1, datagram(B, P))
    assert sent is not None
    port = sent[1].source.port
    assert port != 7
    assert carry(routes, 3, datagram(P, NAT1, goal_port=port)) == (1, Flow(UDP, Endpoint(P, 7), Endpoint(B, 7)))


@pytest.mark.parametrize("hairpin", [False, True])
def test_a_home_reaches_itself_from_outside_only_with_a_hairpin(hairpin: bool) -> None:
    routes = streets("full-cone", hairpin=hairpin)
    carry(routes, 1, datagram(B, P))
    expected = (1, Flow(UDP, Endpoint(NAT1, 8), Endpoint(B, 7))) if hairpin else None
    assert carry(routes, 0, datagram(A, NAT1, source_port=8)) == expected


def test_a_machine_that_left_gets_nothing_at_its_old_address() -> None:
    routes = streets("full-cone")
    carry(routes, 0, datagram(A, P))
    routes.place(0, [bytes((11, 77, 0, 20))], None)
    assert carry(routes, 3, datagram(P, NAT1)) is None
    assert routes.near(3) == {P: 3, bytes((11, 77, 0, 20)): 0}
