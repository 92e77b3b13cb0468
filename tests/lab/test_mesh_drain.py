"""Planned changes: what was begun is finished, what comes meanwhile waits, and nobody is missed before it has gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.lab import Lab
from bench.meshnode import MeshNode, stop_all
from tests.lab.mesh_kit import IN_LAB, Streamed, ask, model_file, reference

pytestmark = IN_LAB
MACHINES = ("a", "b", "c", "d")
LONG = 800
"""Tokens that take some seconds."""
ENDLESS = 3000
WAITS = "requests under way may finish first, 30 s at most"


class Mesh:
    """Three nodes that share the demo model, and a fourth that comes when it is told to."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        model = model_file("demo")
        self.expected = reference(model, LONG)
        config = directory / "mesh.toml"
        config.write_text("drain_s = 30\n")
        arguments = ("--split", "always", "--parallel", "4", "--config", str(config))
        self.nodes = {name: MeshNode(lab, name, directory, model=model, arguments=arguments) for name in MACHINES}
        a, b, c, _ = self.nodes.values()
        a.start()
        a.wait_serving(60)
        token = a.invite(uses=3)
        for node in (b, c):
            node.start(join=token)
        self.token: str | None = token

    def of_three(self) -> int:
        """a, b and c share the model, d is out; returns the epoch."""
        a, b, c, d = self.nodes.values()
        for node in (a, b, c):
            if not node.running:
                node.start()
        if d.running:
            d.stop()
        for node in (a, b, c):
            status = node.wait_serving(60, members=3)
        return int(status["mesh"]["epoch"])

    @property
    def host(self) -> MeshNode:
        return next(n for n in self.nodes.values() if n.running and n.status()["node"]["role"] == "host")  # type: ignore[index]

    def workers(self) -> list[MeshNode]:
        host = self.host
        return [node for node in self.nodes.values() if node.running and node is not host]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Lab(MACHINES, link="lan", cores=1) as lab:
        made = Mesh(lab, tmp_path_factory.mktemp("drain"))
        try:
            yield made
        finally:
            stop_all(list(made.nodes.values()))


def unbroken(streams: list[Streamed], expected: str) -> None:
    for stream in streams:
        stream.join(60)
        assert (stream.error, stream.whole, stream.text) == ("", True, expected)


def resumed(nodes: list[MeshNode]) -> int:
    return sum(node.status()["requests"]["resumed"] for node in nodes)  # type: ignore[index]


def waits(node: MeshNode) -> Streamed:
    """A request that has to wait, seen to do so."""
    late = Streamed(node, LONG)
    deadline = time.monotonic() + 10
    while node.status()["requests"]["held"] == 0:  # type: ignore[index]
        assert late.tokens == 0 and time.monotonic() < deadline, "the new request did not wait"
        time.sleep(0.005)
    return late


def test_a_machine_that_joins_interrupts_nobody(mesh: Mesh) -> None:
    before = mesh.of_three()
    there, here = mesh.workers()[0], mesh.host
    mesh.nodes["d"].start(join=mesh.token)
    # Its coming is let to settle for a while: time enough to ask.
    there.wait(lambda status: any(p["name"] == "d" and p["state"] == "alive" for p in status["peers"]), 30, "d")
    streams = [Streamed(there, LONG), Streamed(here, LONG)]
    there.wait(lambda status: status["mesh"]["epoch"] > before, 30, "a new layout")
    late = waits(there)
    assert not any(stream.whole for stream in streams), "the answers were too short to show anything"
    unbroken([*streams, late], mesh.expected)
    assert len(there.wait_serving(60, members=4, after=before)["layout"]["ring"]) == 4
    assert resumed([there, here]) == 0


@pytest.mark.parametrize("who", ["worker", "host"])
def test_a_machine_that_leaves_first_finishes_what_it_has_begun(mesh: Mesh, who: str) -> None:
    before = mesh.of_three()
    leaver = mesh.host if who == "host" else mesh.workers()[0]
    staying = [node for node in mesh.nodes.values() if node.running and node is not leaver]
    streams = [Streamed(node, LONG) for node in (leaver, *staying)]
    for stream in streams:
        stream.wait_for(5)
    leaver.interrupt()
    staying[0].wait(lambda status: status["mesh"]["epoch"] > before, 2.0, "a new layout, long before a loss is noticed")
    late = waits(staying[0])
    assert not any(stream.whole for stream in streams), "the answers were too short to show anything"
    unbroken([*streams, late], mesh.expected)
    assert leaver.wait_stopped() == 0
    assert resumed(staying) == 0
    for node in staying:
        node.wait_serving(60, members=2, after=before)


def test_a_request_that_waits_at_a_machine_that_leaves_is_answered_first(mesh: Mesh) -> None:
    before = mesh.of_three()
    leaver, host = mesh.workers()[0], mesh.host
    mesh.nodes["d"].start(join=mesh.token)
    leaver.wait(lambda status: any(p["name"] == "d" and p["state"] == "alive" for p in status["peers"]), 30, "d")
    stream = Streamed(host, LONG)
    leaver.wait(lambda status: status["mesh"]["epoch"] > before, 30, "a new layout")
    late = waits(leaver)
    leaver.interrupt()
    unbroken([stream, late], mesh.expected)
    assert leaver.wait_stopped() == 0


@pytest.mark.parametrize("how", ["mesh down", "Ctrl-C"])
def test_a_machine_that_is_told_twice_to_go_does_not_wait(mesh: Mesh, how: str) -> None:
    mesh.of_three()
    leaver, host = mesh.workers()[0], mesh.host
    endless = Streamed(host, ENDLESS)
    endless.wait_for(5)
    told = leaver.output_path.read_text().count(WAITS)
    leaver.interrupt()
    deadline = time.monotonic() + 10
    while leaver.output_path.read_text().count(WAITS) == told:
        assert time.monotonic() < deadline, "nobody is told what is waited for"
        time.sleep(0.02)
    assert leaver.running and not endless.error
    began = time.monotonic()
    if how == "Ctrl-C":
        leaver.interrupt()
    else:
        assert leaver.command("down").returncode == 0
    assert leaver.wait_stopped() == 0, "it did not go in peace"
    assert time.monotonic() - began < 6
    gone = next(peer for peer in host.status()["peers"] if peer["name"] == leaver.machine)  # type: ignore[index]
    assert gone["state"] == "left"
    endless.cancel()
    host.wait_serving(60, members=2)


def test_a_machine_that_dies_while_it_leaves_is_not_waited_for(mesh: Mesh) -> None:
    before = mesh.of_three()
    leaver, host = mesh.workers()[0], mesh.host
    endless = Streamed(host, ENDLESS)
    endless.wait_for(5)
    leaver.interrupt()
    host.wait(lambda status: status["mesh"]["epoch"] > before, 5, "a new layout")
    assert host.status()["mesh"]["state"] != "serving"  # type: ignore[index]
    died = leaver.kill()
    host.wait_serving(4.5, members=2, after=before)
    assert time.monotonic() - died < 4.5, "the drain went on without the machine that died"
    endless.cancel()
    assert ask(host) == reference(model_file("demo"))


def test_a_machine_that_carries_nothing_leaves_without_a_word(mesh: Mesh) -> None:
    epoch = mesh.of_three()
    asker = mesh.host
    endless = Streamed(asker, ENDLESS)
    endless.wait_for(5)
    token = asker.invite(role="client")
    guest = MeshNode(asker.lab, "d", asker.state_dir.parents[1] / "guest", role="client")
    guest.start(join=token)
    guest.wait_serving(30)
    began = time.monotonic()
    assert guest.stop() == 0
    assert time.monotonic() - began < 3
    status = asker.status()
    assert status is not None and (status["mesh"]["state"], status["mesh"]["epoch"]) == ("serving", epoch)
    assert not endless.error
    endless.cancel()
