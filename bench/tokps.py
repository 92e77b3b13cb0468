"""How fast: tok/s, time to first token, load time and bytes on the wire; alone, over bare TCP and through the mesh.

    bin/bench tokps --model mid --link lan --link wan40 --workers 1 --workers 2 --json figures.json

Every configuration runs in the lab on the same machines, with the same file, prompt and threads per machine, greedy;
figures are medians. ``solo`` is llama-server on one machine; ``upstream`` puts all layers on RPC servers as upstream's
documentation says; ``bare`` is what the mesh starts, over plain TCP instead of tunnels; ``mesh`` is ``mesh up`` on
every machine. What the mesh costs is better asked of ``bin/bench through``, which takes turns between those two.
Needs root (see bench/lab).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import settings, tables
from bench.lab import Lab, LabError, lab_available, parse_link
from bench.measure import BenchError, Figures, Question, ask
from bench.meshnode import MeshNodeError
from bench.models import find_model
from bench.ring import settings as ring_settings
from bench.servers import Programs, Setting, Task, machine_names
from mesh.engine.cache import find_engine
from mesh.engine.pin import engine_pin
from mesh.errors import MeshError
from mesh.models.gguf import inspect

CONFIGURATIONS = ("solo", "upstream", "bare", "mesh")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench tokps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", metavar="demo|mid|PATH")
    parser.add_argument("--link", action="append", metavar="NAME|SPEC", help="lan (default), wan40, 20ms,30MB/s, ...")
    parser.add_argument("--workers", action="append", type=int, metavar="N", help="besides the host; default: 1 2")
    parser.add_argument("--config", action="append", choices=CONFIGURATIONS, help="default: all of them")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="generated per run")
    parser.add_argument("--prompt-words", type=int, default=400, metavar="N", help="of the long prompt")
    parser.add_argument("--ctx-size", type=int, default=2048, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="and cores, per machine")
    parser.add_argument("--bin", type=Path, metavar="DIR", help="another engine for solo, upstream and bare")
    parser.add_argument("--upstream-bin", type=Path, metavar="DIR", help="another engine for upstream alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and state directories here")
    return parser.parse_args(arguments)


def programs_in(directory: Path) -> Programs:
    return Programs(directory / "llama-server", directory / "ggml-rpc-server", directory / "vocab")


def find_programs() -> Programs:
    """The engine that the mesh itself would run."""
    engine = find_engine()
    if engine is None:
        raise BenchError("no engine is built for these patches: bin/mesh engine build")
    return Programs(engine.llama_server, engine.rpc_server, engine.dir / "vocab")


@contextlib.contextmanager
def _bare(lab: Lab, task: Task, workers: int, counts: Sequence[int] | None) -> Iterator[tuple[Setting, Figures]]:
    """The mesh's own commands and division of layers (an even one for None), without the mesh."""
    counts = counts or settings.even_split(inspect(task.model).n_layers, workers + 1)
    with ring_settings.ring(lab, task, counts) as setting:
        figures = Figures("bare", "", workers, setting.load_s, setting.load_s)
        figures.load_bytes, figures.layers = dict(setting.load_bytes), list(counts)
        yield setting, figures


@contextlib.contextmanager
def _mesh(lab: Lab, task: Task, workers: int) -> Iterator[tuple[Setting, Figures]]:
    with settings.mesh(lab, task, workers) as (setting, figures, _):
        yield setting, figures


@contextlib.contextmanager
def started(name: str, lab: Lab, task: Task, workers: int, counts: Any) -> Iterator[tuple[Setting, Figures]]:
    """The configuration of that name, serving."""
    context = {
        "solo": lambda: settings.solo(lab, task),
        "upstream": lambda: settings.upstream(lab, task, workers),
        "bare": lambda: _bare(lab, task, workers, counts),
        "mesh": lambda: _mesh(lab, task, workers),
    }[name]()
    with context as both:
        yield both


def measure(
    task: Task, question: Question, names: Sequence[str], links: Sequence[str], workers: Sequence[int]
) -> list[Figures]:
    """Run every wanted combination, saying what goes on; one that fails is reported and left out."""
    plan: list[tuple[str, str, int]] = []
    if "solo" in names:
        plan.append(("solo", "none", 0))
    # The mesh before `bare`, which then divides the layers alike.
    order = [name for name in ("upstream", "mesh", "bare") if name in names]
    plan += [(name, link, count) for link in links for count in workers for name in order]
    done: list[Figures] = []
    for name, link, count in plan:
        counts = next((f.layers for f in done if (f.name, f.link, f.workers) == ("mesh", link, count)), None)
        print(f"{name} {link} {count} workers ...", file=sys.stderr, end=" ", flush=True)
        began = time.monotonic()
        try:
            with (
                Lab(machine_names(count), "lan" if link == "none" else link, cores=task.threads) as lab,
                started(name, lab, task, count, counts) as (setting, figures),
            ):
                figures.link = link
                ask(setting, figures, question)
        except (BenchError, MeshNodeError, LabError) as error:
            print(f"failed: {error}", file=sys.stderr)
            continue
        print(f"{figures.ms_per_token:.1f} ms/token ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        done.append(figures)
    return done


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    available, why = lab_available()
    links, workers = options.link or ["lan"], options.workers or [1, 2]
    names = options.config or CONFIGURATIONS
    try:
        for link in links:
            parse_link(link)
        if not available:
            raise BenchError(f"no lab here: {why}")
        programs = find_programs() if options.bin is None else programs_in(options.bin)
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshbench-")))
            directory.mkdir(parents=True, exist_ok=True)
            model = find_model(options.model, programs.vocabularies)
            plain = programs_in(options.upstream_bin) if options.upstream_bin else programs
            task = Task(programs, plain, model, options.threads, options.ctx_size, directory)
            question = Question(options.tokens, options.prompt_words, options.runs)
            done = measure(task, question, names, links, workers)
    except (BenchError, MeshError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tables.speed_table(done))
    alike = len({figures.text_sha256 for figures in done}) <= 1
    print("text: identical in every configuration" if alike else "text: DIFFERS between configurations")
    if options.json:
        report = {
            "model": {"name": model.name, "bytes": model.stat().st_size},
            "engine": engine_pin() if options.bin is None else str(options.bin),
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "threads": options.threads,
            "question": asdict(question),
            "text_identical": alike,
            "figures": [asdict(figures) for figures in done],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    wanted = (1 if "solo" in names else 0) + len(links) * len(workers) * len([n for n in names if n != "solo"])
    return 0 if alike and len(done) == wanted else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
