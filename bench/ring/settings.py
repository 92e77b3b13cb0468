"""The configurations of the ring's bench: a single process, upstream, and the ring as the mesh starts it."""

from __future__ import annotations

import contextlib
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench import servers, settings
from bench.lab import Lab
from bench.measure import BenchError
from bench.servers import HOST, PORT, Programs, Setting, Task
from mesh.engine.cache import Engine
from mesh.engine.commands import Launch, llama_server_command, rpc_server_command
from mesh.errors import EngineError
from mesh.models.gguf import inspect

SOLO_PORT = PORT + 1
_SECRET = bytes.fromhex("5e" * 32)
_PUSH_LINE = re.compile(r"^mesh-push(-fallback)? (\S+) (\S+)(.*)$", re.MULTILINE)
# Into memory that nothing has touched, in pieces, as an engine does.
_READ = """
import mmap, os, sys, time
file, size = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
memory = mmap.mmap(-1, size)
view, at, began = memoryview(memory), 0, time.perf_counter()
while at < size:
    at += os.preadv(file, [view[at:at + (1 << 24)]], at)
print(time.perf_counter() - began)
"""


@contextlib.contextmanager
def solo(lab: Lab, task: Task, *, host: str = HOST) -> Iterator[Setting]:
    """What the mesh starts on a machine that is alone, on the host's machine, beside what else runs there."""
    layout = settings.layout_of(task, settings.even_split(inspect(task.model).n_layers, 1), [host])
    launch = llama_server_command(_engine(task.programs), layout, task.model, SOLO_PORT, threads=task.threads)
    with servers.llama_server(lab, task.directory, "solo", launch, port=SOLO_PORT, host=host) as setting:
        yield setting


@contextlib.contextmanager
def upstream(lab: Lab, task: Task, workers: int, *, count_turns: bool = False) -> Iterator[Setting]:
    """Every layer on RPC servers, weights sent (:func:`bench.settings.upstream`)."""
    with settings.upstream(lab, task, workers, count_turns=count_turns) as (setting, _):
        yield setting


@contextlib.contextmanager
def ring(
    lab: Lab, task: Task, counts: Sequence[int], *, names: Sequence[str] | None = None, count_turns: bool = False
) -> Iterator[Setting]:
    """The mesh's commands, to the letter, but for the addresses: the open network is where the mesh has its tunnels.

    Args:
        counts: layers of the host and each worker.
        names: their machines; None for :func:`bench.servers.machine_names`.
        count_turns: of the host's connections; the workers' pushes to one another go straight, as ever.
    """
    engine = _engine(task.programs)
    layout = settings.layout_of(task, counts, names)
    workers = [worker.name for worker in layout.workers]
    endpoints = servers.endpoints_of(lab, workers, count_turns=count_turns)
    reached = dict(zip(workers, servers.endpoints_of(lab, workers), strict=True))
    launches = {}
    for name in workers:
        successor = layout.successor(name)
        launch = rpc_server_command(
            engine,
            servers.RPC_PORT,
            threads=task.threads,
            model_files=[task.model],
            fingerprint=layout.model.fingerprint,
            rpc_secret=_SECRET,
            peers={} if successor is None else {successor: reached[successor]},
        )
        launches[name] = _at(launch, lab.address(name))
    host = llama_server_command(engine, layout, task.model, PORT, endpoints, threads=task.threads, rpc_secret=_SECRET)
    if task.ubatch:
        host = Launch((*host.argv, "-ub", str(task.ubatch)), host.env)
    with (
        servers.rpc_servers(lab, task.directory, launches, count_turns=count_turns),
        servers.llama_server(lab, task.directory, "ring", host, workers, host=layout.host) as setting,
    ):
        yield setting


def read_share(lab: Lab, task: Task, workers: int) -> float:
    """Seconds that a plain read of the largest worker's share takes, on that worker's machine and with its cores."""
    model = inspect(task.model)
    layout = settings.layout_of(task, settings.even_split(model.n_layers, workers + 1))
    largest = max(layout.workers, key=lambda worker: worker.bytes)
    times = []
    for _ in range(3):
        argv = [sys.executable, "-c", _READ, str(task.model), str(largest.bytes)]
        done = lab.run(largest.name, argv, timeout=300)
        if done.returncode:
            raise BenchError(f"{task.model} cannot be read: {done.stderr[-300:]}")
        times.append(float(done.stdout))
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Pushes:
    """Which neighbours hand on what they compute, and what is wrong with the others."""

    made: tuple[str, ...]
    faults: tuple[str, ...]


def pushes_of(log: str, workers: Sequence[str]) -> Pushes:
    """What a host said about its ring."""
    said = {(by, to): (fallback, why.strip()) for fallback, by, to, why in _PUSH_LINE.findall(log)}
    made, faults = [], []
    for pair in pairwise(workers):
        words = f"{pair[0]} -> {pair[1]}"
        fallback, why = said.get(pair, ("-", "the host says nothing of it"))
        if fallback:
            faults.append(f"{words}: {why}")
        else:
            made.append(words)
    return Pushes(tuple(made), tuple(faults))


def find_pushes(setting: Setting, within_s: float = 5.0) -> Pushes:
    """:func:`pushes_of` a host that has answered once, which it may still be writing down."""
    if setting.log is None:
        raise BenchError("a ring without a log")
    deadline = time.monotonic() + within_s
    while True:
        pushes = pushes_of(setting.log.read_text(errors="replace"), setting.workers)
        if not pushes.faults or time.monotonic() > deadline:
            return pushes
        time.sleep(0.1)


def _engine(programs: Programs) -> Engine:
    directory: Path = programs.llama_server.parent
    return Engine(directory, "", "cpu", programs.llama_server, programs.rpc_server, directory / "llama-bench")


def _at(launch: Launch, address: str) -> Launch:
    """The same server, listening at another address."""
    argv = list(launch.argv)
    if "-H" not in argv:
        raise EngineError(f"a worker's command without an address: {argv}")
    argv[argv.index("-H") + 1] = address
    return Launch(tuple(argv), launch.env)
