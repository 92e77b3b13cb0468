"""What the mesh costs: the same engine through it and over bare TCP, in turns, within one run.

    bin/bench through --json through.json

``mesh`` is ``mesh up`` on every machine. Both sides are asked in turns, first one, then the other, so that a busy
machine meets both; figures are medians of each pair's ratio. Cases:

- ``solo``: one machine; the proxy beside ``llama-server`` itself, the very process: another one of the same command
  line may be 6% faster or slower, for as long as it lives.
- ``lan``: rings over a gigabit network; ``bare`` is the very same commands, with as many layers on as many machines,
  over plain TCP. Both are up at once, and begun anew ``--rounds`` times.
- ``blocked``: rings over ``wan40`` whose machines cannot reach each other by TCP, so that QUIC carries them; bare TCP
  runs on machines that can.

Ends with 1 when a bar is missed or texts differ. Needs root (see bench/lab), and a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx
import psutil

from bench import settings, tables
from bench.lab import Lab, LabError, lab_available
from bench.measure import GENERATION_PROMPT, Answer, BenchError, complete, long_prompt
from bench.meshnode import MeshNode, MeshNodeError
from bench.models import find_model
from bench.ring import settings as ring_settings
from bench.servers import Setting, Task, machine_names
from bench.tokps import find_programs
from mesh.engine.pin import engine_pin
from mesh.errors import MeshError

CASES = {"solo": "lan", "lan": "lan", "blocked": "wan40"}
"""Each with its link."""
GENERATION = {"solo": 0.98, "lan": 0.98, "blocked": 0.9}
PROMPT = {"lan": 0.95, "blocked": 0.9}
SOLO_FIRST_MS = 3.0
FIRSTS = 5
BARE = ("b", "v1", "v2", "v3")
"""Machines of the bare engine: they have the same cores as the mesh's, but paths of their own."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side did with one pair of questions."""

    ms_per_token: float
    first_ms: float
    prompt_tokens_per_s: float


@dataclass(slots=True)
class Pairs:
    """Both sides of one case, turn by turn.

    Args:
        paths: of the mesh's links, as the nodes show them.
        late: share of packets that the lab delivered over 2 ms late.
    """

    case: str
    workers: int
    layers: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    mesh: list[Turn] = field(default_factory=list)
    bare: list[Turn] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    late: float = 0.0

    @property
    def name(self) -> str:
        return self.case if not self.workers else f"{self.case}, {self.workers} worker{'s' * (self.workers > 1)}"

    def generation(self) -> list[float]:
        """Mesh over bare, in tokens per second, of each pair."""
        return [bare.ms_per_token / mesh.ms_per_token for mesh, bare in self._both()]

    def prompt(self) -> list[float]:
        return [mesh.prompt_tokens_per_s / bare.prompt_tokens_per_s for mesh, bare in self._both()]

    def first_ms(self) -> list[float]:
        """How much later the mesh's first token comes."""
        return [mesh.first_ms - bare.first_ms for mesh, bare in self._both()]

    def _both(self) -> Iterator[tuple[Turn, Turn]]:
        return zip(self.mesh, self.bare, strict=True)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar; ``met`` is None for a figure to see beside the others."""

    case: str
    what: str
    bar: str
    measured: str
    met: bool | None


def verdicts(done: Sequence[Pairs]) -> list[Verdict]:
    """Every bar for which there are figures. Pure."""
    found = []
    for pairs in done:
        for what, ratios, bars in (("generation", pairs.generation(), GENERATION), ("prompt", pairs.prompt(), PROMPT)):
            bar = bars.get(pairs.case)
            met = None if bar is None else statistics.median(ratios) >= bar
            found.append(
                Verdict(pairs.name, f"{what}, mesh / bare", "-" if bar is None else f"{bar} x", _spread(ratios, 3), met)
            )
        later = pairs.first_ms()
        solo = pairs.case == "solo"
        met = statistics.median(later) <= SOLO_FIRST_MS if solo else None
        bar_ms = f"+{SOLO_FIRST_MS:g}" if solo else "-"
        found.append(Verdict(pairs.name, "first token, ms later", bar_ms, _spread(later, 1), met))
        found.append(Verdict(pairs.name, "texts", "the same", f"{len(pairs.texts)}", len(pairs.texts) == 1))
        if pairs.case == "blocked":
            wrong = sorted(set(pairs.paths) - {"quic"})
            found.append(Verdict(pairs.name, "paths", "quic", ", ".join(pairs.paths), not wrong))
    return found


def _spread(values: Sequence[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(case: str, workers: int, task: Task, options: argparse.Namespace) -> Pairs:
    """Start both and ask them in turns, several times."""
    pairs = Pairs(case, workers)
    for number in range(options.rounds):
        directory = task.directory / f"{case}-{workers}-{number}"
        directory.mkdir()
        _round(pairs, replace(task, directory=directory), options, number * options.pairs)
    return pairs


def _round(pairs: Pairs, task: Task, options: argparse.Namespace, first: int) -> None:
    case, workers = pairs.case, pairs.workers
    ours = machine_names(workers)
    # Cores are dealt in turn: with an even number before them, each bare machine has the core of its counterpart.
    spare = ["x"] if len(ours) % 2 else []
    theirs = list(BARE[: len(ours)])
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab([*ours, *spare, *theirs], CASES[case], cores=task.threads))
        for a, b in itertools.combinations(ours, 2) if case == "blocked" else ():
            lab.block(a, b, "tcp")
        mesh, figures, nodes = stack.enter_context(settings.mesh(lab, task, workers, ours))
        pairs.layers = figures.layers
        sides = [(mesh, stack.enter_context(lab.client(mesh.client_node)))]
        if workers:
            order = [theirs[ours.index(name)] for name in (mesh.client_node, *mesh.workers)]
            bare = stack.enter_context(ring_settings.ring(lab, task, pairs.layers, names=order))
            sides.append((bare, stack.enter_context(lab.client(bare.client_node))))
        else:
            port, key = _engine_of(nodes[mesh.client_node])
            headers = {"authorization": f"Bearer {key}"}
            client = stack.enter_context(lab.client(mesh.client_node, headers=headers))
            sides.append((replace(mesh, base_url=f"http://127.0.0.1:{port}"), client))
        for setting, client in sides:
            _turn(setting, client, options, 999, set())
        lab.reset_counters()
        for number in range(first, first + options.pairs):
            both = list(zip(sides, (pairs.mesh, pairs.bare), strict=True))
            for (setting, client), turns in both if number % 2 else reversed(both):
                turns.append(_turn(setting, client, options, number, pairs.texts))
        timing = lab.timing()
        pairs.late = max(pairs.late, timing.late / max(1, timing.delivered))
        pairs.paths = _paths(nodes)


def _engine_of(node: MeshNode) -> tuple[int, str]:
    """Port and key of the ``llama-server`` behind a node's proxy."""
    (pid,) = node.engine_pids("llama-server")
    process = psutil.Process(pid)
    arguments = process.cmdline()
    return int(arguments[arguments.index("--port") + 1]), process.environ()["LLAMA_API_KEY"]


def _turn(setting: Setting, client: httpx.Client, options: argparse.Namespace, salt: int, texts: set[str]) -> Turn:
    answer: Answer = complete(client, setting.base_url, None, GENERATION_PROMPT, options.tokens)
    texts.add(answer.text)
    # Of a prompt that the engine has just computed, so that what differs is the way to it and back.
    first_s = [complete(client, setting.base_url, None, GENERATION_PROMPT, 1).first_s for _ in range(FIRSTS)]
    prompt = complete(client, setting.base_url, None, long_prompt(options.prompt_words, salt), 1)
    return Turn(answer.ms_per_token, 1e3 * statistics.median(first_s), prompt.prompt_tokens / prompt.first_s)


def _paths(nodes: dict[str, MeshNode]) -> list[str]:
    seen = [node.status() for node in nodes.values()]
    return sorted({str(peer["path"]) for status in seen if status for peer in status["peers"]})


def table(done: Sequence[Pairs]) -> str:
    """Medians of both sides."""
    rows = []
    for pairs in done:
        row = [pairs.name, "+".join(map(str, pairs.layers)), ", ".join(pairs.paths) or "-"]
        for what, digits in (("ms_per_token", 1), ("first_ms", 1), ("prompt_tokens_per_s", 0)):
            for turns in (pairs.mesh, pairs.bare):
                row.append(f"{statistics.median(getattr(turn, what) for turn in turns):.{digits}f}")
        rows.append([*row, f"{pairs.late:.1%}"])
    header = ["case", "layers", "path", "ms/token", "bare", "first token ms", "bare", "prompt tok/s", "bare", "late"]
    return tables.markdown(header, rows)


def verdict_table(found: Sequence[Verdict]) -> str:
    words = {True: "yes", False: "NO", None: "-"}
    rows = [[v.case, v.what, v.bar, v.measured, words[v.met]] for v in found]
    return tables.markdown(["case", "what", "bar", "measured", "met"], rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench through", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", nargs="+", choices=list(CASES), default=list(CASES))
    add("--model", default="mid", metavar="demo|mid|noise-mid|noise-large|PATH")
    add("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    add("--rounds", type=int, default=3, metavar="N", help="each with engines of its own")
    add("--pairs", type=int, default=5, metavar="N", help="of questions to both sides, in each round")
    add("--tokens", type=int, default=64, metavar="N", help="generated per turn")
    add("--prompt-words", type=int, default=400, metavar="N")
    add("--ctx-size", type=int, default=2048, metavar="N")
    add("--threads", type=int, default=1, metavar="N", help="and cores, per machine")
    add("--json", type=Path, metavar="FILE")
    add("--keep", type=Path, metavar="DIR", help="keep logs and state directories here")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.rounds < 1 or not all(1 <= count < len(BARE) for count in options.workers):
        parser.error(f"at least one round and pair, and 1 to {len(BARE) - 1} workers")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    available, why = lab_available()
    wanted = [(case, count) for case in options.case for count in ([0] if case == "solo" else options.workers)]
    done: list[Pairs] = []
    try:
        if not available:
            raise BenchError(f"no lab here: {why}")
        programs = find_programs()
        model = find_model(options.model, programs.vocabularies)
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshbench-")))
            directory.mkdir(parents=True, exist_ok=True)
            task = Task(programs, programs, model, options.threads, options.ctx_size, directory)
            for case, count in wanted:
                done.append(compare(case, count, task, options))
                print(f"{done[-1].name}: {statistics.median(done[-1].generation()):.3f} x", file=sys.stderr, flush=True)
    except (BenchError, MeshNodeError, LabError, MeshError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    found = verdicts(done)
    print(table(done), verdict_table(found), sep="\n\n")
    if options.json and done:
        report = {
            "model": {"name": model.name, "bytes": model.stat().st_size},
            "engine": engine_pin(),
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "pairs": [{**asdict(pairs), "texts": sorted(pairs.texts)} for pairs in done],
            "verdicts": [asdict(verdict) for verdict in found],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if len(done) == len(wanted) and all(verdict.met is not False for verdict in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
