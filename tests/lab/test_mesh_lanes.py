"""A firewall that swallows TCP: the mesh serves over QUIC, and goes over to TCP when the firewall lets it."""

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
