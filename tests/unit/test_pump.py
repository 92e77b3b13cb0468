"""A core is never entered twice, its timer rings when it asked, and nothing comes after the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from mesh.clock import SystemClock
from mesh.pump import Pump
from tests.eventually import eventually


class Counter:
    """A core that echoes what it hears, and can ask for a timer."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.due: float | None = None
        self.busy = False

    def handle(self, event: Any, now: float) -> Sequence[Any]:
        assert not self.busy
        self.busy = True
        self.heard.append(event)
        if event == "ring":
            self.due = None
        self.busy = False
        return ["again", "again"] if event == "echo" else []

    def next_timer(self) -> float | None:
        return self.due


def driven(core: Counter, effects: list[Any] | None = None) -> Pump:
    return Pump(core, (effects if effects is not None else []).append, lambda: "ring", SystemClock())


async def test_effects_are_carried_out_in_order() -> None:
    core, effects = Counter(), list[Any]()
    driven(core, effects).feed("echo")
    assert effects == ["again", "again"]


async def test_an_event_from_an_effect_waits_its_turn() -> None:
    core = Counter()
    pump = Pump(core, lambda effect: pump.feed(f"{effect} {len(core.heard)}"), lambda: "ring", SystemClock())
    pump.feed("echo")
    assert core.heard == ["echo", "again 1", "again 1"]


async def test_the_timer_rings_when_the_core_asked() -> None:
    core = Counter()
    pump = driven(core)
    core.due = SystemClock().now() + 0.02
    pump.feed("begin")
    await eventually(lambda: core.heard == ["begin", "ring"], within=2)


async def test_an_overdue_timer_rings_at_once() -> None:
    core = Counter()
    core.due = 0.0
    driven(core).feed("begin")
    await eventually(lambda: core.heard == ["begin", "ring"], within=2)


async def test_after_the_end_nothing_is_heard() -> None:
    core = Counter()
    core.due = SystemClock().now() + 0.01
    pump = driven(core)
    pump.feed("begin")
    pump.stop()
    pump.feed("more")
    await asyncio.sleep(0.03)
    assert core.heard == ["begin"]


async def test_a_failing_effect_leaves_the_timer_armed() -> None:
    core = Counter()

    def fail(_: Any) -> None:
        core.due = SystemClock().now() + 0.01
        raise RuntimeError("no")

    pump = Pump(core, fail, lambda: "ring", SystemClock())
    with pytest.raises(RuntimeError):
        pump.feed("echo")
    await eventually(lambda: core.heard == ["echo", "ring"], within=2)
