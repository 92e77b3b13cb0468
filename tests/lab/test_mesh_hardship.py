"""Full disks, wrong clocks, no memory, machines that come and go, engines that fail: it goes on, or says why."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.lab import Lab
from bench.meshnode import MeshNode, stop_all
from tests.lab.hardship import BoxedNode, SettableClock, SmallDisk, give_no_more_memory, kill, to_every, wait_for
from tests.lab.mesh_kit import IN_LAB, Streamed, ask, model_file, reference

pytestmark = IN_LAB
HOUR = 3600
DISK = 1_500_000


class Mesh:
    """``plain``, ``boxed`` with a small disk and ``timed`` with a clock of its own share the demo model; ``guest`` may
    come. Brought back to full strength before each test."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        model = model_file("demo")
        self.expected = reference(model)
        self.clock = SettableClock(directory)
        arguments = ("--split", "always", "--no-discovery")
        self.plain = MeshNode(lab, "plain", directory, model=model, arguments=arguments)
        self.disk = SmallDisk(directory / "boxed" / "state", DISK)
        self.boxed = BoxedNode(lab, "boxed", directory, model=model, arguments=arguments, program=self.disk.program)
        self.boxed.disk = self.disk
        self.timed = MeshNode(lab, "timed", directory, model=model, arguments=arguments, env=self.clock.env)
        self.nodes = (self.plain, self.boxed, self.timed)
        self.directory = directory
        self.plain.start()
        self.plain.wait_serving(60)
        token = self.plain.invite(uses=2)
        for node in self.nodes[1:]:
            node.start(join=token)

    def whole(self, after: int = -1) -> int:
        """Everybody in, one ring of three in an epoch above ``after``; that epoch."""
        for node in self.nodes:
            if not node.running:
                node.start()
        for node in self.nodes:
            status = node.wait_serving(60, members=3, after=after)
        return int(status["mesh"]["epoch"])

    def guest(self, number: int, token: str) -> MeshNode:
        """A lite client that comes by ``token``."""
        node = MeshNode(self.lab, "guest", self.directory / str(number), role="client", arguments=("--no-discovery",))
        node.start(join=token)
        return node

    def stop(self) -> None:
        stop_all(self.nodes)
        self.disk.close()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Lab(("plain", "boxed", "timed", "guest"), link="lan", cores=1) as lab:
        made = Mesh(lab, tmp_path_factory.mktemp("hardship"))
        try:
            yield made
        finally:
            made.stop()


def refused(guest: MeshNode) -> str:
    """What it said on its way out."""
    assert guest.process is not None
    assert guest.process.wait(20) != 0
    said = guest.said()
    guest.forget()
    return said


def peer(node: MeshNode, name: str) -> dict[str, Any]:
    status = node.status()
    assert status is not None
    found: dict[str, Any] = next(peer for peer in status["peers"] if peer["name"] == name)
    return found


def begun_anew(mesh: Mesh) -> None:
    """Everybody stopped and started: hold-offs of earlier tests, which grow from one to the next, are forgotten."""
    stop_all(mesh.nodes)
    mesh.whole()


def resumed_or_failed(node: MeshNode) -> int:
    status = node.status()
    assert status is not None
    return int(status["requests"]["resumed"] + status["requests"]["failed"])


# -- the disk --------------------------------------------------------------------------------------------------------


def test_nothing_restarts_for_a_machine_that_carries_nothing(mesh: Mesh) -> None:
    epoch = mesh.whole()
    engines = [pid for node in mesh.nodes for pid in node.engine_pids()]
    guest = mesh.guest(5, mesh.plain.invite(role="client"))
    guest.wait_serving(30)
    assert guest.stop() == 0
    assert mesh.whole() == epoch
    assert [pid for node in mesh.nodes for pid in node.engine_pids()] == engines


def test_a_full_disk_costs_what_should_have_been_written_and_not_the_node(mesh: Mesh) -> None:
    before = mesh.whole()
    token = mesh.boxed.invite(role="client")
    mesh.disk.fill()
    mesh.timed.kill()
    mesh.boxed.wait_serving(60, members=2, after=before)
    assert ask(mesh.boxed) == mesh.expected
    assert "No space left on device; this node goes on" in mesh.boxed.output_path.read_text()

    invite = mesh.boxed.command("invite")
    assert invite.returncode == 1 and "No space left on device" in invite.stderr + invite.stdout
    assert "disk" in refused(mesh.guest(1, token)), "nobody is let in whose use cannot be burned, and it says why"

    mesh.boxed.kill()
    kept = {name: (mesh.disk.inside / name).read_bytes() for name in ("node.key", "mesh.json", "invites.json")}
    json.loads(kept["mesh.json"]), json.loads(kept["invites.json"])
    mesh.boxed.start()
    assert "No space left on device" in refused(mesh.boxed)
    assert {name: (mesh.disk.inside / name).read_bytes() for name in kept} == kept

    mesh.disk.free()
    mesh.whole(after=before)
    guest = mesh.guest(2, token)
    guest.wait_serving(30)
    assert guest.stop() == 0


# -- the clock -------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_disturbs_nobody_and_decides_what_has_expired(mesh: Mesh) -> None:
    epoch = mesh.whole()
    token = mesh.timed.invite(role="client")
    stream = Streamed(mesh.timed, 1500)
    stream.wait_for(5)
    for offset in (HOUR, -HOUR, 2 * HOUR):
        mesh.clock.set(offset)
        made = json.loads(mesh.timed.command("invite", "--json").stdout)
        assert abs(made["expires_at"] - time.time() - offset - HOUR) < 60, "the clock did not jump"
    assert "expired" in refused(mesh.guest(3, token))
    stream.wait_for(stream.tokens + 5)
    stream.cancel()
    assert resumed_or_failed(mesh.timed) == 0
    for node in mesh.nodes:
        status = node.status()
        assert status is not None and (status["mesh"]["state"], status["mesh"]["epoch"]) == ("serving", epoch)

    mesh.clock.set(0)
    guest = mesh.guest(4, token)
    guest.wait_serving(30)
    assert guest.stop() == 0


def test_a_machine_that_starts_with_its_clock_behind_is_the_member_it_was(mesh: Mesh) -> None:
    before = mesh.whole()
    mesh.timed.kill()
    mesh.clock.set(-HOUR)
    try:
        mesh.whole(after=before)
        assert ask(mesh.timed) == mesh.expected
    finally:
        mesh.clock.set(0)


# -- what restarts, and how often ------------------------------------------------------------------------------------


def test_a_machine_without_memory_is_left_out_and_the_reason_is_shown(mesh: Mesh) -> None:
    before = mesh.whole()
    poor = mesh.boxed
    poor.kill_engine()
    with to_every(poor, None, give_no_more_memory) as limited:
        status = mesh.plain.wait_serving(60, members=2, after=before)
        assert limited, "nobody ran out of memory"
        assert poor.machine not in [member["name"] for member in status["layout"]["ring"]]
        why = peer(mesh.plain, poor.machine)["excluded"]
        assert "engine on boxed" in why and "held off for" in why, why
        assert status["mesh"]["epoch"] - before <= 8, "it went round and round"
        assert ask(mesh.plain) == mesh.expected


@pytest.mark.parametrize("flaps", [max, min], ids=["another", "the coordinator"])
def test_a_machine_that_keeps_going_away_is_held_off_and_the_reason_is_shown(
    mesh: Mesh, flaps: Callable[[Iterable[str]], str]
) -> None:
    begun_anew(mesh)
    ids = {node.status()["node"]["id"]: node for node in mesh.nodes}  # type: ignore[index]
    flapping = ids.pop(flaps(ids))
    witness = ids[min(ids)]
    name = flapping.machine
    for _ in range(3):
        flapping.kill()
        witness.wait(lambda status: peer(witness, name)["state"] == "left", 20, f"{name} is missed")
        flapping.start()
        witness.wait(lambda status: peer(witness, name)["state"] == "alive", 30, f"{name} is back")
    witness.wait(lambda status: peer(witness, name)["excluded"], 20, "a reason")
    why = peer(witness, name)["excluded"]
    assert "keeps going away" in why and "held off for" in why, why
    assert "keeps going away" in witness.command("status").stdout
    status = witness.wait_serving(30)
    assert name not in [member["name"] for member in status["layout"]["ring"]]
    assert ask(flapping) == mesh.expected, "held off, it still answers its own people"


def test_an_engine_that_will_not_run_ends_in_a_reason_and_a_change_ends_that(mesh: Mesh, tmp_path: Path) -> None:
    lone = MeshNode(mesh.lab, "guest", tmp_path, model=model_file("demo"), arguments=("--no-discovery",))
    try:
        with to_every(lone, "llama-server", kill) as killed:
            lone.start()
            status = lone.wait(lambda status: status["mesh"]["reason"].startswith("FAILED"), 60, "FAILED")
            assert status["mesh"]["state"] == "waiting"
            assert "failed 5 times" in status["mesh"]["reason"]
            assert len(killed) == 5
            wait_for(lambda: not lone.engine_pids(), 5, "no engine is left")
        said = lone.command("status").stdout
        assert "FAILED" in said and "llama-server" in said
        assert lone.stop() == 0
        lone.start()
        lone.wait_serving(30)
    finally:
        stop_all([lone])
