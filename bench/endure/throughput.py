"""Tokens per second of eight streams at once: through the mesh, asked at every node, and of the engine directly."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from bench import settings
from bench.endure.weather import MACHINES
from bench.lab import Lab
from bench.measure import complete, long_prompt
from bench.ring import settings as ring_settings
from bench.servers import Task
from bench.verdicts import Verdict

STREAMS = 8
DIRECT = ("p", "q", "r", "s")
"""Machines of the engine without a mesh: each has the core of its counterpart."""
BAR = 0.95
START_WITHIN_S = 120.0


@dataclass(slots=True)
class Aggregate:
    """Tokens per second of all streams together, turn by turn.

    Args:
        workers: besides the host.
    """

    workers: int
    mesh: list[float] = field(default_factory=list)
    direct: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [mesh / direct for mesh, direct in zip(self.mesh, self.direct, strict=True)]

    def verdict(self) -> Verdict:
        """Held to the bar where one machine carries the model; a ring is shown beside the same ring over bare TCP."""
        ratio = statistics.median(self.ratios)
        rates = f"{statistics.median(self.mesh):.0f} / {statistics.median(self.direct):.0f} tok/s"
        measured = f"{ratio:.3f} ({min(self.ratios):.3f} to {max(self.ratios):.3f}), {rates}"
        if self.workers:
            what = f"{STREAMS} streams, a ring of {self.workers + 1}, mesh / bare TCP"
            return Verdict(what, "-", measured, None)
        return Verdict(f"{STREAMS} streams, mesh / direct llama-server", f"{BAR} x", measured, ratio >= BAR)


def compare(task: Task, workers: int, pairs: int, tokens: int) -> Aggregate:
    """Start both and let them take turns; of a mesh without workers, the other machines only ask."""
    found = Aggregate(workers)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab([*MACHINES, *DIRECT], "lan", cores=task.threads))
        mesh, figures, nodes = stack.enter_context(settings.mesh(lab, task, workers, MACHINES))
        for node in nodes.values():
            node.wait_serving(START_WITHIN_S, members=workers + 1)
        order = [DIRECT[MACHINES.index(name)] for name in (mesh.client_node, *mesh.workers)]
        if workers:
            direct = stack.enter_context(ring_settings.ring(lab, task, figures.layers, names=order))
        else:
            direct = stack.enter_context(ring_settings.solo(lab, task, host=order[0]))
        ours = [(name, nodes[name].base_url) for name in MACHINES]
        theirs = [(direct.client_node, direct.base_url)]
        sides = [
            (_clients(stack, lab, places), rates) for places, rates in ((ours, found.mesh), (theirs, found.direct))
        ]
        for clients, _ in sides:
            rate(clients, 8, 999)
        for number in range(pairs):
            for clients, rates in sides if number % 2 else reversed(sides):
                rates.append(rate(clients, tokens, number))
            last = f"{found.mesh[-1]:.0f} tok/s, directly {found.direct[-1]:.0f}"
            print(f"{workers + 1} machines, turn {number + 1}: {last}", file=sys.stderr, flush=True)
    return found


def _clients(
    stack: contextlib.ExitStack, lab: Lab, places: Sequence[tuple[str, str]]
) -> list[tuple[httpx.Client, str]]:
    chosen = [places[number % len(places)] for number in range(STREAMS)]
    return [(stack.enter_context(lab.client(name)), url) for name, url in chosen]


def rate(clients: Sequence[tuple[httpx.Client, str]], tokens: int, salt: int) -> float:
    """All ask at the same time; tokens per second from then until the last has its answer."""
    start = threading.Barrier(len(clients) + 1)

    def one(number: int) -> int:
        client, url = clients[number]
        start.wait()
        return complete(client, url, None, long_prompt(12, 100 * salt + number), tokens).tokens

    with ThreadPoolExecutor(len(clients)) as pool:
        answers = [pool.submit(one, number) for number in range(len(clients))]
        start.wait()
        began = time.monotonic()
        total = sum(answer.result() for answer in answers)
        return total / (time.monotonic() - began)
