"""A thousand requests while machines are killed, join and leave: none fails, none is cut short, none is changed.

    bin/bench endure --json endure.json

Four real nodes in the lab share the demo model. Eight clients ask at every node's localhost, streamed and not, at five
endpoints, for answers of 16 to 1,200 tokens. Meanwhile, decided by a seed:

- ``kills``: every 10 to 20 s a worker or the host is killed (SIGKILL), all of it or only its engine, and comes back.
- ``joins``: a machine that was never there joins with a token, and later leaves for good.
- ``leaves``: a member, the host as well as others, is told to go (``mesh down``, ``mesh leave``) and comes back.

Every answer is compared with what llama-server says alone: text, finish reason, usage, one id, the order of events. A
client whose own node was killed asks again, there or elsewhere, as an SDK would. Last, eight streams at once through
the mesh and of llama-server itself, in turns. Ends with 1 when a bar is missed. Needs root (see bench/lab).
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
from typing import Any

from bench.endure import questions, throughput
from bench.endure.asking import DRAIN_S, Clients, Outcome
from bench.endure.forms import Refused, Wrong
from bench.endure.questions import Reference, Request
from bench.endure.throughput import Aggregate
from bench.endure.verdicts import Endured, fault_table, hit, kind_table, verdicts
from bench.endure.weather import MACHINES, WEATHERS, Happened, Mesh, Patience, blow
from bench.lab import Lab, LabError, lab_available
from bench.measure import BenchError
from bench.meshnode import MeshNodeError
from bench.models import find_model
from bench.ring import settings as ring_settings
from bench.servers import Task
from bench.tokps import find_programs
from bench.verdicts import Verdict, verdict_table
from mesh.engine.pin import engine_pin
from mesh.errors import MeshError

REQUESTS = 1000
QUICK_REQUESTS, QUICK_TIMES, QUICK_WHOLE_S = 90, 4, 20.0
EVERY_S, QUICK_EVERY_S = (10.0, 20.0), (3.0, 5.0)
THREADS, CTX_SIZE = 1, 2048


def complain(outcome: Outcome) -> None:
    """Say at once what is wrong with an answer: a run takes long."""
    for fault in outcome.faults:
        what = f"{fault.began_s:7.1f} to {fault.ended_s:.1f} s at {fault.node}, {outcome.request.words}"
        print(f"  {fault.fate.value}: {what}: {fault.why}", file=sys.stderr, flush=True)


def learn(task: Task, asked: Sequence[Request]) -> Reference:
    """What an uninterrupted llama-server says, with as many slots."""
    with (
        Lab(MACHINES[:1], cores=task.threads) as lab,
        ring_settings.solo(lab, task) as server,
        lab.client(server.client_node) as client,
    ):
        return questions.learn(client, server.base_url, asked, task.parallel)


def endure(
    task: Task, weather: str, asked: Sequence[Request], reference: Reference, options: argparse.Namespace
) -> Endured:
    """One weather."""
    blows, members = WEATHERS[weather]
    endured = Endured(weather, len(asked))
    directory = task.directory / weather
    arguments: tuple[str, ...] = ("--split", "always", "--no-discovery", "--parallel", str(task.parallel))
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(MACHINES, options.link, cores=task.threads, seed=options.seed))
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "mesh.toml"
        config.write_text(f"drain_s = {DRAIN_S:g}\n")
        arguments += ("--ctx-size", str(task.ctx_size), "--config", str(config))
        mesh = Mesh(lab, directory, task.model, arguments, options.within)
        try:
            mesh.start(members)
            at = [{name: stack.enter_context(lab.client(name)) for name in MACHINES} for _ in range(options.clients)]
            homes = [MACHINES[number % len(MACHINES)] for number in range(options.clients)]
            places = list(zip(homes, at, strict=True))
            clients = Clients(places, mesh.urls, asked, reference, mesh.roster, options.seed, complain)

            def say(happened: Happened) -> None:
                what = f"{happened.at_s:7.1f} s  {happened.deed}: {happened.machine} ({happened.role})"
                print(f"{what}; {len(clients.outcomes)} requests", file=sys.stderr, flush=True)

            clients.start()
            endured.happened = blow(mesh, blows, options.seed, options.every, clients.wait, say, options.patience)
            endured.outcomes = clients.outcomes
            endured.whole_s = mesh.whole(options.within)
        finally:
            endured.ended = mesh.stop()
    return endured


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench endure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--requests", type=int, metavar="N", help=f"of each weather: {REQUESTS}, or {QUICK_REQUESTS} when quick")
    add("--clients", type=int, default=8, metavar="N", help="that ask at the same time")
    add("--weather", nargs="+", choices=list(WEATHERS), default=list(WEATHERS))
    add("--seed", type=int, default=1, metavar="N", help="of what is asked, and of what happens")
    add("--every", type=float, nargs=2, metavar=("MIN", "MAX"), help="seconds from one happening to the next")
    add("--link", default="lan", metavar="NAME|SPEC", help="between any two machines")
    add("--model", default="demo", metavar="demo|mid|PATH")
    add("--parallel", type=int, default=4, metavar="N", help="slots of the engine")
    add("--quick", action="store_true", help=f"short answers, {QUICK_TIMES} happenings, no throughput")
    add("--no-throughput", action="store_true", help="leave out the eight streams")
    add("--only-throughput", action="store_true", help="nothing else")
    add("--throughput-model", default="mid", metavar="demo|mid|PATH")
    add("--pairs", type=int, default=7, metavar="N", help="of turns, the mesh's and llama-server's")
    add("--tokens", type=int, default=192, metavar="N", help="of each stream in a turn; its start counts, too")
    add(
        "--within",
        type=float,
        default=90.0,
        metavar="S",
        help="give up on a start or a whole ring after this long",
    )
    add("--json", type=Path, metavar="FILE")
    add("--keep", type=Path, metavar="DIR", help="keep logs and state directories here")
    options = parser.parse_args(arguments)
    options.requests = options.requests or (QUICK_REQUESTS if options.quick else REQUESTS)
    if options.requests < 1 or options.clients < 1 or options.pairs < 1:
        parser.error("at least one request, one client and one pair")
    options.lengths = questions.QUICK_LENGTHS if options.quick else questions.LENGTHS
    options.prompts = questions.PROMPTS[: 2 if options.quick else None]
    options.patience = Patience(QUICK_TIMES, QUICK_WHOLE_S) if options.quick else None
    options.no_throughput |= options.quick
    options.every = tuple(options.every or (QUICK_EVERY_S if options.quick else EVERY_S))
    return options


def run(options: argparse.Namespace, endured: list[Endured], aggregates: list[Aggregate]) -> None:
    """All that is asked for; what is done is in the two lists, also when something fails."""
    available, why = lab_available()
    if not available:
        raise BenchError(f"no lab here: {why}")
    programs = find_programs()
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshendure-")))
        directory.mkdir(parents=True, exist_ok=True)
        model = find_model(options.model, programs.vocabularies)
        task = Task(programs, programs, model, THREADS, CTX_SIZE, directory, parallel=options.parallel)
        asked = questions.draw(options.seed, options.requests, options.lengths, options.prompts)
        if not options.only_throughput:
            reference = learn(task, asked)
            for weather in options.weather:
                endured.append(endure(task, weather, asked, reference, options))
                print(kind_table(endured[-1]), fault_table(endured[-1]), "", sep="\n\n", file=sys.stderr, flush=True)
        if not options.no_throughput:
            heavy = find_model(options.throughput_model, programs.vocabularies)
            streams = Task(programs, programs, heavy, THREADS, 512, directory, parallel=throughput.STREAMS)
            for workers in (0, len(MACHINES) - 1):
                aggregates.append(throughput.compare(streams, workers, options.pairs, options.tokens))


def report(
    options: argparse.Namespace,
    endured: Sequence[Endured],
    aggregates: Sequence[Aggregate],
    found: Sequence[tuple[str, Verdict]],
) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "requests": options.requests,
        "clients": options.clients,
        "seed": options.seed,
        "link": options.link,
        "model": options.model,
        "engine": engine_pin(),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "verdicts": [{"weather": weather, **asdict(verdict)} for weather, verdict in found],
        "weathers": [
            {
                "weather": one.weather,
                "happened": [asdict(happened) for happened in one.happened],
                "pauses_s": sorted(round(a_try.pause_s, 3) for _, a_try in hit(one)),
                "requests": [
                    {
                        "asked": outcome.request.words,
                        "tries": [{**asdict(a_try), "fate": a_try.fate.value} for a_try in outcome.tries],
                    }
                    for outcome in one.outcomes
                ],
            }
            for one in endured
        ],
        "throughput": [asdict(aggregate) for aggregate in aggregates],
    }


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    endured: list[Endured] = []
    aggregates: list[Aggregate] = []
    failed = False
    try:
        run(options, endured, aggregates)
    except (BenchError, MeshNodeError, LabError, MeshError, Refused, Wrong, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        failed = True
    found = [(one.weather, verdict) for one in endured for verdict in verdicts(one)]
    found += [("calm", aggregate.verdict()) for aggregate in aggregates]
    for weather in dict.fromkeys(weather for weather, _ in found):
        print(f"{weather}, seed {options.seed}:\n")
        print(verdict_table([verdict for name, verdict in found if name == weather]), end="\n\n")
    if options.json:
        options.json.write_text(json.dumps(report(options, endured, aggregates, found), indent=1) + "\n")
    return 1 if failed or any(verdict.met is False for _, verdict in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
