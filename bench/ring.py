"""The engine's ring against the network's limit: upstream and patched beside each other, same links, same model.

    bin/bench ring --json ring.json

Everything is measured in the lab over plain TCP: what the engine and its patches do, without the mesh's tunnels.
``upstream`` is the engine without patches, started as its documentation says; ``ring`` is ours, started as the mesh
starts it. The default model has random weights, since the demo model's activations compress. Wire is IP bytes; per
token means the difference between a long and a short answer to the same prompt. ``limit`` is the sum of the one-way
delays host -> worker -> ... -> host. Blocking round trips are counted in a run of their own, by a relay before each
worker; ``turns`` are those of the busiest from the first connection to the first answer's first token. Medians.
Needs root (see bench/lab).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench import settings, tables
from bench.lab import Lab, LabError, Link, lab_available, parse_link
from bench.measure import GENERATION_PROMPT, Answer, BenchError, Figures, complete, long_prompt
from bench.models import find_model
from bench.settings import Programs, Setting, Task, turns_file
from bench.upstream import find_upstream, programs_in
from mesh.engine.cache import find_engine
from mesh.engine.pin import engine_pin
from mesh.errors import MeshError
from mesh.models.gguf import inspect

Wire = dict[str, tuple[int, int]]
"""Per worker: IP bytes to it, and from it."""
SHORT, NEAR = 4, 20
"""Tokens of a short answer, and of a longer one to the long prompt."""


@dataclass(slots=True)
class Run:
    """What one configuration did over one link."""

    name: str
    workers: int
    load_s: float = 0.0
    load_bytes: int = 0
    """Of the busiest worker, both ways."""
    turns_to_first_token: int = 0
    turns_per_token: float = 0.0
    turns_per_new_shape: float = 0.0
    """Of a prompt whose length did not occur before, generating one token."""
    ms_per_token: float = 0.0
    over_solo_ms: float = 0.0
    limit_ms: float = 0.0
    up_per_token: int = 0
    """Bytes to the busiest worker per generated token, at a short context."""
    down_per_token: int = 0
    up_per_token_far: int = 0
    """The same behind the long prompt."""
    prompt_tokens: int = 0
    prompt_s: float = 0.0
    prompt_up: int = 0
    activations: int = 0
    """Bytes of the long prompt's activations: what a worker must be sent."""
    text_sha256: str = ""
    late_packets: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)


def observe(setting: Setting, run: Run, options: argparse.Namespace) -> None:
    """Ask a started configuration, and fill in ``run``."""
    with setting.lab.client(setting.client_node) as client:

        def once(prompt: str, tokens: int) -> tuple[Answer, Wire]:
            setting.lab.reset_counters()
            answer = complete(client, setting.base_url, None, prompt, tokens)
            run.late_packets = max(run.late_packets, _late(setting.lab))
            return answer, _wire(setting)

        once(GENERATION_PROMPT, SHORT)
        texts = set()
        per_token: list[tuple[float, float]] = []
        for _ in range(options.runs):
            _, before = once(GENERATION_PROMPT, SHORT)
            answer, after = once(GENERATION_PROMPT, options.tokens)
            texts.add(answer.text)
            run.rows.append({"ms_per_token": 1e3 * answer.generation_s / max(1, answer.timed_tokens)})
            per_token.append(_per_token(before, after, options.tokens - SHORT))
        run.ms_per_token = statistics.median(row["ms_per_token"] for row in run.rows)
        run.up_per_token, run.down_per_token = (int(statistics.median(way)) for way in zip(*per_token, strict=True))
        if options.prompt_words:
            prompt = long_prompt(options.prompt_words, 1)
            answer, before = once(prompt, SHORT)
            run.prompt_tokens, run.prompt_s = answer.prompt_tokens, answer.first_s
            run.prompt_up = max((up for up, _ in before.values()), default=0)
            answer, after = once(prompt, NEAR)
            texts.add(answer.text)
            run.prompt_s = min(run.prompt_s, answer.first_s)
            run.up_per_token_far = int(_per_token(before, after, NEAR - SHORT)[0])
    run.text_sha256 = hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()


def _late(lab: Lab) -> float:
    timing = lab.timing()
    return timing.late / max(1, timing.delivered)


def _wire(setting: Setting) -> Wire:
    counters = setting.lab.counters()
    sent = {worker: sum(c.bytes for (_, to), c in counters.items() if to == worker) for worker in setting.workers}
    received = {worker: sum(c.bytes for (by, _), c in counters.items() if by == worker) for worker in setting.workers}
    return {worker: (sent[worker], received[worker]) for worker in setting.workers}


def _per_token(before: Wire, after: Wire, tokens: int) -> tuple[float, float]:
    ways = [((after[w][0] - before[w][0]) / tokens, (after[w][1] - before[w][1]) / tokens) for w in after]
    return max((up for up, _ in ways), default=0.0), max((down for _, down in ways), default=0.0)


def count_turns(setting: Setting, task: Task, run: Run) -> None:
    """Ask a configuration that was started with relays, and fill in its round trips."""

    def turns() -> dict[str, int]:
        return {worker: int(turns_file(task, worker).read_bytes() or 0) for worker in setting.workers}

    def most(later: dict[str, int], earlier: dict[str, int]) -> int:
        return max(later[worker] - earlier[worker] for worker in later)

    with setting.lab.client(setting.client_node) as client:
        complete(client, setting.base_url, None, GENERATION_PROMPT, 1)
        run.turns_to_first_token = max(turns().values())
        complete(client, setting.base_url, None, GENERATION_PROMPT, SHORT)
        first = turns()
        complete(client, setting.base_url, None, GENERATION_PROMPT, SHORT)
        second = turns()
        complete(client, setting.base_url, None, GENERATION_PROMPT, SHORT + 16)
        run.turns_per_token = (most(turns(), second) - most(second, first)) / 16
        before = turns()
        for words in (7, 31, 33):
            complete(client, setting.base_url, None, long_prompt(words, words), 1)
        run.turns_per_new_shape = most(turns(), before) / 3


@contextlib.contextmanager
def _started(
    name: str, machines: Sequence[str], link: Link, task: Task, workers: int, identity: str
) -> Iterator[tuple[Setting, Figures]]:
    with Lab(machines, link, cores=task.threads) as lab:
        context = {
            "solo": lambda: settings.solo(lab, task),
            "upstream": lambda: settings.upstream(lab, task, workers),
            "ring": lambda: settings.ring(lab, task, workers, identity),
        }[name]()
        with context as both:
            yield both


def measure(task: Task, options: argparse.Namespace) -> list[Run]:
    """All wanted configurations, one after the other."""
    link = parse_link(options.link)
    identity = hashlib.sha256(str(task.model).encode()).hexdigest()
    width = inspect(task.model).n_embd
    done: list[Run] = []
    for count in [0, *options.workers]:
        for name in ("solo",) if not count else options.config:
            run = Run(name, count, limit_ms=1e3 * link.delay_s * (count + 1) if count else 0.0)
            began = time.monotonic()
            machines = settings.machine_names(count)
            with _started(name, machines, link, task, count, identity) as (setting, figures):
                run.load_s = figures.load_s
                run.load_bytes = max(figures.load_bytes.values(), default=0)
                observe(setting, run, options)
            if count:
                counted = replace(task, count_turns=True)
                with _started(name, machines, parse_link("lan"), counted, count, identity) as (setting, _):
                    count_turns(setting, counted, run)
            run.activations = run.prompt_tokens * width * 4
            run.over_solo_ms = run.ms_per_token - (done[0].ms_per_token if done else run.ms_per_token)
            done.append(run)
            took = time.monotonic() - began
            print(f"{name} {count}: {run.ms_per_token:.1f} ms/token ({took:.0f} s)", file=sys.stderr, flush=True)
    return done


def table(done: Sequence[Run]) -> str:
    """Markdown, one row per configuration."""
    header = ["workers", "", "load s", "wire at load", "turns", "turns/token", "new shape", "ms/token", "over solo"]
    header += ["limit", "up/token", "down/token", "up/token far", "prompt s", "prompt up", "of activations", "late"]
    rows = []
    for run in done:
        row = [str(run.workers), run.name, f"{run.load_s:.2f}", tables.size(run.load_bytes)]
        row += [str(run.turns_to_first_token), f"{run.turns_per_token:.1f}", f"{run.turns_per_new_shape:.1f}"]
        row += [f"{run.ms_per_token:.1f}", f"{run.over_solo_ms:.1f}", f"{run.limit_ms:.0f}"]
        row += [tables.size(run.up_per_token), tables.size(run.down_per_token), tables.size(run.up_per_token_far)]
        row += [f"{run.prompt_s:.2f}", tables.size(run.prompt_up)]
        row += [f"{run.prompt_up / max(1, run.activations):.2f}", f"{run.late_packets:.1%}"]
        rows.append(row)
    return tables.markdown(header, rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench ring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="noise-mid", metavar="noise-mid|mid|demo|PATH")
    parser.add_argument("--link", default="20ms,30MB/s", metavar="NAME|SPEC")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--config", nargs="+", choices=("upstream", "ring"), default=["upstream", "ring"])
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=48, metavar="N")
    parser.add_argument("--prompt-words", type=int, default=3000, metavar="N", help="of the long prompt; 0 for none")
    parser.add_argument("--ctx-size", type=int, default=8192, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="and cores, per machine")
    parser.add_argument("--bin", type=Path, metavar="DIR", help="another patched engine")
    parser.add_argument(
        "--upstream-bin", type=Path, metavar="DIR", help="an engine without patches; default: built once"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs here")
    return parser.parse_args(arguments)


def _programs(options: argparse.Namespace) -> tuple[Programs, Programs]:
    engine = find_engine()
    if engine is None and options.bin is None:
        raise BenchError("no engine is built for these patches: bin/mesh engine build")
    if options.bin is not None:
        ours = programs_in(options.bin, options.bin / "vocab")
    else:
        assert engine is not None
        ours = Programs(engine.llama_server, engine.rpc_server, engine.dir / "vocab")
    if "upstream" not in options.config:
        return ours, ours
    vocabularies = ours.vocabularies
    named = options.upstream_bin
    return ours, find_upstream(vocabularies) if named is None else programs_in(named, vocabularies)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    available, why = lab_available()
    try:
        if not available:
            raise BenchError(f"no lab here: {why}")
        ours, theirs = _programs(options)
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshring-")))
            directory.mkdir(parents=True, exist_ok=True)
            model = find_model(options.model, ours.vocabularies)
            done = measure(Task(ours, theirs, model, options.threads, options.ctx_size, directory), options)
    except (BenchError, LabError, MeshError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(done))
    alike = len({run.text_sha256 for run in done}) == 1
    print("text: identical in every configuration" if alike else "text: DIFFERS between configurations")
    if options.json:
        report = {
            "model": {"name": model.name, "bytes": model.stat().st_size},
            "engine": engine_pin() if options.bin is None else str(options.bin),
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "link": parse_link(options.link).describe(),
            "text_identical": alike,
            "runs": [asdict(run) for run in done],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
