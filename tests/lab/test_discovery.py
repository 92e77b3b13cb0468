"""At home: machines that were never told of each other's addresses, on one switch."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.engine.cache import find_engine
from tests.lab.mesh_kit import IN_LAB
from tests.lab.switch import MDNS_PORT, Switch, SwitchNode, wait_until

pytestmark = IN_LAB
MACHINES = ("kitchen", "attic", "laptop")


@pytest.fixture(autouse=True)
def _engine() -> None:
    """`mesh up` would build one, which takes minutes."""
    if find_engine("cpu") is None:
        pytest.skip("the engine is not built: bin/mesh engine build")


@pytest.fixture
def switch() -> Iterator[Switch]:
    with Switch(MACHINES) as switch:
        yield switch


@pytest.fixture
def nodes(switch: Switch, tmp_path: Path) -> list[SwitchNode]:
    return [SwitchNode(switch, machine, tmp_path) for machine in MACHINES]


def pair(newcomer: SwitchNode, member: SwitchNode, *arguments: str) -> None:
    newcomer.start(*arguments)
    approved = member.run("approve", newcomer.code())
    assert approved.returncode == 0, approved.stderr


def test_machines_join_by_the_codes_they_show(nodes: list[SwitchNode]) -> None:
    kitchen, attic, laptop = nodes
    kitchen.start("up").wait_for('founded "kitchen"')
    attic.start("up")
    code = attic.code()
    assert attic.wait_for('mesh "kitchen" is here: run mesh up --join TOKEN, or approve this machine there')
    assert kitchen.wait_for('a machine at 10.78.0.2 asks to join as "attic"')
    assert "attic at 10.78.0.2 asks to be let in as a worker" in kitchen.run("status").stdout

    wrong = kitchen.run("approve", "0000-0000")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: no machine that asks to be let in shows that code; 2 more tries")
    typo = kitchen.run("approve", code[:-1] + ("a" if code[-1] != "a" else "b"))
    assert (typo.returncode, "has a typo" in typo.stderr) == (2, True)
    assert attic.wait_for('a wrong code was typed on a machine of "kitchen"')

    approved = kitchen.run("approve", code.upper().replace("-", " "))
    assert (approved.returncode, approved.stdout[:12]) == (0, "let in attic")
    assert attic.wait_for('joined "kitchen" through kitchen')
    kitchen.wait_peers("attic")
    assert kitchen.run("approve", code).returncode == 1, "a code is good once"

    # A lite client, approved on a member that it may or may not have asked.
    laptop.start("client")
    approved = attic.run("approve", laptop.code(), "--json")
    assert '"role": "client"' in approved.stdout
    laptop.wait_peers("kitchen", "attic")
    assert [node.stop() for node in nodes] == [0, 0, 0]


def test_members_find_each_other_without_a_token_when_every_address_is_new(
    switch: Switch, nodes: list[SwitchNode]
) -> None:
    kitchen, attic, laptop = nodes
    kitchen.start("up").wait_for("founded")
    pair(attic, kitchen, "up")
    pair(laptop, kitchen, "client")
    laptop.wait_peers("kitchen", "attic")
    assert [node.stop() for node in nodes] == [0, 0, 0]
    for number, machine in enumerate(MACHINES, 101):
        switch.move(machine, number)
    kitchen.start("up", "--bind-port", "9001").wait_for('back in "kitchen"')
    attic.start("up", "--bind-port", "9002")
    laptop.start("client", "--bind-port", "9003")
    assert kitchen.wait_peers("attic", "laptop")["attic"]["address"] == "10.78.0.102:9002"
    assert laptop.wait_peers("kitchen", "attic")["kitchen"]["address"] == "10.78.0.101:9001"
    assert [node.stop() for node in nodes] == [0, 0, 0]


def test_members_that_move_while_they_run_find_each_other(switch: Switch, nodes: list[SwitchNode]) -> None:
    kitchen, attic, _ = nodes
    kitchen.start("up").wait_for("founded")
    pair(attic, kitchen, "up")
    kitchen.wait_peers("attic")
    for number, node in enumerate((kitchen, attic), 101):
        switch.move(node.machine, number)
    here = ("10.78.0.101:7842", "10.78.0.102:7842")

    def met() -> bool:
        addresses = [
            node.peers().get(other, {}).get("address") for node, other in ((attic, "kitchen"), (kitchen, "attic"))
        ]
        return addresses == list(here)

    wait_until(met, 60, lambda: "\n".join([*kitchen.lines(), *attic.lines(), str(kitchen.peers()), str(attic.peers())]))
    assert [node.stop() for node in (kitchen, attic)] == [0, 0]


def test_over_ipv6_alone_it_is_the_same(tmp_path: Path) -> None:
    with Switch(("kitchen", "attic"), ipv4=False, ipv6=True) as switch:
        kitchen, attic = (SwitchNode(switch, machine, tmp_path) for machine in switch.machines)
        kitchen.start("up").wait_for("founded")
        pair(attic, kitchen, "up")
        kitchen.wait_peers("attic")
        assert [node.stop() for node in (kitchen, attic)] == [0, 0]
        switch.move("kitchen", 0x101)
        switch.move("attic", 0x102)
        kitchen.start("up")
        attic.start("up")
        assert kitchen.wait_peers("attic")["attic"]["address"] == "[fd78::102]:7842"
        assert [node.stop() for node in (kitchen, attic)] == [0, 0]


def has_mdns_socket(node: SwitchNode) -> bool:
    """Whether anything on the node's machine is bound to the port of mDNS."""
    assert node.process is not None
    tables = [Path(f"/proc/{node.process.pid}/net/{name}").read_text() for name in ("udp", "udp6")]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    return any(int(row[1].rpartition(":")[2], 16) == MDNS_PORT for row in rows)


def test_without_discovery_nothing_is_sent_and_nothing_opened(
    switch: Switch, nodes: list[SwitchNode], tmp_path: Path
) -> None:
    kitchen, attic, laptop = nodes
    kitchen.start("up").wait_for("founded")
    with switch.tap() as seen:
        attic.start("up", "--no-discovery").wait_for('founded "attic"')
        refused = laptop.start("client", "--no-discovery")
        assert refused.process is not None
        assert refused.process.wait(20) == 2
        token = attic.run("invite", "--role", "client").stdout.split()[-1]
        laptop.start("client", "--no-discovery", "--join", token)
        laptop.wait_peers("attic")
        assert not has_mdns_socket(attic)
        assert not has_mdns_socket(laptop)
        assert laptop.stop() == 0
        # The tap works: somebody who does take part is heard.
        (tmp_path / "second").mkdir()
        other = SwitchNode(switch, "kitchen", tmp_path / "second")
        other.start("client", "--bind-port", "0", "--api-port", "0")
        other.code()
        assert has_mdns_socket(other)
        wait_until(lambda: "kitchen" in {machine for machine, _ in seen}, 10, lambda: str(seen))
        assert {machine for machine, _ in seen} == {"kitchen"}
        assert other.stop() == 0
    assert [node.stop() for node in (kitchen, attic)] == [0, 0]


def test_a_founder_does_not_wait_and_is_told_of_the_other_mesh(nodes: list[SwitchNode]) -> None:
    kitchen, attic, laptop = nodes
    kitchen.start("up").wait_for("founded")
    attic.start("up", "--demo").wait_for('founded "attic"')
    assert attic.wait_for('mesh "kitchen" is on this network, too; to be part of it: mesh up --join TOKEN')
    assert not attic.run("status").stdout.count("asks to be let in")
    # Two meshes are here now; a newcomer asks both, and whoever types its code has it.
    laptop.start("client")
    code = laptop.code()
    laptop.wait_for("are here: run mesh client")
    assert attic.run("approve", laptop.code()).returncode == 0, code
    assert laptop.wait_for('joined "attic"')
    assert [node.stop() for node in nodes] == [0, 0, 0]


def test_whoever_stops_waiting_is_forgotten_by_the_member(nodes: list[SwitchNode]) -> None:
    kitchen, attic, _ = nodes
    kitchen.start("up").wait_for("founded")
    attic.start("up")
    code = attic.code()
    assert attic.stop() == 0
    assert attic.wait_for("stopping; this machine is in no mesh")
    refused = kitchen.run("approve", code)
    assert (refused.returncode, "no machine asks to be let in" in refused.stderr) == (1, True)
    assert not (attic.state / "mesh.json").exists()
    assert kitchen.stop() == 0


def test_where_another_program_has_the_port_the_mesh_goes_on(switch: Switch, nodes: list[SwitchNode]) -> None:
    kitchen, attic, _ = nodes
    hog = f"import socket; s=socket.socket({int(socket.AF_INET)},{int(socket.SOCK_DGRAM)}); s.bind(('', 5353)); input()"
    holder = switch.popen("kitchen", [sys.executable, "-c", hog], stdin=-1)
    kitchen.start("up")
    line = kitchen.wait_for("local discovery is off")
    assert line.startswith("warning")
    assert "UDP port 5353 cannot be used" in line
    kitchen.wait_for("founded")
    attic.start("client", "--join", kitchen.run("invite", "--role", "client").stdout.split()[-1])
    attic.wait_peers("kitchen")
    assert [node.stop() for node in (kitchen, attic)] == [0, 0]
    holder.kill()
