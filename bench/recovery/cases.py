"""The faults: what each does to a machine, to whom, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bench.lab import Lab
from bench.meshnode import MeshNode


@dataclass(frozen=True, slots=True)
class Scene:
    """Who is who when a fault comes. ``victim`` is hit; ``other`` is a ring member that is not."""

    lab: Lab
    victim: MeshNode
    other: MeshNode
    everyone: tuple[str, ...]


Kind = Literal["loss", "engine", "leave", "sleep", "nap", "load"]
"""``loss``: a member is gone and must be detected. ``engine``: only a process of it is. ``leave``: it says that it
goes. ``sleep``: it stops for longer than a member may. ``nap``: it stops for so short that nobody may miss it.
``load``: a loss elsewhere, after which this machine loads slowly."""


@dataclass(frozen=True, slots=True)
class Case:
    """One fault.

    Args:
        hits: which member of the ring; ``slow`` is the machine with a file of its own.
        strike: does it; returns when it was done, seconds since 1970.
        mend: undoes it.
        stops: the victim's node ends by it, and is started again to mend it.
    """

    name: str
    kind: Kind
    hits: Literal["worker", "host", "slow"]
    strike: Callable[[Scene], float]
    mend: Callable[[Scene], None] = lambda scene: None
    stops: bool = False


def _kill(scene: Scene) -> float:
    scene.victim.kill()
    return time.time()


def _kill_engine(name: str) -> Callable[[Scene], float]:
    def strike(scene: Scene) -> float:
        scene.victim.kill_engine(name)
        return time.time()

    return strike


def _leave(scene: Scene) -> float:
    at = time.time()
    scene.victim.interrupt()
    return at


def _signal_all(scene: Scene, number: signal.Signals) -> None:
    for pid in scene.lab.pids(scene.victim.machine):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _sleep(seconds: float) -> Callable[[Scene], float]:
    """The machine's lid is closed: node and engine stop, and go on."""

    def strike(scene: Scene) -> float:
        at = time.time()
        _signal_all(scene, signal.SIGSTOP)
        time.sleep(seconds)
        _signal_all(scene, signal.SIGCONT)
        return at

    return strike


def _cut_off(scene: Scene) -> float:
    scene.lab.part([scene.victim.machine], [name for name in scene.everyone if name != scene.victim.machine])
    return time.time()


def _mute(scene: Scene) -> float:
    """It hears everybody, and nobody hears it."""
    for name in scene.everyone:
        if name != scene.victim.machine:
            scene.lab.cut(scene.victim.machine, name, both=False)
    return time.time()


def _cut_link(both: bool) -> Callable[[Scene], float]:
    def strike(scene: Scene) -> float:
        scene.lab.cut(scene.victim.machine, scene.other.machine, both=both)
        return time.time()

    return strike


def _heal(scene: Scene) -> None:
    scene.lab.heal_all()


def _kill_other(scene: Scene) -> float:
    scene.other.kill()
    return time.time()


CASES = (
    Case("worker", "loss", "worker", _kill, stops=True),
    Case("host", "loss", "host", _kill, stops=True),
    Case("llama-server", "engine", "host", _kill_engine("llama-server")),
    Case("rpc-server", "engine", "worker", _kill_engine("ggml-rpc-server")),
    Case("leave", "leave", "worker", _leave, stops=True),
    Case("leave-host", "leave", "host", _leave, stops=True),
    Case("stall-1", "nap", "worker", _sleep(1.0)),
    Case("stall-3", "sleep", "worker", _sleep(3.0)),
    Case("stall-10", "sleep", "worker", _sleep(10.0)),
    Case("cut-off", "loss", "worker", _cut_off, _heal),
    Case("mute", "loss", "worker", _mute, _heal),
    Case("cut-link", "loss", "worker", _cut_link(both=True), _heal),
    Case("half-link", "loss", "worker", _cut_link(both=False), _heal),
    Case("slow-disk", "load", "slow", _kill_other),
)
"""In order of interest. ``cut-link`` and ``half-link`` part a worker from the host alone."""
