"""The configurations that are compared: the engine alone, over bare TCP, and through the mesh."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from bench.lab import Lab
from bench.measure import BenchError, Figures, per_worker
from bench.meshnode import mesh_of
from mesh.models.gguf import inspect

HOST, PORT, RPC_PORT = "a", 8080, 50052
_START_WITHIN_S = 900.0
_ROOT = Path(__file__).resolve().parents[1]
_SECRET = "5e" * 32


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
    count_turns: bool = False
    """Put a relay before every RPC server that counts round trips (:mod:`bench.turns`); it costs some time."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A configuration that serves now."""

    lab: Lab
    base_url: str
    client_node: str
    workers: tuple[str, ...]


def machine_names(workers: int) -> list[str]:
    """The host's machine and those of the workers."""
    return [HOST, *(f"w{n}" for n in range(1, workers + 1))]


def even_split(n_layers: int, members: int) -> list[int]:
    """Layers of the host and of each worker, as equal as whole layers allow; the host has no more than any other."""
    share, rest = divmod(n_layers, members)
    return [share + (index >= members - rest) for index in range(members)]


@contextlib.contextmanager
def solo(lab: Lab, task: Task) -> Iterator[tuple[Setting, Figures]]:
    """``llama-server`` on one machine."""
    arguments = ["-dev", "none", "-ngl", "0"]
    with _engine(lab, task, task.programs, "solo", (), arguments) as started:
        yield started


@contextlib.contextmanager
def upstream(lab: Lab, task: Task, workers: int) -> Iterator[tuple[Setting, Figures]]:
    """What upstream's documentation says: all layers on RPC servers, reached over the open network, weights sent."""
    names = tuple(machine_names(workers)[1:])
    with (
        _rpc_servers(lab, task, task.upstream, names) as endpoints,
        _engine(lab, task, task.upstream, "upstream", names, ["--rpc", endpoints, "-ngl", "all"]) as started,
    ):
        yield started


@contextlib.contextmanager
def bare(lab: Lab, task: Task, workers: int, counts: Sequence[int] | None) -> Iterator[tuple[Setting, Figures]]:
    """The mesh's division of layers (host first, output at home) over the open network, without the mesh.

    Args:
        counts: layers of the host and each worker, in ring order; None for an even split.
    """
    names = tuple(machine_names(workers)[1:])
    counts = counts or even_split(inspect(task.model).n_layers, workers + 1)
    arguments = _divided(counts)
    with (
        _rpc_servers(lab, task, task.programs, names) as endpoints,
        _engine(lab, task, task.programs, "bare", names, ["--rpc", endpoints, *arguments]) as (setting, figures),
    ):
        figures.layers = list(counts)
        yield setting, figures


@contextlib.contextmanager
def ring(lab: Lab, task: Task, workers: int, identity: str) -> Iterator[tuple[Setting, Figures]]:
    """The engine as the mesh starts it (layers divided evenly, weights from every machine's own file, a secret), over
    the open network instead of the mesh's tunnels.

    Args:
        identity: 64 characters that name the model.
    """
    names = tuple(machine_names(workers)[1:])
    counts = even_split(inspect(task.model).n_layers, workers + 1)
    env = {"MESH_RPC_SECRET": _SECRET}
    own_file = ["--gguf", str(task.model), "--gguf-id", identity]
    with (
        _rpc_servers(lab, task, task.programs, names, own_file, env) as endpoints,
        _engine(
            lab,
            task,
            task.programs,
            "ring",
            names,
            ["--rpc", endpoints, *_divided(counts)],
            {**env, "MESH_GGUF_ID": identity},
        ) as (setting, figures),
    ):
        figures.layers = list(counts)
        yield setting, figures


def _divided(counts: Sequence[int]) -> list[str]:
    remote = [*counts[1:-1], counts[-1] + 1]
    arguments = ["-dev", ",".join(f"RPC{n}" for n in range(len(remote))), "-ngl", str(sum(remote))]
    arguments += ["-ts", ",".join(map(str, remote)), "-ot", "^output.*=CPU,^token_embd.*=CPU"]
    return [*arguments, "-lm", "none", "-cram", "0", "-ctxcp", "0"]


@contextlib.contextmanager
def mesh(lab: Lab, task: Task, workers: int) -> Iterator[tuple[Setting, Figures]]:
    """``mesh up`` on every machine, the model divided over all; asked on the host's machine, as the others are."""
    names = machine_names(workers)
    arguments = ["--no-discovery", "--ctx-size", str(task.ctx_size), "--parallel", "1"]
    arguments += ["--split", "always" if workers else "never"]
    lab.reset_counters()
    directory = task.directory / f"mesh{workers}-{time.monotonic_ns()}"
    with mesh_of(lab, directory, names, model=task.model, arguments=arguments) as nodes:
        began = time.monotonic()
        watched = nodes[names[-1]]
        starting_at = [began]

        def serves(status: dict[str, Any]) -> bool:
            if status["mesh"]["state"] != "serving":
                if status["mesh"]["state"] != "starting":
                    starting_at[0] = time.monotonic()
                return False
            return len(status["layout"]["ring"]) == len(names)

        status = watched.wait(serves, _START_WITHIN_S, f"serving over {len(names)} machines")
        now = time.monotonic()
        ring = status["layout"]["ring"]
        host = next(member["name"] for member in ring if member["id"] == status["layout"]["host"])
        away = tuple(name for name in names if name != host)
        figures = Figures("mesh", "", workers, now - began, now - starting_at[0])
        figures.load_bytes = per_worker(lab.counters(), away)
        figures.layers = [0 if m["layers"] is None else m["layers"][1] - m["layers"][0] + 1 for m in ring]
        yield Setting(lab, nodes[host].base_url, host, away), figures


@contextlib.contextmanager
def _rpc_servers(
    lab: Lab,
    task: Task,
    programs: Programs,
    names: Sequence[str],
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[str]:
    started = []
    port = RPC_PORT + task.count_turns
    try:
        for name in names:
            argv = [str(programs.rpc_server), "-H", lab.address(name), "-p", str(port), "-t", str(task.threads)]
            with (task.directory / f"rpc-{name}.log").open("ab") as log:
                started.append(_popen(lab, name, [*argv, *arguments], log, env))
        for name in names:
            _wait_listening(lab, name, port)
        for name in names if task.count_turns else ():
            counter = [sys.executable, "-m", "bench.turns", lab.address(name), str(RPC_PORT), str(port)]
            with turns_file(task, name).open("wb") as counts:
                started.append(_popen(lab, name, counter, counts, {"PYTHONPATH": str(_ROOT)}))
        for name in names if task.count_turns else ():
            _wait_listening(lab, name, RPC_PORT)
        yield ",".join(f"{lab.address(name)}:{RPC_PORT}" for name in names)
    finally:
        for process in started:
            process.kill()
            process.wait()


def turns_file(task: Task, worker: str) -> Path:
    """Where :mod:`bench.turns` writes what it counted before that worker."""
    return task.directory / f"turns-{worker}"


def _wait_listening(lab: Lab, name: str, port: int) -> None:
    # Not by connecting: rpc-server serves one client at a time, and would take us for it.
    wanted = f":{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + 20
    while wanted not in lab.run(name, ["cat", "/proc/net/tcp"]).stdout:
        if time.monotonic() > deadline:
            raise BenchError(f"rpc-server on {name} does not listen")
        time.sleep(0.02)


@contextlib.contextmanager
def _engine(
    lab: Lab,
    task: Task,
    programs: Programs,
    name: str,
    workers: tuple[str, ...],
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
) -> Iterator[tuple[Setting, Figures]]:
    argv = [str(programs.llama_server), "-m", str(task.model), "--host", "127.0.0.1", "--port", str(PORT)]
    argv += ["-t", str(task.threads), "-c", str(task.ctx_size), "-np", "1", "-fit", "off", "--offline", *arguments]
    log_path = task.directory / f"{name}-{len(workers)}.log"
    base_url = f"http://127.0.0.1:{PORT}"
    lab.reset_counters()
    began = time.monotonic()
    with log_path.open("ab") as log:
        process = _popen(lab, HOST, argv, log, env)
    try:
        with lab.client(HOST) as client:
            while not _is_healthy(client, base_url):
                if process.poll() is not None or time.monotonic() - began > _START_WITHIN_S:
                    tail = log_path.read_text(errors="replace")[-600:]
                    raise BenchError(f"{name}: llama-server did not start ({process.returncode}): {tail}")
                time.sleep(0.01)
        took = time.monotonic() - began
        figures = Figures(name, "", len(workers), took, took)
        figures.load_bytes = per_worker(lab.counters(), workers)
        yield Setting(lab, base_url, HOST, workers), figures
    finally:
        process.kill()
        process.wait()


def _popen(
    lab: Lab, node: str, argv: Sequence[str], log: IO[bytes], said: Mapping[str, str] | None = None
) -> subprocess.Popen[Any]:
    # What the mesh would say to its engine is said on purpose only: without it weights are sent, to whoever asks.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_", "MESH_"))}
    env |= said or {}
    return lab.popen(node, argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def _is_healthy(client: httpx.Client, base_url: str) -> bool:
    try:
        return client.get(f"{base_url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
