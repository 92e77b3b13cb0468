"""What a node tells of itself, and the contract's status made of what its rooms know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh import hardware
from mesh.config import Settings
from mesh.election.events import Status
from mesh.engine.cache import Engine
from mesh.errors import EngineError
from mesh.hardware.fake import FakeHardware
from mesh.hardware.power_supply import Power
from mesh.membership.view import Departed, Member, View
from mesh.node.facts import OwnFacts
from mesh.node.status import Counts, build_status, memory_bytes, role_in
from mesh.wire.facts import Device, Epoch, Layout, NodeFacts
from tests.fakes.clock import FakeClock
from tests.unit.test_plan_search import GB, a_model, a_node, cpu, layout_of, node_id

ENGINE = Engine(Path("e"), "pin", "cpu", Path("e/s"), Path("e/r"), Path("e/b"))
CUDA = Device("CUDA0", "cuda", "a card", 8 * GB, 8 * GB)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHardware]:
    fake = FakeHardware(8 * GB)
    monkeypatch.setattr(hardware, "devices", fake.devices)
    monkeypatch.setattr(hardware, "threads", fake.threads)
    yield fake


def own(clock: FakeClock, engine: Engine | None = ENGINE, **settings: Any) -> OwnFacts:
    return OwnFacts(Settings(name="kitchen", **settings), node_id(1), engine, ("127.0.0.1:1",), None, clock)


def test_facts_of_a_later_run_are_newer(machine: FakeHardware) -> None:
    clock = FakeClock()
    first = own(clock).facts(())
    clock.advance(1)
    assert own(clock).facts(()).version > first.version


def test_the_version_grows_with_a_change_and_only_then(machine: FakeHardware) -> None:
    facts = own(FakeClock())
    facts.measure()
    first = facts.facts(())
    assert facts.facts(()) is first
    second = facts.facts((a_model(),))
    assert second.version > first.version
    assert second.models == (a_model(),)


def test_a_machine_on_battery_says_so(machine: FakeHardware, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = own(FakeClock())
    facts.measure()
    assert not facts.facts(()).battery
    monkeypatch.setattr(hardware, "power", lambda: Power(on_battery=True))
    assert facts.measure()
    assert facts.facts(()).battery


def test_the_version_grows_even_when_the_clock_goes_back(machine: FakeHardware) -> None:
    clock = FakeClock()
    facts = own(clock)
    facts.measure()
    first = facts.facts(())
    clock.advance(-5000)
    assert facts.facts((a_model(),)).version > first.version


@pytest.mark.parametrize(("free", "notable"), [(0.97, False), (0.90, True), (1.03, False), (1.2, True)])
def test_only_a_notable_change_of_memory_is_worth_telling(machine: FakeHardware, free: float, notable: bool) -> None:
    facts = own(FakeClock())
    assert facts.measure()
    machine.found = (msgspec.structs.replace(machine.found[0], free_bytes=int(8 * GB * free)),)
    assert facts.measure() is notable


def test_a_device_that_goes_away_is_told(machine: FakeHardware) -> None:
    facts = own(FakeClock())
    facts.measure()
    machine.found = ()
    assert facts.measure()


def listing(monkeypatch: pytest.MonkeyPatch, *devices: Device) -> None:
    monkeypatch.setattr("mesh.node.facts.list_devices", lambda engine: devices)


def offered(facts: OwnFacts) -> list[str]:
    facts.list_devices()
    facts.measure()
    return [device.name for device in facts.facts(()).devices]


def test_only_what_the_engine_computes_on_is_offered(machine: FakeHardware, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.found = (CUDA, *machine.found)
    listing(monkeypatch, CUDA)
    assert offered(own(FakeClock())) == ["CPU"]
    assert offered(own(FakeClock(), replace(ENGINE, backend="cuda"))) == ["CUDA0"]


def test_a_gpu_that_the_engine_does_not_list_is_not_offered(
    machine: FakeHardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.found = (CUDA, *machine.found)
    listing(monkeypatch)
    assert offered(own(FakeClock(), replace(ENGINE, backend="cuda"))) == ["CPU"]


def test_no_layers_on_the_gpu_means_the_processor(machine: FakeHardware, monkeypatch: pytest.MonkeyPatch) -> None:
    listing(monkeypatch, CUDA)
    assert offered(own(FakeClock(), replace(ENGINE, backend="cuda"), gpu_layers=0)) == ["CPU"]


def test_an_engine_that_does_not_run_keeps_its_last_list(
    machine: FakeHardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = own(FakeClock(), replace(ENGINE, backend="cuda"))
    listing(monkeypatch, CUDA)
    assert offered(facts) == ["CUDA0"]

    def broken(_: Engine) -> tuple[Device, ...]:
        raise EngineError("it hangs")

    monkeypatch.setattr("mesh.node.facts.list_devices", broken)
    assert offered(facts) == ["CUDA0"]


def test_where_the_engine_computes_instead_is_told_once(machine: FakeHardware) -> None:
    facts = own(FakeClock())
    first = facts.facts(())
    facts.computes_on("")
    assert facts.facts(()) is first
    facts.computes_on("CPU")
    assert facts.facts(()).computes_on == "CPU"
    assert facts.facts(()).version > first.version


def test_a_lite_client_offers_nothing(machine: FakeHardware) -> None:
    facts = own(FakeClock(), None, role="client")
    assert not facts.measure()
    assert facts.facts(()).devices == ()
    assert facts.facts(()).engine == ""


# -- status --------------------------------------------------------------------------------------------------------


@dataclass
class ALink:
    path: str = "quic"
    address: str = "192.168.1.5:7842"
    rtt_ms: float | None = 4.1234


ME = a_node(1)
LAYOUT = layout_of(ME, a_node(2, split="always"))


def status(
    me: NodeFacts = ME, layout: Layout | None = LAYOUT, members: tuple[Member, ...] = (), **view: Any
) -> dict[str, Any]:
    election = Status("serving", Epoch(3, node_id(1)), "because", layout, {node_id(2): "is slow"}, node_id(1))
    seen = View(me.id, (Member(me), *members), **view)
    return build_status(me, "m" * 26, seen, election, {node_id(2): ALink()}, Counts(1, 2, 3, 4, 5))


def test_the_status_has_exactly_the_fields_of_the_contract() -> None:
    found = status(members=(Member(a_node(2)),))
    assert set(found) == {"node", "mesh", "layout", "peers", "requests"}
    assert set(found["node"]) == {"id", "name", "role", "version", "engine"}
    assert set(found["node"]["engine"]) == {"build", "backend"}
    assert found["mesh"] == {"id": "m" * 26, "epoch": 3, "state": "serving", "reason": "because"}
    assert set(found["layout"]) == {
        "mode", "host", "model", "ring", "predicted_ms_per_token", "prompt_cache_bytes",
    }  # fmt: skip
    assert set(found["layout"]["model"]) == {"name", "fingerprint", "size_bytes", "n_layers"}
    assert all(set(member) == {"id", "name", "layers", "bytes", "device"} for member in found["layout"]["ring"])
    assert found["requests"] == {"active": 1, "held": 2, "completed": 3, "resumed": 4, "failed": 5}
    assert set(found["peers"][0]) == {
        "id", "name", "role", "state", "path", "address", "rtt_ms", "memory_bytes", "excluded",
    }  # fmt: skip


def test_the_ring_has_every_layer_once() -> None:
    ring = status()["layout"]["ring"]
    layers = [n for member in ring if member["layers"] for n in range(member["layers"][0], member["layers"][1] + 1)]
    assert layers == list(range(8))


def test_a_member_that_computes_on_another_device_than_planned_is_shown_as_such() -> None:
    me = msgspec.structs.replace(ME, computes_on="CPU")
    layout = msgspec.structs.replace(
        LAYOUT, ring=(msgspec.structs.replace(LAYOUT.ring[0], device="CUDA0"), *LAYOUT.ring[1:])
    )
    devices = [member["device"] for member in status(me, layout)["layout"]["ring"]]
    assert devices[0] == "CPU, not CUDA0"
    assert devices[1] == "CPU"


def test_without_a_layout_there_is_none() -> None:
    assert status(layout=None)["layout"] is None


def test_a_peer_shows_how_it_is_reached_and_why_it_carries_nothing() -> None:
    (peer,) = status(members=(Member(a_node(2), state="suspect"),))["peers"]
    assert peer["state"] == "suspect"
    assert (peer["path"], peer["address"], peer["rtt_ms"]) == ("quic", "192.168.1.5:7842", 4.12)
    assert peer["excluded"] == "is slow"


def test_a_peer_that_only_others_reach_has_no_path() -> None:
    (peer,) = status(members=(Member(a_node(3)),))["peers"]
    assert (peer["path"], peer["address"], peer["rtt_ms"]) == (None, None, None)


def test_who_left_stays_in_sight_with_the_reason() -> None:
    (peer,) = status(departed=(Departed(a_node(4), "crashed"),))["peers"]
    assert (peer["state"], peer["excluded"]) == ("left", "crashed")


@pytest.mark.parametrize(
    ("facts", "role"),
    [
        (a_node(1), "host"),
        (a_node(2), "worker"),
        (a_node(3), "standby"),
        (msgspec.structs.replace(a_node(1), role="client"), "client"),
    ],
)
def test_a_role_is_what_a_node_does_in_the_layout(facts: NodeFacts, role: str) -> None:
    assert role_in(facts, LAYOUT) == role


@pytest.mark.parametrize(("budget", "offered"), [(0, 6 * GB), (4 * GB, 4 * GB), (9 * GB, 6 * GB)])
def test_memory_is_what_is_free_within_the_bound(budget: int, offered: int) -> None:
    facts = a_node(1, budget_bytes=budget, devices=(cpu(2 * GB), cpu(4 * GB)))
    assert memory_bytes(facts) == offered
