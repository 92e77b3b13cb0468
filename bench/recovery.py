"""How long until tokens flow again after a SIGKILL: of a worker, of the host, of the host's llama-server.

    bin/bench recovery --model demo --link lan --machines 3 --runs 3 --json figures.json

A machine that was not hit sends a streamed request right after the kill, and the first token ends the clock: what a
person at that machine would see. The status of that machine says when the loss was noticed, when the new epoch was
agreed, and when it was served. Every run ends with a check that no engine process outlived its node. Steps show the
median and the worst, or p50 / p95 / p99 from five runs on. Needs root (see bench/lab).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import tables
from bench.lab import Lab, LabError, lab_available
from bench.lab.selfcheck import percentile
from bench.measure import BenchError, complete
from bench.meshnode import MeshNode, MeshNodeError, mesh_of
from bench.models import find_model
from bench.servers import machine_names
from bench.tokps import find_programs
from mesh.errors import MeshError

CASES = ("worker", "host", "llama-server")
_ORPHANS_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds after the kill. None: the status never showed it."""

    case: str
    noticed_s: float | None
    """Another state than serving, or a new epoch."""
    agreed_s: float | None
    """A higher epoch."""
    serving_s: float | None
    """Serving in the higher epoch."""
    token_s: float
    """First token of a request sent right after the kill."""
    epoch_before: int
    epoch_after: int
    orphans: int
    """Engine processes on the victim's machine that outlived their node by five seconds."""


class Watcher:
    """Polls a node's status on a thread and notes when what first showed."""

    def __init__(self, node: MeshNode, epoch: int) -> None:
        self._node, self._epoch = node, epoch
        self._stop = threading.Event()
        self.seen: dict[str, float] = {}
        self.epoch = epoch
        self._client = node.lab.client(node.machine)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                status = self._client.get(f"{self._node.base_url}/mesh/status", timeout=5).json()["mesh"]
                self._note(status["state"], int(status["epoch"]), time.monotonic())

    def _note(self, state: str, epoch: int, now: float) -> None:
        if state != "serving" or epoch > self._epoch:
            self.seen.setdefault("noticed", now)
        if epoch > self._epoch:
            self.seen.setdefault("agreed", now)
            self.epoch = epoch
            if state == "serving":
                self.seen.setdefault("serving", now)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


def first_token(node: MeshNode, deadline: float) -> float:
    """Ask until a token comes; returns when. A refusal with Retry-After is asked again, as a client would."""
    while True:
        try:
            with node.lab.client(node.machine) as client:
                complete(client, node.base_url, None, "Once upon a time", 1)
            return time.monotonic()
        except (BenchError, httpx.HTTPError) as error:
            if time.monotonic() > deadline:
                raise BenchError(f"no token on {node.machine} after the kill: {error}") from error
            time.sleep(0.05)


def strike(nodes: dict[str, MeshNode], case: str, within: float) -> Recovery:
    """Kill what the case says, and time what follows on a machine that was not hit."""
    anyone = next(iter(nodes.values()))
    status = anyone.wait_serving(within, members=len(nodes))
    layout, epoch = status["layout"], status["mesh"]["epoch"]
    names = {member["id"]: member["name"] for member in layout["ring"]}
    host = nodes[names[layout["host"]]]
    others = [nodes[names[m["id"]]] for m in layout["ring"] if m["id"] != layout["host"]]
    victim = others[0] if case == "worker" else host
    witness = others[-1] if others[-1] is not victim else host
    complete(witness.client, witness.base_url, None, "Once upon a time", 1)
    watcher = Watcher(witness, epoch)
    try:
        killed_at = victim.kill_engine("llama-server") if case == "llama-server" else victim.kill()
        token_at = first_token(witness, killed_at + within)
        deadline = time.monotonic() + within
        while "serving" not in watcher.seen and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        watcher.close()
    orphans = 0
    if case != "llama-server":
        deadline = time.monotonic() + _ORPHANS_WITHIN_S
        while victim.engine_pids() and time.monotonic() < deadline:
            time.sleep(0.05)
        orphans = len(victim.engine_pids())
        victim.start()  # comes back by itself from its state directory, without a token
        anyone = victim
    anyone.wait_serving(within, members=len(nodes), after=epoch)

    def since(name: str) -> float | None:
        return watcher.seen[name] - killed_at if name in watcher.seen else None

    return Recovery(
        case,
        since("noticed"),
        since("agreed"),
        since("serving"),
        token_at - killed_at,
        epoch,
        watcher.epoch,
        orphans,
    )


def recovery_table(done: Sequence[Recovery]) -> str:
    """One row per case: p50 and worst of each step."""
    header = ["killed", "runs", "noticed s", "new epoch s", "serving s", "next token s", "epoch", "orphans"]
    rows = []
    for case in CASES:
        runs = [r for r in done if r.case == case]
        if runs:
            steps: list[Callable[[Recovery], float | None]] = [
                lambda r: r.noticed_s,
                lambda r: r.agreed_s,
                lambda r: r.serving_s,
                lambda r: r.token_s,
            ]
            rows.append(
                [
                    case,
                    str(len(runs)),
                    *(_spread([step(r) for r in runs]) for step in steps),
                    "higher" if all(r.epoch_after > r.epoch_before for r in runs) else "NOT HIGHER",
                    str(sum(r.orphans for r in runs)),
                ]
            )
    return tables.markdown(header, rows)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) < 5:
        return f"{statistics.median(known):.2f} (worst {max(known):.2f})"
    return f"{percentile(known, 0.5):.2f} / {percentile(known, 0.95):.2f} / {percentile(known, 0.99):.2f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", metavar="demo|mid|PATH")
    parser.add_argument("--link", default="lan", metavar="NAME|SPEC")
    parser.add_argument("--machines", type=int, default=3, metavar="N", help="the host among them; at least 3")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all of them")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--within", type=float, default=120.0, metavar="S", help="give up on a step after this long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and state directories here")
    options = parser.parse_args(arguments)
    if options.machines < 3:
        parser.error("--machines: after a kill two must be left to divide the model")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    available, why = lab_available()
    done: list[Recovery] = []
    try:
        if not available:
            raise BenchError(f"no lab here: {why}")
        model = find_model(options.model, find_programs().vocabularies)
        names = machine_names(options.machines - 1)
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshbench-")))
            lab = stack.enter_context(Lab(names, options.link, cores=1))
            nodes = stack.enter_context(mesh_of(lab, directory, names, model=model))
            for case in options.case or CASES:
                for _ in range(options.runs):
                    done.append(strike(nodes, case, options.within))
                    print(f"{case}: next token after {done[-1].token_s:.2f} s", file=sys.stderr, flush=True)
    except (BenchError, MeshNodeError, LabError, MeshError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    print(recovery_table(done))
    if options.json:
        report: dict[str, Any] = {
            "model": options.model,
            "link": options.link,
            "machines": options.machines,
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "runs": [asdict(r) for r in done],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    whole = len(done) == options.runs * len(options.case or CASES)
    sound = all(r.epoch_after > r.epoch_before and not r.orphans for r in done)
    return 0 if whole and sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
