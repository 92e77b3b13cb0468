"""Twenty minutes of bad weather over four nodes that are asked all the time: no leak, nothing stuck, nothing lost.

    bin/bench soak --minutes 20 --seed 1 --json soak.json

Real nodes in the lab, one of them behind a NAT, share the demo model. Paths are cut for 0.2 to 8 s, in one direction or
both, lose TCP or UDP, turn slow or lossy; the NAT is switched off and on or gets another address, and so does a
machine. All of it is decided by the seed; what the mesh makes of it is not. At every node somebody asks, streamed and
not, and goes away half-way now and then. Each answer is compared with what llama-server says alone.

Ends with 1 when a bar is missed. Needs root (see bench/lab).
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import settings
from bench.lab import Lab, LabError, lab_available
from bench.measure import BenchError
from bench.meshnode import MeshNode, MeshNodeError, stop_all
from bench.models import find_model
from bench.servers import Task
from bench.soak import census, flaps
from bench.soak.asking import Asker, Fate, Outcome, Request, ask, every_request, read_whole
from bench.soak.verdicts import Soak, growth, verdicts, why_table
from bench.soak.watching import Watch, look, read_census
from bench.tokps import find_programs
from bench.verdicts import verdict_table
from mesh.errors import MeshError

MACHINES = ("a", "b", "c", "d")
HOMED, MOVER = "d", "c"
"""Behind a NAT of its own, and on the open internet, but not for long in one place."""
REST_S = 2 * census.EVERY_S + 5
PROBE = Request("Hello", 8)


class Mesh:
    """The nodes, and what they should say."""

    def __init__(self, lab: Lab, directory: Path, model: Path) -> None:
        self.lab = lab
        self.censuses = {name: directory / f"census-{name}.json" for name in MACHINES}
        self.nodes: dict[str, MeshNode] = {}
        for name in MACHINES:
            self.nodes[name] = MeshNode(
                lab,
                name,
                directory,
                model=model,
                arguments=("--split", "always", "--no-discovery"),
                bind_host="0.0.0.0" if name == MOVER else None,
                program=("-m", "bench.soak.census", str(self.censuses[name])),
            )

    def start(self, within: float) -> None:
        """All of them, in one ring."""
        first, *others = self.nodes.values()
        first.start()
        first.wait(lambda status: True, within, "an API")
        token = first.invite(uses=len(others))
        for node in others:
            node.start(join=token)
        for node in self.nodes.values():
            node.wait_serving(within, members=len(MACHINES))

    def epoch(self) -> int:
        """The highest that any node knows of."""
        seen = [node.status() for node in self.nodes.values()]
        return max((status["mesh"]["epoch"] for status in seen if status is not None), default=0)

    def answer(self, name: str, answers: Mapping[str, str]) -> Outcome:
        """One probe."""
        with self.lab.client(name) as client:
            return ask(client, name, self.nodes[name].base_url, PROBE, answers[PROBE.key], time.monotonic())

    def rest(self, run_began: float, into: Soak) -> None:
        """Look at every node while nobody asks, garbage collected."""
        marks = [path.with_suffix(census.COLLECT) for path in self.censuses.values()]
        for mark in marks:
            mark.touch()
        time.sleep(REST_S)
        for name, node in self.nodes.items():
            counted = read_census(self.censuses[name])
            sample = look(node, counted, run_began)
            if sample is not None:
                into.idle.setdefault(name, []).append((sample, counted))
        for mark in marks:
            mark.unlink()


def learn(lab: Lab, task: Task) -> dict[str, str]:
    """What llama-server, alone, says to every request."""
    answers: dict[str, str] = {}
    with settings.solo(lab, task) as (setting, _), lab.client(setting.client_node) as client:
        for request in every_request():
            response = client.post(setting.base_url + request.path, json=request.body(), timeout=120)
            choice = (response.json().get("choices") or [{}])[0]
            text = choice["message"]["content"] if request.chat else choice.get("text")
            if not text:
                raise BenchError(f"llama-server does not answer {request}: {response.text[:300]}")
            read_whole(response.status_code, response.content, text)
            answers[request.key] = text
    return answers


@contextlib.contextmanager
def asked(mesh: Mesh, answers: Mapping[str, str], seed: int, run_began: float, soak: Soak) -> Iterator[list[Asker]]:
    """Somebody asks at every node; at the end of the block what is under way is waited for."""
    with contextlib.ExitStack() as stack:
        askers = []
        for name, node in mesh.nodes.items():
            client = stack.enter_context(mesh.lab.client(name))
            askers.append(Asker(client, name, node.base_url, answers, f"{seed}/{name}", run_began))
        for asker in askers:
            asker.start()
        try:
            yield askers
        finally:
            for asker in askers:
                asker.stop()
            for asker in askers:
                asker.join()
                soak.outcomes += asker.outcomes


def recover(mesh: Mesh, answers: Mapping[str, str], within: float, soak: Soak) -> None:
    """See how long it takes until every node answers, and until the ring is whole."""
    began = time.monotonic()

    def until_answered(name: str) -> float | None:
        while time.monotonic() - began < within:
            outcome = mesh.answer(name, answers)
            if outcome.fate is Fate.ANSWERED:
                return time.monotonic() - began
            soak.outcomes.append(outcome)
            time.sleep(0.2)
        return None

    with ThreadPoolExecutor(len(MACHINES)) as pool:
        soak.again_s = dict(zip(MACHINES, pool.map(until_answered, MACHINES), strict=True))
    with contextlib.suppress(MeshNodeError):
        for node in mesh.nodes.values():
            node.wait_serving(max(0.1, within - (time.monotonic() - began)), members=len(MACHINES))
        soak.whole_s = time.monotonic() - began


def run(lab: Lab, task: Task, options: argparse.Namespace, told: list[flaps.Flap]) -> Soak:
    """The whole of it."""
    seconds = 60 * options.minutes
    soak = Soak(seconds)
    answers = learn(lab, task)
    mesh = Mesh(lab, task.directory, task.model)
    began = time.monotonic()

    def say(flap: flaps.Flap) -> None:
        done, lost = 0, 0
        for asker in askers:
            done += len(asker.outcomes)
            lost += sum(outcome.fate is Fate.LOST for outcome in asker.outcomes)
        where = f"{flap.a}-{flap.b}" if flap.b else flap.a
        told_so = f"{flap.at_s:7.1f} s  {flap.kind} {where} {flap.for_s:g} s; {done} requests, {lost} lost"
        print(told_so, file=sys.stderr, flush=True)

    try:
        mesh.start(options.within)
        for name in MACHINES:
            first = mesh.answer(name, answers)
            if first.fate is not Fate.ANSWERED:
                raise BenchError(f"{name} does not even answer in good weather: {first.why}")
        mesh.rest(began, soak)
        epoch = mesh.epoch()
        began = time.monotonic()
        watch = Watch(mesh.nodes, mesh.censuses, began)
        with asked(mesh, answers, options.seed, began, soak) as askers:
            watch.start()
            flaps.play(lab, told, options.link, say)
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            watch.stop()
        recover(mesh, answers, options.settle, soak)
        soak.samples, soak.epochs = watch.samples, mesh.epoch() - epoch
        mesh.rest(began, soak)
    finally:
        soak.problems += [f"{name} has ended" for name, node in mesh.nodes.items() if not node.running]
        stop_all(list(mesh.nodes.values()))
    return soak


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, metavar="N", help="of flaps")
    add("--seed", type=int, default=1, metavar="N", help="of what flaps when, and of what is asked")
    add("--every", type=float, default=6.0, metavar="S", help="from one flap to the next, on average")
    add("--link", default="lan", metavar="NAME|SPEC", help="between any two machines in good weather")
    add("--nat", default="port-restricted", metavar="KIND", help=f"in front of {HOMED}")
    add("--model", default="demo", metavar="demo|mid|PATH")
    add("--settle", type=float, default=330.0, metavar="S", help="for the ring to be whole again at the end")
    add("--within", type=float, default=90.0, metavar="S", help="give up on the start after this long")
    add("--json", type=Path, metavar="FILE")
    add("--keep", type=Path, metavar="DIR", help="keep logs and state directories here")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.every <= 0:
        parser.error("some minutes, and some time between flaps")
    return options


def report(soak: Soak, told: Sequence[flaps.Flap], options: argparse.Namespace) -> dict[str, Any]:
    """Everything, for a file."""
    unlike = [o for o in soak.outcomes if o.fate in (Fate.LOST, Fate.REFUSED)]
    return {
        "minutes": options.minutes,
        "seed": options.seed,
        "link": options.link,
        "nat": options.nat,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
        "verdicts": [asdict(verdict) for verdict in verdicts(soak)],
        "flaps": [asdict(flap) for flap in told],
        "not_answered": [{**asdict(o), "fate": o.fate.value} for o in unlike],
        "answer_s": sorted(round(o.took_s, 3) for o in soak.outcomes if o.fate is Fate.ANSWERED),
        "samples": {name: [asdict(sample) for sample in samples] for name, samples in soak.samples.items()},
        "idle": {name: [[asdict(sample), counts] for sample, counts in seen] for name, seen in soak.idle.items()},
        "grown": {name: growth(seen[0][1], seen[-1][1]) for name, seen in soak.idle.items()},
    }


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    available, why = lab_available()
    try:
        if not available:
            raise BenchError(f"no lab here: {why}")
        programs = find_programs()
        model = find_model(options.model, programs.vocabularies)
        told = flaps.forecast(
            options.seed, 60 * options.minutes, MACHINES, homes=[HOMED], movers=[MOVER], every_s=options.every
        )
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshsoak-")))
            directory.mkdir(parents=True, exist_ok=True)
            lab = stack.enter_context(Lab(MACHINES, options.link, nat={HOMED: options.nat}, cores=1, seed=options.seed))
            soak = run(lab, Task(programs, programs, model, 1, 4096, directory), options, told)
    except (BenchError, MeshNodeError, LabError, MeshError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = verdicts(soak)
    print(f"{len(told)} flaps in {options.minutes:g} min, seed {options.seed}\n")
    print(why_table(soak.outcomes), end="\n\n")
    print(verdict_table(found))
    if options.json:
        options.json.write_text(json.dumps(report(soak, told, options), indent=1) + "\n")
    return 0 if all(verdict.met is not False for verdict in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
