"""One fault in a running mesh, from full strength to full strength."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from bench.lab import Lab
from bench.measure import BenchError, complete
from bench.meshnode import MeshNode, stop_all
from bench.recovery.cases import Case, Scene
from bench.recovery.diary import Diary, Entry
from bench.recovery.disk import SlowDisk
from bench.recovery.figures import Recovery, timeline

PROMPT = "Once upon a time"
ORPHANS_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A mesh to hurt.

    Args:
        slow: the machine whose model is a file of its own, and that file.
        slow_rate: bytes per second that it is read with in the case of the slow disk.
        within: seconds any step may take.
    """

    lab: Lab
    nodes: Mapping[str, MeshNode]
    slow: tuple[str, Path]
    slow_rate: int
    within: float


class _Asker(threading.Thread):
    """Asks a node until a token comes; a refusal with Retry-After is asked again, as a client would."""

    def __init__(self, node: MeshNode, within: float) -> None:
        super().__init__(daemon=True)
        self._node, self._deadline = node, time.monotonic() + within
        self.token_at: float | None = None
        self.problem = ""
        self.start()

    def run(self) -> None:
        while self.token_at is None and time.monotonic() < self._deadline:
            try:
                with self._node.lab.client(self._node.machine) as client:
                    complete(client, self._node.base_url, None, PROMPT, 1)
                self.token_at = time.time()
            except (BenchError, httpx.HTTPError) as error:
                self.problem = str(error)
                time.sleep(0.05)


def strike(stage: Stage, case: Case) -> Recovery:
    """Let ``case`` happen, and put the mesh together again.

    Raises:
        BenchError: no token came.
        MeshNodeError: the mesh did not come back to full strength.
    """
    epoch, ring = _whole(stage)
    scene = _cast(stage, case, ring)
    witness = scene.other if case.kind != "load" else _third(stage, scene, ring)
    complete(witness.client, witness.base_url, None, PROMPT, 1)
    hit = {scene.victim.machine, *([scene.other.machine] if case.kind == "load" else [])}
    if case.kind == "engine":
        hit = set()  # the node itself is there, and says so
    diaries = {name: Diary(node.output_path) for name, node in stage.nodes.items() if name not in hit}
    with _slowed(stage, case, scene.victim):
        since = case.strike(scene) if case.kind not in ("sleep", "nap") else 0.0
        asker = _Asker(witness, stage.within)
        if case.kind in ("sleep", "nap"):
            since = case.strike(scene)
        ended = time.time()
        asker.join()
        if asker.token_at is None:
            raise BenchError(f"{case.name}: no token on {witness.machine}: {asker.problem}")
        if case.kind != "nap":
            _await_ready(stage, diaries[witness.machine], since)
    said = {name: diary.entries() for name, diary in diaries.items()}
    # Who leaves is planned away before it goes: that is the first sign of it.
    victim = next((m["id"] for m in ring if m["name"] == _gone(case, scene) and case.kind != "leave"), "")
    figures = timeline(case.name, epoch, since, said, witness.machine, asker.token_at, victim)
    figures = replace(figures, accused=_accused(case, said, ring, scene.victim), orphans=_orphans(case, scene))
    ended = _mend(case, scene) or ended
    _whole(stage)
    return replace(figures, whole_s=time.time() - ended if case.kind != "nap" else None)


def renew(stage: Stage) -> None:
    """Stop all nodes and start them again, at peace: hold-offs live in their memory."""
    stop_all(list(stage.nodes.values()))
    for node in stage.nodes.values():
        node.start()


def _whole(stage: Stage) -> tuple[int, list[dict[str, Any]]]:
    """Wait until everyone is in the ring; its epoch and members, the host first."""
    for node in stage.nodes.values():
        status = node.wait_serving(stage.within, members=len(stage.nodes))
    epochs = {(node.status() or status)["mesh"]["epoch"] for node in stage.nodes.values()}
    return max(epochs), status["layout"]["ring"]


def _cast(stage: Stage, case: Case, ring: list[dict[str, Any]]) -> Scene:
    host, *workers = [stage.nodes[member["name"]] for member in ring]
    if case.hits == "slow":
        victim = stage.nodes[stage.slow[0]]
        other = next(node for node in workers if node is not victim)
    elif case.hits == "host":
        victim, other = host, workers[-1]
    else:
        victim, other = workers[0], host if case.name in ("cut-link", "half-link") else workers[-1]
    return Scene(stage.lab, victim, other, tuple(stage.nodes))


def _gone(case: Case, scene: Scene) -> str:
    """The machine that the others must find missing."""
    return (scene.other if case.kind == "load" else scene.victim).machine


def _third(stage: Stage, scene: Scene, ring: list[dict[str, Any]]) -> MeshNode:
    """A member that neither died nor reads slowly."""
    nodes = [stage.nodes[member["name"]] for member in ring]
    return next(node for node in nodes if node is not scene.victim and node is not scene.other)


@contextlib.contextmanager
def _slowed(stage: Stage, case: Case, victim: MeshNode) -> Iterator[None]:
    if case.kind != "load":
        yield
        return
    with SlowDisk(stage.slow[1], stage.slow_rate) as disk:
        disk.add(stage.lab.pids(victim.machine))
        disk.forget()
        yield


def _await_ready(stage: Stage, diary: Diary, since: float) -> None:
    """The token came by a layout that the witness says is ready; for a case that hit no ring, nothing is said."""
    deadline = time.monotonic() + 3.0
    while diary.first(("ready",), lambda entry: True, since) is None and time.monotonic() < deadline:
        time.sleep(0.02)


def _accused(case: Case, said: Mapping[str, list[Entry]], ring: list[dict[str, Any]], victim: MeshNode) -> int:
    """By how many nodes a machine was taken for dead that only took a nap, or only loaded."""
    if case.kind not in ("nap", "load"):
        return 0
    node = next(member["id"] for member in ring if member["name"] == victim.machine)
    return sum(any(e.kind == "change" and e.said.get("node") == node for e in entries) for entries in said.values())


def _orphans(case: Case, scene: Scene) -> int:
    if not case.stops:
        return 0
    deadline = time.monotonic() + ORPHANS_WITHIN_S
    while scene.victim.engine_pids() and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(scene.victim.engine_pids())


def _mend(case: Case, scene: Scene) -> float | None:
    """Undo the fault; when that was, if it is not over already."""
    ended = None
    if case.kind == "leave":
        scene.victim.wait_stopped(30)
    if case.stops or case.kind == "load":
        ended = time.time()
        (scene.other if case.kind == "load" else scene.victim).start()  # rejoins from its state directory, no token
    if case.kind == "loss" and not case.stops:
        ended = time.time()
        case.mend(scene)
    return ended
