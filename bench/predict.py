"""Is a plan's time the time that passes? Predicted and measured ms/token of real meshes, and what a node more does.

    bin/bench predict --json predict.json          (--case NAME: one of them; --list; --runs N)

Twelve configurations of one to four machines in the lab, one thread each: `mesh up` on every one, the plan asked for
its time (`mesh plan --json`) once links are measured, then tokens timed one by one. What counts is the median gap
between two tokens in the best of some runs: other work on the machine only makes a run slower. Speeds are measured by
the nodes themselves, the best of some tries, into a cache of the bench's own. Half a processor is a control group's
quota; a millisecond of it is saved while a machine waits, so a ring's share must take many (bench/quota.py).

Then a slow and a distant machine join a mesh that serves: it may not get slower by more than 3%. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.lab import Lab, LabError, lab_available
from bench.measure import BenchError
from bench.meshnode import MeshNode, MeshNodeError, stop_all
from bench.models import find_model
from bench.quota import limited
from bench.tables import markdown
from mesh.engine.cache import cache_root, find_engine

BAR, SLOWER_BAR = 0.15, 1.03
MB = 1_000_000
PROMPT = "The machines in this house are each too small for the model that their owners want to run, so"


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration.

    Args:
        machines: how many.
        memory: megabytes that each may use, in order; 0 or missing: as much as is free.
        cpus: share of a processor that each gets, in order; missing: a whole one.
    """

    name: str
    model: str
    machines: int
    link: str = "lan"
    memory: tuple[int, ...] = ()
    cpus: tuple[float, ...] = ()


CASES = (
    Case("demo alone", "demo", 1),
    Case("mid alone", "mid", 1),
    Case("mid alone, half a core", "mid", 1, cpus=(0.5,)),
    Case("demo x2 lan", "demo", 2),
    Case("mid x2 lan", "mid", 2),
    Case("mid x2 wifi", "mid", 2, "wifi"),
    Case("large x2 lan, half a core", "noise-large", 2, cpus=(1.0, 0.5)),
    Case("demo x3 wan40", "demo", 3, "wan40"),
    Case("mid x3 lan, uneven", "mid", 3, memory=(0, 200, 160)),
    Case("mid x3 wan40, uneven", "mid", 3, "wan40", memory=(0, 160, 260)),
    Case("demo x4 wifi", "demo", 4, "wifi"),
    Case("mid x4 wan40, uneven", "mid", 4, "wan40", memory=(0, 140, 180, 220)),
)


@dataclass(slots=True)
class Outcome:
    """``parts`` are the plan's; times in ms per token."""

    name: str
    predicted: float
    measured: float
    ring: list[str]
    parts: dict[str, float] = field(default_factory=dict)
    runs: list[float] = field(default_factory=list)
    processor: float = 0.0
    """Processor time of all engines together, ms per token: what compute comes to, however busy the machine is."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@contextlib.contextmanager
def _nodes(
    lab: Lab, case: Case, model: Path, directory: Path, arguments: Sequence[str]
) -> Iterator[dict[str, MeshNode]]:
    env = {"MESH_CACHE_DIR": str(directory / "cache")}
    nodes: dict[str, MeshNode] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: stop_all(list(nodes.values())))
        token = None
        for index, machine in enumerate(lab.nodes[: case.machines]):
            memory = case.memory[index] if index < len(case.memory) else 0
            own = ("--max-memory", f"{memory}MB") if memory else ()
            node = MeshNode(lab, machine, directory / case.name.replace(" ", "-"), model=model, env=env,
                            arguments=(*arguments, *own))  # fmt: skip
            nodes[machine] = node
            node.start(join=token)
            cpus = case.cpus[index] if index < len(case.cpus) else 1.0
            if cpus < 1:
                group = stack.enter_context(limited(f"cpu{cpus}", cpus=cpus))
                assert node.process is not None
                group.take(node.process.pid)
            if token is None:
                node.wait(lambda status: True, 90, "an API")
                token = node.invite(uses=8)
        yield nodes


def _speeds(directory: Path, tries: int, cpus: Sequence[float]) -> None:
    """Measure this machine's speed as a node would, several times; the best stays in the nodes' cache."""
    real, mine = cache_root(), directory / "cache"
    mine.mkdir(parents=True, exist_ok=True)
    (mine / "engine").symlink_to(real)
    for share in cpus:
        script = f"from bench.predict import _measure_speed; _measure_speed({tries})"
        env = {**os.environ, "MESH_CACHE_DIR": str(mine)}
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(limited(f"speed{share}", cpus=share)) if share < 1 else None
            child = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.stdin.read(1)\n{script}"], env=env, stdin=subprocess.PIPE,
                preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
            )  # fmt: skip
            if group is not None:
                group.take(child.pid)
            child.communicate(b"x", timeout=600)


def _measure_speed(tries: int) -> None:
    from mesh import hardware
    from mesh.engine.speed import Measured, measure, recall, remember, speed_key
    from mesh.hardware import cgroup

    engine = find_engine()
    assert engine is not None
    device, threads, cpus = hardware.devices()[-1], hardware.threads(), cgroup.limits().cpus
    key = speed_key(engine, device, threads, cpus)
    for _ in range(tries):
        best = recall(key)
        found = asyncio.run(measure(engine, device, threads, "Q8_0", Measured(), cpus=cpus, patience=12))
        layer_us = min(x for x in (found.layer_us, best.layer_us) if x is not None)
        speeds = {**found.speeds, **best.speeds}
        for kind, speed in found.speeds.items():
            speeds[kind] = max(speed, best.speeds.get(kind, 0.0))
        speeds.setdefault("Q4_K", 1e10)  # not asked for here
        speeds.setdefault("F16", 1e10)
        remember(key, Measured(speeds, layer_us))
    found = recall(key)
    ring, alone = found.speeds["Q8_0"] / 1e9, found.speeds["Q8_0 alone"] / 1e9
    said = f"{ring:.1f} GB/s in a ring, {alone:.1f} alone, {found.layer_us:.1f} us a layer"
    print(f"speed with {cpus or 1} cores: {said}", file=sys.stderr)


def _gaps(client: httpx.Client, url: str, tokens: int) -> float:
    """Median milliseconds between two tokens of one streamed completion."""
    body = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
            "cache_prompt": False}  # fmt: skip
    times = []
    with client.stream("POST", f"{url}/completion", json=body, timeout=600) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                times.append(time.monotonic())
    if len(times) < tokens // 2:
        raise BenchError(f"{url} sent {len(times)} of {tokens} tokens")
    return statistics.median(b - a for a, b in pairwise(times[1:])) * 1000


def _processor_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess as error:
        raise BenchError("an engine was started again while it was measured") from error
    return float(times.user + times.system)


def _measured(node: MeshNode, runs: int, tokens: int) -> list[float]:
    return [_gaps(node.client, node.base_url, tokens) for _ in range(runs)]


def _plan(node: MeshNode) -> dict[str, Any]:
    done = node.command("plan", "--json")
    if done.returncode:
        raise BenchError(f"mesh plan: {done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout))


def _host(nodes: dict[str, MeshNode], status: dict[str, Any]) -> MeshNode:
    layout = status["layout"]
    return next(nodes[m["name"]] for m in layout["ring"] if m["id"] == layout["host"])


def run_case(case: Case, models: dict[str, Path], directory: Path, runs: int, tokens: int) -> Outcome:
    names = [f"m{n}" for n in range(case.machines)]
    split = "always" if case.machines > 1 else "never"
    arguments = ("--no-discovery", "--ctx-size", "1024", "--parallel", "1", "--split", split)
    with (
        Lab(names, case.link, cores=1) as lab,
        _nodes(lab, case, models[case.model], directory, arguments) as nodes,
    ):
        status = nodes[names[-1]].wait_serving(120, members=case.machines)
        time.sleep(4)  # links are measured and told within that time
        host = _host(nodes, status)
        engines = [pid for node in nodes.values() for pid in node.engine_pids()]
        before = sum(map(_processor_s, engines))
        measured = _measured(host, runs, tokens)
        processor = (sum(map(_processor_s, engines)) - before) * 1000 / (runs * tokens)
        plan = _plan(host)
        layout = plan["layout"]
        ring = [
            f"{m['name']}:{0 if m['layers'] is None else m['layers'][1] - m['layers'][0] + 1}" for m in layout["ring"]
        ]
        return Outcome(
            case.name,
            layout["predicted_ms_per_token"],
            min(measured),
            ring,
            plan.get("parts") or {},
            measured,
            processor,
        )


def run_joins(models: dict[str, Path], directory: Path, runs: int, tokens: int) -> list[dict[str, Any]]:
    """Two machines that need each other serve; a slow one joins, then a distant one."""
    case = Case("two that need each other", "mid", 2, memory=(280, 280))
    arguments = ("--no-discovery", "--ctx-size", "1024", "--parallel", "1")
    found = []
    with (
        Lab(["m0", "m1", "slow", "far"], "lan", cores=1) as lab,
        _nodes(lab, case, models["mid"], directory, arguments) as nodes,
        limited("slow", cpus=0.2) as group,
    ):
        for other in ("m0", "m1", "slow"):
            lab.set_link("far", other, "wan40")
        status = nodes["m1"].wait_serving(120, members=2)
        host = _host(nodes, status)
        time.sleep(4)  # as above
        token = nodes["m0"].invite(uses=4)
        for name in ("slow", "far"):
            before = _measured(host, runs, tokens)
            node = MeshNode(lab, name, directory / "joins", model=models["mid"], arguments=arguments,
                            env={"MESH_CACHE_DIR": str(directory / "cache")})  # fmt: skip
            if name == "far":
                # As much as the others, so that it would be of use were it near.
                node = MeshNode(lab, name, directory / "joins", model=models["mid"],
                                arguments=(*arguments, "--max-memory", "280MB"),
                                env={"MESH_CACHE_DIR": str(directory / "cache")})  # fmt: skip
            nodes[name] = node
            node.start(join=token)
            if name == "slow":
                assert node.process is not None
                group.take(node.process.pid)
            node.wait(lambda status: status["mesh"]["state"] == "serving", 120, "serving with one more")
            time.sleep(8)  # and whether it is of use was decided with these links
            status = node.wait_serving(60)
            host = _host(nodes, status)
            after = _measured(host, runs, tokens)
            peer = next((p for p in host.status()["peers"] if p["name"] == name), None)  # type: ignore[index]
            found.append({
                "joins": name, "before": min(before), "after": min(after), "ratio": min(after) / min(before),
                "ring": [m["name"] for m in status["layout"]["ring"]], "excluded": peer and peer["excluded"],
            })  # fmt: skip
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bin/bench predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", metavar="NAME", help="one of --list, or 'joins'; default: all")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--runs", type=int, default=4, metavar="N")
    parser.add_argument("--tokens", type=int, default=48, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join([*(case.name for case in CASES), "joins"]))
        return 0
    wanted = [case for case in CASES if not options.case or case.name in options.case]
    outcomes: list[Outcome] = []
    joins: list[dict[str, Any]] = []
    failed = 0
    try:
        available, why = lab_available()
        engine = find_engine()
        if not available or engine is None:
            raise BenchError(f"no lab here: {why}" if engine else "no engine is built: bin/mesh engine build")
        with tempfile.TemporaryDirectory(prefix="meshbench-") as text:
            directory = Path(text)
            models = {
                name: find_model(name, engine.dir / "vocab") for name in {"mid", *(case.model for case in wanted)}
            }
            _speeds(directory, 3, sorted({1.0, *(c for case in wanted for c in case.cpus)} | {0.2}))
            for case in wanted:
                try:
                    outcome = run_case(case, models, directory, options.runs, options.tokens)
                except (BenchError, MeshNodeError, LabError) as error:
                    print(f"{case.name}: failed: {error}", file=sys.stderr)
                    failed += 1
                    continue
                print(f"{case.name}: {outcome.predicted:.1f} predicted, {outcome.measured:.1f} measured "
                      f"({outcome.error:+.0%}) {outcome.parts}", file=sys.stderr)  # fmt: skip
                outcomes.append(outcome)
            if not options.case or "joins" in options.case:
                joins = run_joins(models, directory, options.runs, options.tokens)
    except (BenchError, MeshNodeError, LabError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [
        [o.name, " ".join(o.ring), f"{o.predicted:.1f}", f"{o.measured:.1f}", f"{o.error:+.0%}",
         f"{o.parts.get('compute_ms', 0):.1f}", f"{o.processor:.1f}", "" if abs(o.error) <= BAR else "**missed**"]
        for o in outcomes
    ]  # fmt: skip
    print(
        markdown(
            [
                "configuration",
                "ring, layers",
                "predicted ms/token",
                "measured",
                "error",
                "compute predicted",
                "processor ms/token",
                "",
            ],
            rows,
        )
    )
    if joins:
        rows = [[j["joins"], f"{j['before']:.1f}", f"{j['after']:.1f}", f"{j['ratio']:.3f}", " ".join(j["ring"]),
                 j["excluded"] or ""] for j in joins]  # fmt: skip
        print("\n" + markdown(["joins", "ms/token before", "after", "ratio", "ring then", "told"], rows))
    if options.json:
        report = {"bar": BAR, "cases": [asdict(o) | {"error": o.error} for o in outcomes], "joins": joins}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    good = all(abs(o.error) <= BAR for o in outcomes) and all(j["ratio"] <= SLOWER_BAR for j in joins)
    return 0 if good and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
