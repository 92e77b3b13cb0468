"""How long until tokens flow again after a fault, in a mesh of five machines.

    bin/bench recovery                                        (every case three times, demo model, lan)
    bin/bench recovery --model mid --link wan20 --case worker --case host --runs 20 --json out.json

SIGKILL of a worker's node, of the host's, of llama-server, of rpc-server; a planned leave of either; a machine that
sleeps for 1, 3 and 10 s (SIGSTOP of all that runs there); one cut off, one that nobody hears any more, and one that is
cut from the host alone, both ways or one; and a worker that dies while another reads its weights from a slow disk.

A node that was not hit sends a streamed request right after the fault, and the first token ends the clock: what a
person at that machine would see. All else is read from what the nodes say (--json-logs), so nothing is asked of them
meanwhile. Steps show p50 / p95 / p99, or the median and the worst of fewer than five runs. Exit 1: a bar was missed.
Needs root (see bench/lab); the slow disk needs the kernel's blkio (or io) controller.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import tables
from bench.lab import Lab, LabError, lab_available
from bench.measure import BenchError
from bench.meshnode import MeshNode, MeshNodeError, stop_all
from bench.models import find_model
from bench.recovery.cases import CASES
from bench.recovery.disk import SlowDiskError
from bench.recovery.figures import Recovery
from bench.recovery.strike import Stage, renew, strike
from bench.recovery.verdicts import recovery_table, verdicts
from bench.servers import machine_names
from bench.tokps import find_programs
from mesh.config import parse_size
from mesh.errors import MeshError

STRIKES = 2
"""Of one run of the nodes. A third within two minutes is held against a machine, and it is left out for a while."""
ARGUMENTS = ("--split", "always", "--no-discovery", "--json-logs")


@contextlib.contextmanager
def stage_of(options: argparse.Namespace, directory: Path, model: Path) -> Iterator[Stage]:
    """The mesh, all of it serving; the last machine has the model in a file of its own."""
    names = machine_names(options.machines - 1)
    own = directory / "own.gguf"
    shutil.copyfile(model, own)
    with Lab(names, options.link, cores=1) as lab:
        nodes = {
            name: MeshNode(lab, name, directory, model=own if name == names[-1] else model, arguments=ARGUMENTS)
            for name in names
        }
        first, *others = nodes.values()
        try:
            first.start()
            first.wait(lambda status: True, options.within, "an API")
            token = first.invite(uses=len(others))
            for node in others:
                node.start(join=token)
            yield Stage(lab, nodes, (names[-1], own), options.slow_rate, options.within)
        finally:
            stop_all(list(nodes.values()))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--model", default="demo", metavar="demo|mid|PATH")
    parser.add_argument("--link", default="lan", metavar="NAME|SPEC")
    parser.add_argument("--machines", type=int, default=5, metavar="N", help="the host among them; at least 4")
    parser.add_argument("--case", action="append", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each case")
    parser.add_argument(
        "--slow-rate", type=parse_size, default="20MB", metavar="SIZE", help="per second, of a slow disk"
    )
    parser.add_argument("--within", type=float, default=120.0, metavar="S", help="give up on a step after this long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and state directories here")
    options = parser.parse_args(arguments)
    if options.machines < 4:
        parser.error("--machines: with one dead and one slow, two must be left to tell")
    return options


def measure(options: argparse.Namespace, directory: Path, done: list[Recovery]) -> None:
    """Every case asked for, as often as asked for, into ``done``.

    Raises:
        BenchError, MeshNodeError, LabError, MeshError, SlowDiskError: something did not happen that must.
    """
    available, why = lab_available()
    if not available:
        raise BenchError(f"no lab here: {why}")
    model = find_model(options.model, find_programs().vocabularies)
    with stage_of(options, directory, model) as stage:
        for case in CASES:
            for _ in range(options.runs if case.name in (options.case or [c.name for c in CASES]) else 0):
                if len(done) % STRIKES == 0 and done:
                    renew(stage)
                figures = strike(stage, case)
                done.append(figures)
                print(f"{case.name}: next token after {figures.token_s or 0:.2f} s", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    done: list[Recovery] = []
    whole = False
    try:
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshbench-")))
            directory.mkdir(parents=True, exist_ok=True)
            measure(options, directory, done)
            whole = True
    except (BenchError, MeshNodeError, LabError, MeshError, SlowDiskError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    print(recovery_table(done))
    bars = verdicts(done)
    print()
    print(tables.markdown(["bar", "", "measured", ""], [[v.what, v.bar, v.measured, _word(v.met)] for v in bars]))
    if options.json:
        report: dict[str, Any] = {
            "model": options.model,
            "link": options.link,
            "machines": options.machines,
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "runs": [asdict(r) for r in done],
            "bars": [asdict(v) for v in bars],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if whole and all(v.met for v in bars) else 1


def _word(met: bool | None) -> str:
    return "-" if met is None else "ok" if met else "MISSED"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
