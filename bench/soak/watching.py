"""What every node's own process holds, over time: memory, descriptors, tasks, streams, requests."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.meshnode import MeshNode
from bench.soak.census import TASKS


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one node's process.

    Args:
        at_s: seconds of the run.
        active, held: requests, as its status says.
        tasks: of asyncio, not done; from the newest census.
        engines: processes of the engine on the machine.
    """

    at_s: float
    rss_bytes: int
    descriptors: int
    threads: int
    tasks: int
    active: int
    held: int
    engines: int


def look(node: MeshNode, census: Mapping[str, int], run_began: float) -> Sample | None:
    """None when the process is gone or does not answer."""
    if node.process is None:
        return None
    status = node.status()
    try:
        process = psutil.Process(node.process.pid)
        with process.oneshot():
            rss, descriptors, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    except psutil.Error:
        return None
    requests = {"active": -1, "held": -1} if status is None else status["requests"]
    return Sample(
        time.monotonic() - run_began,
        rss,
        descriptors,
        threads,
        census.get(TASKS, 0),
        requests["active"],
        requests["held"],
        len(node.engine_pids()),
    )


def read_census(path: Path) -> dict[str, int]:
    """The newest one; empty before the first."""
    with contextlib.suppress(OSError, ValueError):
        counted: dict[str, int] = json.loads(path.read_text())
        return counted
    return {}


@dataclass
class Watch:
    """Looks at every node each ``every_s`` seconds, in a thread of its own, between :meth:`start` and :meth:`stop`."""

    nodes: Mapping[str, MeshNode]
    censuses: Mapping[str, Path]
    run_began: float
    every_s: float = 5.0
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def start(self) -> None:
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._enough.set()
        self._thread.join()

    def census(self) -> dict[str, dict[str, int]]:
        """The newest counts of every node."""
        return {name: read_census(path) for name, path in self.censuses.items()}

    def _run(self) -> None:
        while not self._enough.wait(self.every_s):
            for name, node in self.nodes.items():
                sample = look(node, read_census(self.censuses[name]), self.run_began)
                if sample is not None:
                    self.samples.setdefault(name, []).append(sample)
