"""TCP that a firewall swallows, or that a machine leaves behind: the mesh serves over QUIC, and goes back to TCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.lab import Lab
from bench.meshnode import MeshNode
from tests.lab.mesh_kit import IN_LAB, ask, model_file, reference

pytestmark = IN_LAB
MACHINES = ("a", "b")


def paths(status: dict[str, Any]) -> list[str]:
    return [peer["path"] for peer in status["peers"]]


def test_where_tcp_is_swallowed_the_mesh_serves_over_quic_until_it_is_let_through(tmp_path: Path) -> None:
    model = model_file("demo")
    expected = reference(model)
    with Lab(MACHINES) as lab:
        lab.block(*MACHINES, "tcp")
        nodes = [MeshNode(lab, name, tmp_path, model=model, arguments=("--split", "always")) for name in MACHINES]
        try:
            nodes[0].start()
            nodes[0].wait_serving(60)
            nodes[1].start(join=nodes[0].invite())
            for node in nodes:
                assert paths(node.wait_serving(60, members=2)) == ["quic"]
                assert ask(node) == expected
            lab.unblock(*MACHINES, "tcp")
            for node in nodes:
                node.wait(lambda status: paths(status) == ["tcp"], 60, "TCP to be tried again")
                assert ask(node) == expected
        finally:
            for node in nodes:
                if node.running:
                    node.stop()


def test_a_ring_over_tcp_does_not_hang_when_one_of_its_machines_gets_another_address(tmp_path: Path) -> None:
    model = model_file("demo")
    expected = reference(model)
    with Lab(MACHINES) as lab:
        nodes = [
            MeshNode(lab, name, tmp_path, model=model, arguments=("--split", "always"), bind_host="0.0.0.0")
            for name in MACHINES
        ]
        try:
            nodes[0].start()
            nodes[0].wait_serving(60)
            nodes[1].start(join=nodes[0].invite())
            for node in nodes:
                node.wait(lambda status: paths(status) == ["tcp"], 60, "TCP to be tried")
                node.wait_serving(60, members=2)
                assert ask(node) == expected
            for _ in range(2):  # the ring that follows the first move may have begun over QUIC
                lab.move("b")
                for node in nodes:
                    assert ask(node, timeout=60) == expected
                    node.wait_serving(60, members=2)
                    node.wait(lambda status: paths(status) == ["tcp"], 60, "TCP to be tried again")
        finally:
            for node in nodes:
                if node.running:
                    node.stop()
