"""What happens to the machines, decided by a seed: kills, joins, leaves. Who is hit depends on who is host then."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.endure.roster import Roster
from bench.lab import Lab
from bench.meshnode import MeshNode, MeshNodeError, stop_all

MACHINES = ("a", "b", "c", "d")
NEWCOMER = "d"
DOWN_S = (0.3, 4.0)
"""From a kill, or an exit, to the next start."""
HOST_SHARE = 0.4
"""Of what happens, to the host: more than its share, since that is the hardest."""
ENGINES = {"host": "llama-server", "worker": "ggml-rpc-server"}


@dataclass(frozen=True, slots=True)
class Happened:
    """One thing that was done to a machine.

    Args:
        role: what the machine was, ``host``, ``worker`` or ``newcomer``.
    """

    at_s: float
    deed: str
    machine: str
    role: str


class Mesh:
    """The nodes, by machine."""

    def __init__(self, lab: Lab, directory: Path, model: Path, arguments: tuple[str, ...], within_s: float) -> None:
        self.roster = Roster(MACHINES)
        self._lab, self._directory, self._model, self._arguments = lab, directory, model, arguments
        self._within_s = within_s
        self._lives = 0
        self.nodes = {name: self._fresh(name) for name in MACHINES}

    @property
    def urls(self) -> dict[str, str]:
        return {name: node.base_url for name, node in self.nodes.items()}

    def start(self, members: int) -> None:
        """So many of them, in one ring."""
        first, *others = list(self.nodes.values())[:members]
        first.start()
        first.wait(lambda status: True, self._within_s, "an API")
        token = first.invite(uses=max(1, len(others)))
        for node in others:
            node.start(join=token)
        for node in (first, *others):
            node.wait_serving(self._within_s, members=members)
        for name in list(self.nodes)[members:]:
            self.roster.goes(name, planned=True)

    def stop(self) -> list[str]:
        """Stop all; which of those that should have run did not."""
        ended = [name for name, node in self.nodes.items() if self.roster.is_up(name) and not node.running]
        stop_all(list(self.nodes.values()))
        return ended

    def whole(self, within_s: float) -> float | None:
        """How long it takes until every running node is in one ring; None: longer."""
        began = time.monotonic()
        running = [node for node in self.nodes.values() if node.running]
        try:
            for node in running:
                node.wait_serving(max(0.1, within_s - (time.monotonic() - began)), members=len(running))
        except MeshNodeError:
            return None
        return time.monotonic() - began

    def host(self) -> str | None:
        """Who hosts the newest layout; None while there is none."""
        seen = [status for node in self.nodes.values() if node.running and (status := node.status()) is not None]
        serving = [status for status in seen if status["layout"] is not None]
        newest: dict[str, Any] | None = max(serving, key=lambda status: status["mesh"]["epoch"], default=None)
        if newest is None:
            return None
        layout = newest["layout"]
        return str(next(member["name"] for member in layout["ring"] if member["id"] == layout["host"]))

    # -- what may happen to a machine ----------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL the node's process; its engine dies with it."""
        self.roster.goes(name)
        self.nodes[name].kill()

    def down(self, name: str) -> None:
        """``mesh down``: it comes back by itself when it is started."""
        self._leave(name, "down")

    def leave(self, name: str) -> None:
        """``mesh leave``: it will need a new invite."""
        self._leave(name, "leave")
        self.nodes[name] = self._fresh(name)

    def _leave(self, name: str, command: str) -> None:
        self.roster.goes(name, planned=True)
        node = self.nodes[name]
        done = node.command(command)
        if done.returncode != 0:
            raise MeshNodeError(f"mesh {command} on {name}: {done.stdout}{done.stderr}")
        node.wait_stopped(self._within_s)

    def back(self, name: str, *, invited: bool = False) -> None:
        """Start it, with a token of somebody else's when it is new, and wait for its API."""
        others = [node for other, node in self.nodes.items() if other != name and self.roster.is_up(other)]
        self.nodes[name].start(join=others[0].invite() if invited else None)
        self.nodes[name].wait(lambda status: True, self._within_s, "an API")
        self.roster.is_back(name)

    def _fresh(self, name: str) -> MeshNode:
        self._lives += 1
        directory = self._directory / f"life{self._lives}"
        return MeshNode(self._lab, name, directory, model=self._model, arguments=self._arguments)


class Weather(Protocol):
    """Does one thing to the mesh, and undoes it; says what it did, or nothing when it could not."""

    def __call__(self, mesh: Mesh, chance: random.Random, number: int) -> Happened | None: ...


def kills(mesh: Mesh, chance: random.Random, number: int) -> Happened | None:
    """A worker or the host dies: all of it, or only its engine. The first three are one of each that matters most."""
    hits_host = chance.random() < HOST_SHARE
    whole = chance.random() < 0.5
    down_s = chance.uniform(*DOWN_S)
    if number < 3:
        hits_host, whole = ((False, True), (True, True), (True, False))[number]
    picked = _pick(mesh, chance, hits_host)
    if picked is None:
        return None
    name, role = picked
    happened = Happened(mesh.roster.now(), "node killed" if whole else "engine killed", name, role)
    if not whole:
        try:
            mesh.nodes[name].kill_engine(ENGINES[role])
        except (MeshNodeError, ProcessLookupError):  # it starts or ends just now
            return None
        return happened
    mesh.kill(name)
    time.sleep(down_s)
    mesh.back(name)
    return happened


def joins(mesh: Mesh, chance: random.Random, number: int) -> Happened | None:
    """A machine that was never here joins with a token; next time it leaves for good."""
    at_s = mesh.roster.now()
    if mesh.roster.is_up(NEWCOMER):
        mesh.leave(NEWCOMER)
        return Happened(at_s, "left", NEWCOMER, "newcomer")
    mesh.back(NEWCOMER, invited=True)
    return Happened(at_s, "joined", NEWCOMER, "newcomer")


def leaves(mesh: Mesh, chance: random.Random, number: int) -> Happened | None:
    """A member goes on purpose, the host or another: ``mesh down`` and back, or ``mesh leave`` and a new invite."""
    picked = _pick(mesh, chance, chance.random() < HOST_SHARE or number == 1)
    down_s = chance.uniform(*DOWN_S)
    if picked is None:
        return None
    name, role = picked
    at_s = mesh.roster.now()
    for_good = chance.random() < 0.5
    if for_good:
        mesh.leave(name)
    else:
        mesh.down(name)
    time.sleep(down_s)
    mesh.back(name, invited=for_good)
    return Happened(at_s, "mesh leave" if for_good else "mesh down", name, role)


WEATHERS: dict[str, tuple[Weather, int]] = {"kills": (kills, 4), "joins": (joins, 3), "leaves": (leaves, 4)}
"""Each with how many machines there are at first."""


@dataclass(frozen=True, slots=True)
class Patience:
    """For a machine that is busy with other things: only so many times, and each when the mesh is whole again."""

    times: int
    whole_within_s: float


def blow(
    mesh: Mesh,
    weather: Weather,
    seed: int,
    every_s: tuple[float, float],
    done: Callable[[float], bool],
    say: Callable[[Happened], None],
    patience: Patience | None = None,
) -> list[Happened]:
    """Let it happen again and again, from the beginning of one to that of the next so many seconds.

    Args:
        done: waits for so many seconds, and says whether there is nobody left to annoy.
    """
    chance = random.Random(f"{seed}/weather")
    happened: list[Happened] = []
    due = mesh.roster.now() + chance.uniform(*every_s) / 2
    while not done(max(0.0, due - mesh.roster.now())):
        due = mesh.roster.now() + chance.uniform(*every_s)
        found = weather(mesh, chance, len(happened))
        if found is None:
            due = mesh.roster.now() + 0.5
            continue
        happened.append(found)
        say(found)
        if patience is not None:
            mesh.whole(patience.whole_within_s)
            due = max(due, mesh.roster.now())
            if len(happened) == patience.times:
                due = math.inf
    return happened


def _pick(mesh: Mesh, chance: random.Random, hits_host: bool) -> tuple[str, str] | None:
    host = mesh.host()
    up = [name for name in MACHINES if mesh.roster.is_up(name)]
    if host is None or host not in up:
        return None
    if hits_host:
        return host, "host"
    return chance.choice([name for name in up if name != host]), "worker"
