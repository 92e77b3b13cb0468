"""The engine's servers in the lab's machines: started, waited for, ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx

from bench.lab import Lab
from bench.measure import BenchError, per_worker
from mesh.engine.commands import Launch

HOST, PORT, RPC_PORT = "a", 8080, 50052
START_WITHIN_S = 900.0
_ROOT = Path(__file__).resolve().parents[1]
_serials = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Programs:
    """The engine's binaries."""

    llama_server: Path
    rpc_server: Path
    vocabularies: Path
    """Directory of tokenizer-only GGUFs, for writing demo models."""


@dataclass(frozen=True, slots=True)
class Task:
    """What every configuration serves, and with how much."""

    programs: Programs
    upstream: Programs
    model: Path
    threads: int
    ctx_size: int
    directory: Path
    ubatch: int = 0
    """Tokens of a micro-batch, for experiments; 0 leaves the choice to whoever makes the command."""
    parallel: int = 1
    """Requests at the same time, each with ``ctx_size`` of context."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A configuration that serves now."""

    lab: Lab
    base_url: str
    client_node: str
    workers: tuple[str, ...]
    load_s: float = 0.0
    """From starting ``llama-server`` to its being healthy."""
    load_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of each worker in that time, both ways."""
    log: Path | None = None
    """What ``llama-server`` says."""


def machine_names(workers: int) -> list[str]:
    """The host's machine and those of the workers."""
    return [HOST, *(f"w{n}" for n in range(1, workers + 1))]


@contextlib.contextmanager
def rpc_servers(
    lab: Lab, directory: Path, launches: Mapping[str, Launch], *, count_turns: bool = False
) -> Iterator[None]:
    """One RPC server in each of the named machines, which the host reaches at :func:`endpoints_of` them.

    Args:
        launches: commands that let a server listen at :data:`RPC_PORT` of its machine's address.
        count_turns: put a relay between the host and every server that counts the host's round trips
            (:mod:`bench.turns`); it costs some time. What servers say to one another does not go through it.
    """
    started = []
    try:
        for name, launch in launches.items():
            with (directory / f"rpc-{name}.log").open("ab") as log:
                started.append(_popen(lab, name, launch, log))
        for name in launches:
            _wait_listening(lab, name, RPC_PORT)
        for port, name in enumerate(launches if count_turns else (), RPC_PORT + 1):
            argv = (sys.executable, "-m", "bench.turns", str(port), lab.address(name), str(RPC_PORT))
            with turns_file(directory, name).open("wb") as counts:
                started.append(_popen(lab, HOST, Launch(argv, {"PYTHONPATH": str(_ROOT)}), counts))
            _wait_listening(lab, HOST, port)
        yield
    finally:
        _end(started)


def endpoints_of(lab: Lab, workers: Sequence[str], *, count_turns: bool = False) -> list[str]:
    """Where the host reaches the workers' RPC servers."""
    if count_turns:
        return [f"127.0.0.1:{port}" for port, _ in enumerate(workers, RPC_PORT + 1)]
    return [f"{lab.address(worker)}:{RPC_PORT}" for worker in workers]


def turns_file(directory: Path, worker: str) -> Path:
    """Where :mod:`bench.turns` writes what it counted before that worker."""
    return directory / f"turns-{worker}"


@contextlib.contextmanager
def llama_server(
    lab: Lab,
    directory: Path,
    name: str,
    launch: Launch,
    workers: Sequence[str] = (),
    *,
    port: int = PORT,
    host: str = HOST,
) -> Iterator[Setting]:
    """A server on the host's machine, from when it is healthy; ``name`` is for its log and for what goes wrong.

    Raises:
        BenchError: it ended, or took too long.
    """
    log_path = directory / f"{name}-{len(workers)}-{next(_serials)}.log"
    base_url = f"http://127.0.0.1:{port}"
    lab.reset_counters()
    began = time.monotonic()
    with log_path.open("ab") as log:
        process = _popen(lab, host, launch, log)
    try:
        with lab.client(host) as client:
            while not _is_healthy(client, base_url):
                if process.poll() is not None or time.monotonic() - began > START_WITHIN_S:
                    tail = log_path.read_text(errors="replace")[-600:]
                    raise BenchError(f"{name}: llama-server did not start ({process.returncode}): {tail}")
                time.sleep(0.01)
        took = time.monotonic() - began
        carried = per_worker(lab.counters(), workers)
        yield Setting(lab, base_url, host, tuple(workers), took, carried, log_path)
    finally:
        _end([process])


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _wait_listening(lab: Lab, name: str, port: int) -> None:
    # Not by connecting: rpc-server serves one client at a time, and would take us for it.
    wanted = f":{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + 20
    while wanted not in lab.run(name, ["cat", "/proc/net/tcp"]).stdout:
        if time.monotonic() > deadline:
            raise BenchError(f"nothing listens on port {port} of {name}")
        time.sleep(0.02)


def _popen(lab: Lab, node: str, launch: Launch, log: IO[bytes]) -> subprocess.Popen[Any]:
    # What the mesh would say to its engine is said on purpose only: without it weights are sent, to whoever asks.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_", "MESH_"))}
    env |= launch.env
    return lab.popen(node, launch.argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _is_healthy(client: httpx.Client, base_url: str) -> bool:
    try:
        return client.get(f"{base_url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
