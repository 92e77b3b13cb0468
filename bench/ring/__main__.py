"""The engine's ring against the network's limit: every bar of it measured in one run, upstream beside it.

    bin/bench ring --json ring.json

Everything is measured in the lab over plain TCP: what the engine and its patches do, without the mesh's tunnels.
``upstream`` is the engine without patches, started as its documentation says; ``ring`` is ours, started with the mesh's
own commands, workers pushing to one another. The default models have random weights, since the demo model's activations
compress. Wire is IP bytes. ``limit`` is the sum of the one-way delays host -> worker -> ... -> host. Needs root (see
bench/lab). Exit code 1: texts differ, or something was not pushed; bars that are not met are said, and are no error.

Parts (all of them unless chosen): ``token`` generation, ``load`` starting, ``turns`` blocking round trips, ``prompt``
prompts of about 600 and 4,000 tokens and what tokens cost behind them, ``alternate`` two conversations on one slot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.lab import LabError, lab_available, parse_link
from bench.measure import BenchError
from bench.models import find_model
from bench.ring import report, verdicts
from bench.ring.sessions import PARTS, Plan, measure
from bench.servers import Programs, Task
from bench.upstream import find_upstream, programs_in
from mesh.engine.cache import find_engine
from mesh.engine.pin import engine_pin
from mesh.errors import MeshError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench ring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["noise-mid", "noise-demo"], metavar="noise-mid|mid|demo|PATH")
    add("--part", nargs="+", choices=PARTS, default=PARTS)
    add("--quick", action="store_true", help="does it work: the small model, 2 workers, one run, short answers")
    add("--link", default="20ms,30MB/s", metavar="NAME|SPEC")
    add("--workers", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    add("--config", nargs="+", choices=("ring", "upstream"), default=["ring", "upstream"])
    add("--runs", type=int, default=5, metavar="N", help="fewer of upstream, and of what takes long")
    add("--tokens", type=int, default=48, metavar="N", help="of an answer whose speed counts")
    add("--ctx-size", type=int, default=8192, metavar="N")
    add("--threads", type=int, default=1, metavar="N", help="per machine; with more than one, as many cores each")
    add("--ubatch", type=int, default=0, metavar="N", help="the ring's micro-batch, instead of the mesh's choice")
    add("--bin", type=Path, metavar="DIR", help="another patched engine")
    add("--upstream-bin", type=Path, metavar="DIR", help="an engine without patches; default: built once")
    add("--json", type=Path, metavar="FILE")
    add("--keep", type=Path, metavar="DIR", help="keep logs here")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(model=["noise-demo"], workers=[2], runs=1, tokens=16)
    options = parser.parse_args(arguments)
    if min(options.workers) < 1 or options.runs < 1 or options.tokens <= 8:
        parser.error("at least one worker, one run and nine tokens")
    return options


def _programs(options: argparse.Namespace) -> tuple[Programs, Programs]:
    engine = find_engine()
    if engine is None:
        raise BenchError("no engine is built for these patches: bin/mesh engine build")
    vocabularies = engine.dir / "vocab"
    ours = Programs(engine.llama_server, engine.rpc_server, vocabularies)
    if options.bin is not None:
        ours = programs_in(options.bin, vocabularies)
    if "upstream" not in options.config:
        return ours, ours
    named = options.upstream_bin
    return ours, find_upstream(vocabularies) if named is None else programs_in(named, vocabularies)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    available, why = lab_available()
    try:
        if not available:
            raise BenchError(f"no lab here: {why}")
        plan = Plan(
            parse_link(options.link), options.workers, options.config, options.part, options.runs, options.tokens
        )
        ours, theirs = _programs(options)
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshring-")))
            directory.mkdir(parents=True, exist_ok=True)
            for name in options.model:
                model = find_model(name, ours.vocabularies)
                task = Task(ours, theirs, model, options.threads, options.ctx_size, directory, options.ubatch)
                measure(plan, task, Path(name).stem)
    except (BenchError, LabError, MeshError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reached = verdicts.all_of(plan.models, plan.done)
    print(report.tables(plan.models, plan.done))
    print(report.bars(reached))
    differing = verdicts.differing_texts(plan.done)
    if options.json:
        written = {
            "engine": engine_pin() if options.bin is None else str(options.bin),
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "options": {key: value for key, value in vars(options).items() if isinstance(value, int | str | list)},
            "models": [asdict(model) for model in plan.models],
            "runs": [asdict(run) for run in plan.done],
            "bars": [asdict(verdict) for verdict in reached],
            "differing_texts": differing,
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if differing or any(run.push_faults for run in plan.done) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
