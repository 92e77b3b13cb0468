"""Two homes behind routers and a small public machine that only relays: who connects directly, who through it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.lab import Lab
from bench.meshnode import ROOT, MeshNode, stop_all
from mesh.identity.invite import Invite
from tests.lab.mesh_kit import IN_LAB, ask, covered, model_file, reference

pytestmark = IN_LAB
RELAY = ("--relay-only", "--no-discovery")
RING = ("--split", "always", "--no-discovery")


class Homes:
    """``a`` and ``b`` behind NATs of these kinds, each with the demo model, and public machines that only relay."""

    def __init__(self, lab: Lab, directory: Path, *, relays: Sequence[str] = ("p",)) -> None:
        self.lab = lab
        self.model = model_file("demo")
        self.relays = {name: MeshNode(lab, name, directory, arguments=RELAY) for name in relays}
        self.a, self.b = (MeshNode(lab, name, directory, model=self.model, arguments=RING) for name in ("a", "b"))
        self.nodes = [*self.relays.values(), self.a, self.b]

    def start(self) -> None:
        first, *others = self.nodes
        first.start()
        first.wait(lambda status: True, 30, "an API")
        token = first.invite(uses=len(others))
        for node in others:
            node.start(join=token)

    def stop(self) -> None:
        stop_all(self.nodes)

    def peer(self, status: dict[str, Any], name: str) -> dict[str, Any]:
        return next((peer for peer in status["peers"] if peer["name"] == name and peer["state"] != "left"), {})

    def wait_path(self, *paths: str, within: float = 30) -> None:
        """Both homes reach each other by one of ``paths``."""
        for node, other in ((self.a, "b"), (self.b, "a")):
            node.wait(
                lambda status, other=other: self.peer(status, other).get("path") in paths,  # type: ignore[misc]
                within,
                f"{other} by {paths}",
            )

    def between(self) -> list[tuple[MeshNode, str]]:
        return [(self.a, "b"), (self.b, "a")]


@contextlib.contextmanager
def homes(directory: Path, a: str, b: str, *, relays: Sequence[str] = ("p",), **more: str) -> Iterator[Homes]:
    """``more``: machines with nothing on them yet, and their NATs."""
    with Lab(["a", "b", *more, *relays], "wan20", nat={"a": a, "b": b, **more}) as lab:
        place = Homes(lab, directory, relays=relays)
        try:
            place.start()
            yield place
        finally:
            place.stop()


def test_two_port_restricted_homes_are_introduced_and_serve_directly(tmp_path: Path) -> None:
    with homes(tmp_path, "port-restricted", "port-restricted") as place:
        expected = reference(place.model)
        place.wait_path("quic", "tcp")
        for node, _ in place.between():
            status = node.wait_serving(60, members=2)
            assert covered(status) == list(range(status["layout"]["model"]["n_layers"]))
            assert ask(node) == expected
        third = place.relays["p"].status()
        assert third is not None
        assert third["node"]["role"] == "standby"
        assert "only relays" in str([peer["excluded"] for peer in place.a.status()["peers"]])  # type: ignore[index]


def test_two_symmetric_homes_go_through_the_relay_and_serve_also_a_lite_client_in_a_third(tmp_path: Path) -> None:
    with homes(tmp_path, "symmetric", "symmetric", c="symmetric") as place:
        expected = reference(place.model)
        place.wait_path("relay")
        for node, other in place.between():
            status = node.wait_serving(90, members=2)
            peer = place.peer(status, other)
            assert peer["path"] == "relay"
            assert peer["address"] == f"relay:{place.relays['p'].status()['node']['id']}"  # type: ignore[index]
            assert ask(node) == expected
        client = MeshNode(place.lab, "c", tmp_path, role="client", arguments=("--no-discovery",))
        try:
            client.start(join=place.relays["p"].invite(role="client"))
            client.wait_serving(60)
            assert ask(client) == expected
            assert paths_of(client)["a"][0] == paths_of(client)["b"][0] == "relay"
        finally:
            stop_all([client])


KINDS = ("full-cone", "address-restricted", "port-restricted", "symmetric")
BY_RELAY = ({"symmetric"}, {"symmetric", "port-restricted"})
"""Pairs of kinds that nobody can punch through: each end sees packets from where it never sent any."""


@contextlib.contextmanager
def bare_nodes(
    lab: Lab, directory: Path, names: Sequence[str], *, bind_host: str | None = None
) -> Iterator[dict[str, MeshNode]]:
    """Nodes without engines, of which the first founds the mesh: what is tested is how they reach each other."""
    nodes = {name: MeshNode(lab, name, directory, arguments=RELAY, bind_host=bind_host) for name in names}
    first, *others = nodes.values()
    try:
        first.start()
        first.wait(lambda status: True, 30, "an API")
        token = first.invite(uses=max(1, len(others)))
        for node in others:
            node.start(join=token)
        yield nodes
    finally:
        stop_all(list(nodes.values()))


def paths_of(node: MeshNode) -> dict[str, tuple[str | None, str | None]]:
    """Path and address of every member by name, as the node's status has them."""
    status = node.status() or {"peers": []}
    return {peer["name"]: (peer["path"], peer["address"]) for peer in status["peers"] if peer["state"] != "left"}


def wait_path(node: MeshNode, other: str, *paths: str, within: float = 30) -> None:
    node.wait(lambda status: paths_of(node).get(other, (None, None))[0] in paths, within, f"{other} by {paths}")


def test_every_pair_of_homes_is_linked_directly_unless_both_nats_forbid_it(tmp_path: Path) -> None:
    kinds = {f"{kind[0]}{number}": kind for kind in KINDS for number in (1, 2)}
    with Lab([*kinds, "relay"], "wan20", nat=kinds) as lab, bare_nodes(lab, tmp_path, ["relay", *kinds]) as nodes:
        for name, kind in kinds.items():
            for other, their_kind in kinds.items():
                if other != name:
                    relayed = {kind, their_kind} in BY_RELAY
                    wait_path(nodes[name], other, *(["relay"] if relayed else ["quic", "tcp"]), within=60)


def test_when_a_nat_forgets_its_mappings_the_homes_find_each_other_again(tmp_path: Path) -> None:
    nat = {"a": "port-restricted", "b": "port-restricted"}
    with Lab(["a", "b", "p"], "wan20", nat=nat) as lab, bare_nodes(lab, tmp_path, ["p", "a", "b"]) as nodes:
        for node, other in (("a", "b"), ("b", "a")):
            wait_path(nodes[node], other, "quic", "tcp")
        lab.reboot_nat("a")
        before = paths_of(nodes["b"])["a"]
        lab.renumber("a")
        for node, other in (("a", "b"), ("b", "a")):
            nodes[node].wait(
                lambda status, node=node, other=other: (  # type: ignore[misc]
                    paths_of(nodes[node]).get(other, (None, None))[0] in ("quic", "tcp")
                    and paths_of(nodes["b"]).get("a") != before
                ),
                45,
                f"{other} at its new address",
            )


def test_when_a_relay_dies_another_carries(tmp_path: Path) -> None:
    nat = {"a": "symmetric", "b": "symmetric"}
    with Lab(["a", "b", "p", "q"], "wan20", nat=nat) as lab, bare_nodes(lab, tmp_path, ["p", "q", "a", "b"]) as nodes:
        for node, other in (("a", "b"), ("b", "a")):
            wait_path(nodes[node], other, "relay")
        ids = {name: nodes[name].status()["node"]["id"] for name in ("p", "q")}  # type: ignore[index]
        used = next(name for name in ids if paths_of(nodes["a"])["b"][1] == f"relay:{ids[name]}")
        left = "q" if used == "p" else "p"
        nodes[used].kill()
        for node, other in (("a", "b"), ("b", "a")):
            nodes[node].wait(
                lambda status, node=node, other=other: (  # type: ignore[misc]
                    paths_of(nodes[node]).get(other) == ("relay", f"relay:{ids[left]}")
                ),
                30,
                f"{other} through {left}",
            )


def test_a_laptop_that_moves_is_found_again_and_a_relayed_link_becomes_direct(tmp_path: Path) -> None:
    nat = {"a": "symmetric", "b": "symmetric"}
    with (
        Lab(["a", "b", "p"], "wan20", nat=nat) as lab,
        bare_nodes(lab, tmp_path, ["p", "a", "b"], bind_host="0.0.0.0") as nodes,
    ):
        for node, other in (("a", "b"), ("b", "a")):
            wait_path(nodes[node], other, "relay")
        lab.move("b")  # from home onto the open internet
        for node, other in (("a", "b"), ("b", "a")):
            wait_path(nodes[node], other, "quic", "tcp", within=60)


@contextlib.contextmanager
def stun_servers(lab: Lab, manners: dict[str, Sequence[str]]) -> Iterator[str]:
    """One on each machine, with its manners; yields what ``MESH_STUN`` takes."""
    servers = []
    try:
        for machine, manner in manners.items():
            words = [sys.executable, "-m", "bench.lab.stunserver", lab.address(machine), "3478", *manner]
            servers.append(lab.popen(machine, words, cwd=ROOT, stdout=subprocess.PIPE))
            assert servers[-1].stdout is not None
            assert b"listening" in servers[-1].stdout.readline()
        yield ",".join(lab.address(machine) for machine in manners)
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_a_token_made_behind_a_nat_holds_the_address_that_honest_servers_saw(tmp_path: Path) -> None:
    """Two of five STUN servers are honest; the public machine has never heard of the mesh before."""
    manners: dict[str, Sequence[str]] = {
        "s1": (), "s2": ("--lie", "11.99.0.1:53"), "s3": ("--silent",), "s4": ("--garble",), "s5": (),
    }  # fmt: skip
    with Lab(["a", "p", *manners], "wan20", nat={"a": "full-cone"}) as lab, stun_servers(lab, manners) as stun:
        a, p = (MeshNode(lab, name, tmp_path, arguments=RELAY, env={"MESH_STUN": stun}) for name in ("a", "p"))
        try:
            a.start()
            a.wait(lambda status: True, 30, "an API")
            deadline = time.monotonic() + 15
            while True:
                token = a.invite()
                addresses = Invite.decode(token).addresses
                if any(address.startswith(lab.public_address("a") + ":") for address in addresses):
                    break
                assert time.monotonic() < deadline, addresses
                time.sleep(0.3)
            assert not any(address.startswith("11.99.0.1") for address in addresses)
            p.start(join=token)
            wait_path(p, "a", "quic", "tcp")
        finally:
            stop_all([a, p])


def test_without_stun_a_home_learns_its_public_address_from_a_member(tmp_path: Path) -> None:
    with Lab(["a", "p"], "wan20", nat={"a": "full-cone"}) as lab, bare_nodes(lab, tmp_path, ["p", "a"]) as nodes:
        wait_path(nodes["a"], "p", "quic", "tcp")
        addresses = Invite.decode(nodes["a"].invite()).addresses
        assert any(address.startswith(lab.public_address("a") + ":") for address in addresses)
