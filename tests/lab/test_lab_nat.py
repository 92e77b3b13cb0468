"""The lab's NATs, with real sockets in real namespaces."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.lab import Home, Lab, LabError, lab_available
from bench.lab.lab import ROOT
from bench.lab.nat import KINDS

AVAILABLE, WHY = lab_available()
pytestmark = [pytest.mark.lab, pytest.mark.skipif(not AVAILABLE, reason=f"no lab here: {WHY}")]
PORT = 7842
Address = tuple[str, int]


class Sockets:
    """UDP sockets in the machines: by default one each, at :data:`PORT`."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._open: dict[tuple[str, int], socket.socket] = {}

    def at(self, node: str, port: int = PORT) -> socket.socket:
        if (node, port) not in self._open:
            made = self.lab.socket(node, kind=socket.SOCK_DGRAM)
            made.bind(("", port))
            made.settimeout(3)
            self._open[node, port] = made
        return self._open[node, port]

    def seen(self, source: str, goal: str, port: int = PORT) -> Address:
        """Send from ``source`` to a public machine: the address that it sees."""
        self.at(goal, port)
        self.at(source).sendto(b"?", (self.lab.address(goal), port))
        return self.hear(goal, b"?", port)

    def hear(self, node: str, words: bytes, port: int = PORT) -> Address:
        heard, address = self.at(node, port).recvfrom(64)
        assert heard == words
        assert isinstance(address, tuple)
        return address

    def reaches(self, source: str, to: Address, node: str, port: int = PORT, *, within: float = 3.0) -> bool:
        """Whether a packet from a machine's port to an address gets to ``node``."""
        self.at(node).settimeout(within)
        self.at(source, port).sendto(b"!", to)
        try:
            return self.hear(node, b"!") is not None
        except TimeoutError:
            return False
        finally:
            self.at(node).settimeout(3)

    def misses(self, source: str, to: Address, node: str, port: int = PORT) -> bool:
        """Whether it does not; a busy machine is given no time to be late here, as there is nothing to wait for."""
        return not self.reaches(source, to, node, port, within=0.15)

    def close(self) -> None:
        for made in self._open.values():
            made.close()


@contextmanager
def lab_of(nodes: str, **options: object) -> Iterator[tuple[Lab, Sockets]]:
    with Lab(nodes.split(), **options) as lab:  # type: ignore[arg-type]
        sockets = Sockets(lab)
        try:
            yield lab, sockets
        finally:
            sockets.close()


def test_every_kind_maps_and_filters_as_it_says() -> None:
    homes = {"cone": "full-cone", "addr": "address-restricted", "port": "port-restricted", "sym": "symmetric"}
    answers = {
        "full-cone": (True, True, True),
        "address-restricted": (True, True, False),
        "port-restricted": (True, False, False),
        "symmetric": (True, False, False),
    }
    with lab_of("cone addr port sym p q stranger", nat=homes) as (lab, at):
        assert set(answers) == set(KINDS)
        for node, kind in homes.items():
            first = at.seen(node, "p")
            assert first[0] == lab.public_address(node) != lab.address(node)
            same_everywhere = at.seen(node, "q") == at.seen(node, "p", PORT + 1) == first
            # By now "p" at two ports and "q" were written to; "p" at a third port and the stranger were not.
            same, other_port, other_host = answers[kind]
            assert same_everywhere == (kind != "symmetric")
            for passes, who, port in ((same, "p", PORT), (other_port, "p", PORT + 2), (other_host, "stranger", PORT)):
                assert (at.reaches if passes else at.misses)(who, first, node, port), (kind, who, port)
        assert lab.nat_state("sym").refused_in == 2


def test_two_machines_behind_one_nat_are_told_apart_and_meet_at_home() -> None:
    with lab_of("a b p", homes={"flat": ("port-restricted", ["a", "b"])}) as (lab, at):
        seen = {node: at.seen(node, "p") for node in ("a", "b")}
        assert seen["a"][0] == seen["b"][0] == lab.public_address("flat")
        assert seen["a"][1] != seen["b"][1]
        for node, address in seen.items():
            assert at.reaches("p", address, node)
        at.at("a").sendto(b"neighbour", (lab.address("b"), PORT))
        assert at.hear("b", b"neighbour") == (lab.address("a"), PORT)
        assert at.misses("a", seen["b"], "b")
        assert lab.counters()["a", "b"].packets == 1


def test_a_hairpin_leads_back_home_and_even_to_oneself() -> None:
    homes = {"flat": Home("full-cone", ("a", "b"), hairpin=True)}
    with lab_of("a b p", homes=homes) as (_, at):
        seen = {node: at.seen(node, "p") for node in ("a", "b")}
        at.at("a").sendto(b"!", seen["b"])
        assert at.hear("b", b"!") == seen["a"]
        at.at("a").sendto(b"me", seen["a"])
        assert at.hear("a", b"me") == seen["a"]


def test_two_port_restricted_homes_meet_when_both_open_and_symmetric_ones_do_not() -> None:
    with lab_of("a b c p", link="wan20", nat={"a": "port-restricted", "b": "port-restricted", "c": "symmetric"}) as (
        lab,
        at,
    ):
        seen = {node: at.seen(node, "p") for node in ("a", "b", "c")}
        at.at("a").sendto(b"hello b", seen["b"])
        at.at("b").sendto(b"hello a", seen["a"])
        assert at.hear("a", b"hello a") == seen["b"]
        assert at.hear("b", b"hello b") == seen["a"]
        at.at("a").sendto(b"hello c", seen["c"])
        at.at("c").sendto(b"hello a", seen["a"])
        for node in ("a", "c"):
            at.at(node).settimeout(0.3)
            with pytest.raises(TimeoutError):
                at.at(node).recv(64)
        assert lab.nat_state("a").refused_in == lab.nat_state("c").refused_in == 1


def test_homes_with_the_same_private_addresses_meet_too() -> None:
    homes = {f"flat{node}": Home("full-cone", (node,), subnet="192.168.0") for node in ("a", "b")}
    with lab_of("a b p", homes=homes) as (lab, at):
        assert lab.address("a") == lab.address("b")
        seen = {node: at.seen(node, "p") for node in ("a", "b")}
        assert at.reaches("a", seen["b"], "b")
        assert at.reaches("b", seen["a"], "a")
        # The other's private address is one's own.
        at.at("a").sendto(b"who?", (lab.address("b"), PORT))
        assert at.hear("a", b"who?") == (lab.address("a"), PORT)


def test_tcp_crosses_a_nat_in_bulk_and_does_not_come_in_unasked() -> None:
    with lab_of("a p", nat={"a": "symmetric"}) as (lab, _), lab.socket("p") as listener, lab.socket("a") as caller:
        listener.bind(("", PORT))
        listener.listen()
        caller.settimeout(5)
        caller.connect((lab.address("p"), PORT))
        accepted, peer = listener.accept()
        assert peer[0] == lab.public_address("a")
        sent = os.urandom(4_000_000)
        with accepted:
            for source, goal in ((caller, accepted), (accepted, caller)):
                sender = threading.Thread(target=source.sendall, args=(sent,))
                sender.start()
                goal.settimeout(5)
                received = bytearray()
                while len(received) < len(sent):
                    received += goal.recv(1 << 18)
                sender.join()
                assert received == sent
        counters = lab.counters()
        assert min(counters["a", "p"].bytes, counters["p", "a"].bytes) > len(sent)
        with lab.socket("p") as stranger:
            stranger.settimeout(0.3)
            with pytest.raises(TimeoutError):
                stranger.connect((lab.public_address("a"), PORT))


def test_a_forwarded_port_lets_strangers_in() -> None:
    with lab_of("a p", nat={"a": "symmetric"}) as (lab, at), lab.socket("a") as listener, lab.socket("p") as caller:
        lab.forward("a", PORT)
        lab.forward("a", PORT, protocol="tcp", outside_port=80)
        assert at.reaches("p", (lab.public_address("a"), PORT), "a")
        at.at("a").sendto(b"back", (lab.address("p"), PORT))
        assert at.hear("p", b"back") == (lab.public_address("a"), PORT)
        listener.bind(("", PORT))
        listener.listen()
        caller.settimeout(2)
        caller.connect((lab.public_address("a"), 80))


def test_silence_ends_a_mapping() -> None:
    homes = {"flat": Home("full-cone", ("a",), udp_timeout_s=0.4)}
    with lab_of("a p", homes=homes) as (lab, at):
        seen = at.seen("a", "p")
        # An answer that asks for more must not keep it open.
        while lab.nat_state("a").mapped:
            at.at("p").sendto(b"!", seen)
        while at.reaches("p", seen, "a", within=0.15):  # what had been let in
            pass
        assert at.misses("p", seen, "a")
        assert lab.nat_state("a").refused_in


def test_a_rebooted_nat_forgets_and_a_renumbered_one_is_elsewhere() -> None:
    with lab_of("a p", nat={"a": "full-cone"}) as (lab, at):
        seen = at.seen("a", "p")
        assert at.reaches("p", seen, "a")
        lab.reboot_nat("a")
        assert at.misses("p", seen, "a")
        assert at.seen("a", "p") == seen
        assert lab.renumber("a") == lab.public_address("a") != seen[0]
        assert at.misses("p", seen, "a")
        assert at.seen("a", "p") == (lab.public_address("a"), PORT)


def test_a_laptop_moves_with_its_sockets() -> None:
    with lab_of("a b p", nat={"a": "full-cone", "b": "symmetric"}, link="wan20") as (lab, at):
        old = at.seen("a", "p")
        home = lab.address("a")
        assert lab.move("a") == lab.address("a") == lab.public_address("a") != home
        assert at.seen("a", "p") == (lab.address("a"), PORT)
        assert at.misses("p", old, "a")
        lab.move("a", to="b")
        assert at.seen("a", "p")[0] == lab.public_address("b") == at.seen("b", "p")[0]
        at.at("a").sendto(b"guest", (lab.address("b"), PORT))
        assert at.hear("b", b"guest") == (lab.address("a"), PORT)
        lab.move("a", to="a")
        assert at.seen("a", "p")[0] == old[0]
        with pytest.raises(LabError, match="no home"):
            lab.move("a", to="p")


def test_cuts_and_counters_are_between_machines_whatever_lies_between() -> None:
    with lab_of("a b p", nat={"a": "full-cone", "b": "full-cone"}) as (lab, at):
        seen = {node: at.seen(node, "p") for node in ("a", "b")}
        lab.reset_counters()
        assert at.reaches("a", seen["b"], "b")
        assert lab.counters()["a", "b"].packets == 1
        lab.cut("a", "b")
        assert at.misses("a", seen["b"], "b")
        assert at.reaches("p", seen["b"], "b")
        lab.heal("a", "b")
        assert at.reaches("a", seen["b"], "b")


@pytest.mark.parametrize("options", [{}, {"nat": {"a": "full-cone"}}])
def test_one_protocol_can_be_swallowed(options: dict[str, object]) -> None:
    def connects(lab: Lab, source: str, within: float = 5.0) -> bool:
        with lab.socket(source) as caller:
            caller.settimeout(within)
            try:
                caller.connect((lab.address("b"), PORT))
            except TimeoutError:
                return False
            return True

    with lab_of("a b c", **options) as (lab, at), lab.socket("b") as listener:
        listener.bind(("", PORT))
        listener.listen()
        lab.block("a", "b", "tcp")
        assert not connects(lab, "a", 0.3)
        assert connects(lab, "c")
        assert at.seen("a", "b")
        assert lab.counters()["a", "b"].dropped
        lab.unblock("a", "b", "tcp")
        assert connects(lab, "a")
        lab.block("a", "b", "udp")
        assert at.misses("a", (lab.address("b"), PORT), "b")
        assert connects(lab, "a")


def test_multicast_stays_at_home() -> None:
    group, port = "224.0.0.251", 5353
    with lab_of("a b c p", homes={"flat": ("full-cone", ["a", "b"])}, nat={"c": "full-cone"}) as (lab, at):
        for node in ("b", "c", "p"):
            membership = socket.inet_aton(group) + socket.inet_aton(lab.address(node))
            at.at(node, port).setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        at.at("a").sendto(b"who is here", (group, port))
        assert at.hear("b", b"who is here", port) == (lab.address("a"), PORT)
        counters = lab.counters()
        assert not any(counters["a", node].packets for node in ("c", "p"))


def ask(lab: Lab, node: str, port: int, within: float = 3.0) -> bytes:
    with lab.socket(node, kind=socket.SOCK_DGRAM) as asking:
        asking.settimeout(within)
        asking.sendto(struct.pack("!HHI", 1, 0, 0x2112A442) + bytes(12), (lab.address("p"), port))
        return asking.recv(200)


def xored(host: str, port: int) -> bytes:
    number = struct.unpack("!I", socket.inet_aton(host))[0]
    return struct.pack("!HHI", 1, port ^ 0x2112, number ^ 0x2112A442)


def start_stun(lab: Lab, *arguments: str) -> None:
    argv = [sys.executable, "-m", "bench.lab.stunserver", lab.address("p"), *arguments]
    server = lab.popen("p", argv, stdout=subprocess.PIPE, cwd=ROOT)
    assert server.stdout is not None
    with server.stdout as said:
        assert said.readline().startswith(b"listening")


def test_stun_servers_tell_the_truth_lie_keep_silent_or_babble() -> None:
    with lab_of("a p", nat={"a": "symmetric"}) as (lab, _):
        start_stun(lab, "1")
        start_stun(lab, "2", "--lie", "6.6.6.6:666")
        start_stun(lab, "3", "--silent")
        start_stun(lab, "4", "--garble")
        truth = ask(lab, "a", 1)
        [mapped] = lab.nat_state("a").mapped
        assert xored(*mapped.outside) in truth
        assert xored("6.6.6.6", 666) in ask(lab, "a", 2)
        with pytest.raises(TimeoutError):
            ask(lab, "a", 3, 0.3)
        assert ask(lab, "a", 4)[:20] == truth[:20]


def test_homes_speak_ipv4_only_and_say_so() -> None:
    with pytest.raises(LabError, match="IPv4"):
        Lab(["a"], nat={"a": "full-cone"}, ipv6=True)


def test_in_a_lab_without_homes_addresses_change_too() -> None:
    with lab_of("a b", ipv6=True) as (lab, at):
        old = lab.address("a")
        assert lab.move("a") != old
        assert at.seen("a", "b") == (lab.address("a"), PORT)
        assert at.misses("b", (old, PORT), "a")
        six = lab.socket("a", socket.AF_INET6, socket.SOCK_DGRAM)
        with six, lab.socket("b", socket.AF_INET6, socket.SOCK_DGRAM) as listener:
            listener.bind(("::", PORT + 1))
            listener.settimeout(2)
            six.sendto(b"x", (lab.address("b", ipv6=True), PORT + 1))
            assert listener.recvfrom(64)[1][0] == lab.address("a", ipv6=True)


def test_what_is_not_behind_a_nat_has_none_to_reboot() -> None:
    with lab_of("a b", nat={"b": "full-cone"}) as (lab, _):
        switches: list[Callable[[str], object]] = [lab.reboot_nat, lab.renumber, lab.nat_state]
        for switch in switches:
            with pytest.raises(LabError, match="not behind a NAT"):
                switch("a")
