"""The configurations that are compared: the engine alone, as upstream says, and through the mesh."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from bench import servers
from bench.lab import Lab
from bench.measure import Figures, per_worker
from bench.meshnode import MeshNode, mesh_of
from bench.servers import PORT, START_WITHIN_S, Programs, Setting, Task, machine_names
from mesh.engine.commands import Launch
from mesh.models.gguf import inspect
from mesh.wire.facts import Layout, RingMember


def even_split(n_layers: int, members: int) -> list[int]:
    """Layers of the host and of each worker, as equal as whole layers allow; the host has no more than any other."""
    share, rest = divmod(n_layers, members)
    return [share + (index >= members - rest) for index in range(members)]


def layout_of(task: Task, counts: Sequence[int], names: Sequence[str] | None = None) -> Layout:
    """The layout in which the host and its workers, called as their machines are, carry so many layers each.

    Args:
        names: the machines, host first; None for :func:`bench.servers.machine_names`.
    """
    names = names or machine_names(len(counts) - 1)
    model = inspect(task.model).cost("5e" * 32)
    ring = []
    at = 0
    for name, count in zip(names, counts, strict=True):
        layers = (at, at + count - 1) if count else None
        ring.append(RingMember(name, name, layers, sum(model.layer_bytes[at : at + count]), "CPU"))
        at += count
    mode: Literal["solo", "split"] = "split" if len(ring) > 1 else "solo"
    kept = 2 * task.ctx_size * sum(model.kv_bytes_per_token)  # as a plan gives with memory to spare
    return Layout(
        mode, names[0], model, tuple(ring), ctx_size=task.ctx_size, parallel=task.parallel, prompt_cache_bytes=kept
    )


@contextlib.contextmanager
def solo(lab: Lab, task: Task) -> Iterator[tuple[Setting, Figures]]:
    """``llama-server`` on one machine."""
    with _engine(lab, task, task.programs, "solo", (), ["-dev", "none", "-ngl", "0"]) as started:
        yield started


@contextlib.contextmanager
def upstream(lab: Lab, task: Task, workers: int, *, count_turns: bool = False) -> Iterator[tuple[Setting, Figures]]:
    """What upstream's documentation says: all layers on RPC servers, reached over the open network, weights sent."""
    names = machine_names(workers)[1:]
    arguments = ["--rpc", ",".join(servers.endpoints_of(lab, names, count_turns=count_turns)), "-ngl", "all"]
    with (
        _rpc_servers(lab, task, task.upstream, names, count_turns),
        _engine(lab, task, task.upstream, "upstream", names, arguments) as started,
    ):
        yield started


@contextlib.contextmanager
def mesh(
    lab: Lab, task: Task, workers: int, names: Sequence[str] | None = None
) -> Iterator[tuple[Setting, Figures, dict[str, MeshNode]]]:
    """``mesh up`` on every machine, the model divided over all; asked on the host's machine, as the others are.

    Args:
        names: the machines; None for :func:`bench.servers.machine_names`. Those that are not needed only ask.
    """
    names = names or machine_names(workers)
    arguments = ["--no-discovery", "--ctx-size", str(task.ctx_size), "--parallel", str(task.parallel)]
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
            return len(status["layout"]["ring"]) == workers + 1

        status = watched.wait(serves, START_WITHIN_S, f"serving over {workers + 1} machines")
        now = time.monotonic()
        ring = status["layout"]["ring"]
        host = next(member["name"] for member in ring if member["id"] == status["layout"]["host"])
        away = tuple(member["name"] for member in ring if member["name"] != host)
        figures = Figures("mesh", "", workers, now - began, now - starting_at[0])
        figures.load_bytes = per_worker(lab.counters(), away)
        figures.layers = [0 if m["layers"] is None else m["layers"][1] - m["layers"][0] + 1 for m in ring]
        yield Setting(lab, nodes[host].base_url, host, away), figures, nodes


@contextlib.contextmanager
def _rpc_servers(lab: Lab, task: Task, programs: Programs, names: Sequence[str], count_turns: bool) -> Iterator[None]:
    port = str(servers.RPC_PORT)
    launches = {
        name: Launch((str(programs.rpc_server), "-H", lab.address(name), "-p", port, "-t", str(task.threads)), {})
        for name in names
    }
    with servers.rpc_servers(lab, task.directory, launches, count_turns=count_turns):
        yield


@contextlib.contextmanager
def _engine(
    lab: Lab, task: Task, programs: Programs, name: str, workers: Sequence[str], arguments: Sequence[str]
) -> Iterator[tuple[Setting, Figures]]:
    argv = [str(programs.llama_server), "-m", str(task.model), "--host", "127.0.0.1", "--port", str(PORT)]
    argv += ["-t", str(task.threads), "-c", str(task.ctx_size), "-np", "1", "-fit", "off", "--offline", *arguments]
    with servers.llama_server(lab, task.directory, name, Launch(tuple(argv), {}), workers) as setting:
        figures = Figures(name, "", len(workers), setting.load_s, setting.load_s)
        figures.load_bytes = dict(setting.load_bytes)
        yield setting, figures
