"""Machines die and networks are cut; the mesh serves again, under a higher epoch, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.lab import Lab
from bench.meshnode import MeshNode, stop_all
from tests.lab.mesh_kit import IN_LAB, ask, covered, model_file, reference

pytestmark = IN_LAB
MACHINES = ("a", "b", "c")


class Mesh:
    """Three nodes that share the demo model, brought back to full strength before each test."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        model = model_file("demo")
        self.expected = reference(model)
        self.nodes = {
            name: MeshNode(lab, name, directory, model=model, arguments=("--split", "always")) for name in MACHINES
        }
        self.nodes["a"].start()
        self.nodes["a"].wait_serving(60)
        token = self.nodes["a"].invite(uses=2)
        for name in ("b", "c"):
            self.nodes[name].start(join=token)
        for node in self.nodes.values():
            node.wait_serving(60, members=3)

    def whole(self) -> int:
        """Everybody in, one ring of three; its epoch. Begun anew: who went away in several tests is held off."""
        self.lab.heal_all()
        stop_all(self.nodes.values())
        for node in self.nodes.values():
            node.start()
        for node in self.nodes.values():
            node.wait_serving(60, members=3)
        epochs = {node.status()["mesh"]["epoch"] for node in self.nodes.values()}  # type: ignore[index]
        assert len(epochs) == 1
        return int(epochs.pop())

    @property
    def host(self) -> MeshNode:
        return next(n for n in self.nodes.values() if n.running and n.status()["node"]["role"] == "host")  # type: ignore[index]

    def workers(self) -> list[MeshNode]:
        host = self.host
        return [node for node in self.nodes.values() if node is not host]

    def no_orphans(self, node: MeshNode) -> None:
        deadline = time.monotonic() + 5
        while node.engine_pids():
            assert time.monotonic() < deadline, f"{node.machine} still runs {node.engine_pids()}"
            time.sleep(0.02)

    def stop(self) -> None:
        for node in self.nodes.values():
            if node.running:
                node.stop()
            self.no_orphans(node)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Lab(MACHINES, link="lan", cores=1) as lab:
        made = Mesh(lab, tmp_path_factory.mktemp("faults"))
        try:
            yield made
        finally:
            made.stop()


def _serves_again(mesh: Mesh, survivors: list[MeshNode], before: int, members: int) -> None:
    for node in survivors:
        status = node.wait_serving(60, members=members, after=before)
        assert sorted(covered(status)) == list(range(12))
        assert ask(node) == mesh.expected


def test_a_killed_worker_is_planned_around(mesh: Mesh) -> None:
    before = mesh.whole()
    victim = mesh.workers()[0]
    victim.kill()
    _serves_again(mesh, [node for node in mesh.nodes.values() if node is not victim], before, 2)
    mesh.no_orphans(victim)


def test_a_killed_host_is_replaced(mesh: Mesh) -> None:
    before = mesh.whole()
    victim = mesh.host
    victim.kill()
    _serves_again(mesh, [node for node in mesh.nodes.values() if node is not victim], before, 2)
    mesh.no_orphans(victim)


def test_a_killed_llama_server_is_started_again(mesh: Mesh) -> None:
    before = mesh.whole()
    mesh.host.kill_engine("llama-server")
    _serves_again(mesh, list(mesh.nodes.values()), before, 3)


def test_a_killed_rpc_server_is_started_again(mesh: Mesh) -> None:
    before = mesh.whole()
    mesh.workers()[0].kill_engine("ggml-rpc-server")
    _serves_again(mesh, list(mesh.nodes.values()), before, 3)


def test_a_request_made_while_the_host_dies_is_answered(mesh: Mesh) -> None:
    mesh.whole()
    victim, ingress = mesh.host, mesh.workers()[0]
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(ask(ingress, tokens=400)))
    asking.start()
    deadline = time.monotonic() + 10
    while ingress.status()["requests"]["active"] == 0:  # type: ignore[index]
        assert time.monotonic() < deadline, "the request never began"
        time.sleep(0.005)
    victim.kill()
    asking.join(60)
    assert answers and answers[0].startswith(mesh.expected)


def test_a_machine_that_leaves_is_not_waited_for(mesh: Mesh) -> None:
    before = mesh.whole()
    leaver = mesh.workers()[0]
    began = time.monotonic()
    assert leaver.command("down").returncode == 0
    assert leaver.process is not None and leaver.process.wait(10) == 0
    survivors = [node for node in mesh.nodes.values() if node is not leaver]
    _serves_again(mesh, survivors, before, 2)
    for node in survivors:
        gone = next(peer for peer in node.status()["peers"] if peer["name"] == leaver.machine)  # type: ignore[index]
        assert (gone["state"], gone["excluded"]) == ("left", "left"), "a leave was taken for a crash"
    assert time.monotonic() - began < 15
    mesh.no_orphans(leaver)
    leaver.forget()


def test_a_cut_network_heals_into_one_mesh(mesh: Mesh) -> None:
    before = mesh.whole()
    apart = mesh.workers()[0]
    others = [node for node in mesh.nodes.values() if node is not apart]
    mesh.lab.part([apart.machine], [node.machine for node in others])
    _serves_again(mesh, others, before, 2)
    _serves_again(mesh, [apart], before, 1)  # it holds the whole small model by itself
    parted = max(node.status()["mesh"]["epoch"] for node in mesh.nodes.values())  # type: ignore[index]
    mesh.lab.heal_all()
    _serves_again(mesh, list(mesh.nodes.values()), parted, 3)
    hosts = {node.status()["layout"]["host"] for node in mesh.nodes.values()}  # type: ignore[index]
    assert len(hosts) == 1
