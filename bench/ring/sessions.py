"""Which configurations are started, in which order, and what each is asked."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from bench.lab import Lab, Link, parse_link
from bench.measure import GENERATION_PROMPT
from bench.ring import questions, settings
from bench.ring.questions import LARGE, SMALL, Asker, Lengths
from bench.ring.records import Model, Run
from bench.servers import Setting, Task, machine_names
from bench.settings import even_split
from mesh.models.gguf import inspect

PARTS = ("token", "load", "turns", "prompt", "alternate")
_QUICK_LINK = "lan"
_ROUNDS = 2
"""How often one comes back to a conversation."""


@dataclass(slots=True)
class Plan:
    """What is wanted, and what came of it.

    Args:
        runs: of what is quick; half as many of upstream and of short prompts, a third of what takes longest.
        tokens: of an answer whose speed counts.
    """

    link: Link
    workers: Sequence[int]
    configurations: Sequence[str]
    parts: Sequence[str]
    runs: int
    tokens: int
    models: list[Model] = field(default_factory=list)
    done: list[Run] = field(default_factory=list)

    @property
    def fewer(self) -> int:
        return (self.runs + 1) // 2

    @property
    def fewest(self) -> int:
        return (self.runs + 2) // 3

    @property
    def middle(self) -> int:
        """The number of workers that prompts and conversations are timed with."""
        return 2 if 2 in self.workers else max(self.workers)


def measure(plan: Plan, task: Task, name: str) -> None:
    """Everything about one model, which reports call ``name``."""
    file = inspect(task.model)
    model = Model(name, task.model.stat().st_size, file.n_layers, file.n_embd)
    plan.models.append(model)
    lengths = Lengths()
    if {"token", "load", "prompt", "alternate"} & set(plan.parts):
        for count in plan.workers:
            for configuration in plan.configurations:
                with _told(f"{name} {configuration}, {count} workers"):
                    _session(plan, task, model, lengths, configuration, count)
    if "load" in plan.parts and "ring" in plan.configurations and max(plan.workers) > 1:
        with _told(f"{name} load, {max(plan.workers)} workers against one"):
            _compare_loads(plan, task, model, max(plan.workers))
    if "prompt" in plan.parts and "ring" in plan.configurations:
        with _told(f"{name} prompts on {_QUICK_LINK}"):
            _quick_link(plan, task, model, lengths)
    if "turns" in plan.parts:
        for count in plan.workers:
            for configuration in plan.configurations:
                with _told(f"{name} {configuration}, {count} workers, round trips"):
                    _turns(plan, task, model, configuration, count)


def _session(plan: Plan, task: Task, model: Model, lengths: Lengths, name: str, count: int) -> None:
    run = Run(model.name, name, count, plan.link.describe(), 1e3 * plan.link.delay_s * (count + 1))
    alone = _solo_run(plan, model)
    plan.done.append(run)
    runs = plan.runs if name == "ring" else plan.fewer
    with _lab(plan.link, count, task) as lab, settings.solo(lab, task) as single:
        alone.loads.seconds.append(single.load_s)
        with _started(lab, task, run) as setting, _asking(setting, run) as asker, _asking(single, alone) as solo:
            if "token" in plan.parts:
                run.token = questions.ask_tokens(asker, solo, runs, plan.tokens)
            if "prompt" in plan.parts:
                _prompts(plan, asker, lengths)
            if "alternate" in plan.parts and count == plan.middle:
                run.visits = questions.ask_alternately(asker, lengths, _ROUNDS)
                if name == "ring":
                    questions.ask_alternately(solo, lengths, _ROUNDS)  # to compare what is said
        if "load" in plan.parts:
            if name == "ring":
                model.share_read_s[count] = settings.read_share(lab, task, count)
            for _ in range(1, plan.runs if name == "ring" else 1):
                with _started(lab, task, run):
                    pass


def _prompts(plan: Plan, asker: Asker, lengths: Lengths) -> None:
    """Seconds are for one number of workers; the ring's bytes are for all of them."""
    run = asker.run
    timed, ring = run.workers == plan.middle, run.name == "ring"
    if timed:
        run.prompts.append(questions.ask_prompts(asker, lengths, SMALL, plan.fewer))
    if timed or ring:
        run.prompts.append(questions.ask_prompts(asker, lengths, LARGE, plan.fewest if timed and ring else 1))
        run.contexts = questions.ask_contexts(asker, lengths, plan.fewer if ring else 1)


def _compare_loads(plan: Plan, task: Task, model: Model, count: int) -> None:
    """All workers, in turns with one worker that carries as much as the largest of them."""
    counts = even_split(model.n_layers, count + 1)
    single = [model.n_layers - max(counts[1:]), max(counts[1:])]
    pair = [(Run(model.name, "load together", count, plan.link.describe()), counts)]
    pair.append((Run(model.name, "load one", 1, plan.link.describe()), single))
    plan.done += [run for run, _ in pair]
    with _lab(plan.link, count, task) as lab:
        for _ in range(plan.runs):
            for run, counts in pair:
                with settings.ring(lab, task, counts) as setting:
                    _loaded(run, setting, counts)


def _quick_link(plan: Plan, task: Task, model: Model, lengths: Lengths) -> None:
    link = parse_link(_QUICK_LINK)
    run = Run(model.name, "ring", plan.middle, link.name, 1e3 * link.delay_s * (plan.middle + 1))
    plan.done.append(run)
    alone = _solo_run(plan, model)
    with (
        _lab(link, plan.middle, task) as lab,
        settings.solo(lab, task) as single,
        _started(lab, task, run) as setting,
        _asking(setting, run) as asker,
        _asking(single, alone) as solo,
    ):
        for wanted, runs in ((SMALL, plan.runs), (LARGE, plan.fewest)):
            run.prompts.append(questions.ask_prompts(asker, lengths, wanted, runs, solo=solo))
        # Said by a single process too, so that there is something to compare with.
        questions.ask_contexts(solo, lengths, 1)


def _turns(plan: Plan, task: Task, model: Model, name: str, count: int) -> None:
    # Without a rate: weights that upstream sends do not add to the count, and would take their time.
    link = replace(plan.link, bytes_per_second=None)
    run = Run(model.name, name, count, "relayed")
    plan.done.append(run)
    with (
        _lab(link, count, task) as lab,
        _started(lab, task, run, count_turns=True) as setting,
        _asking(setting, run) as asker,
    ):
        run.turns = questions.count_turns(asker, task.directory)


def _lab(link: Link, count: int, task: Task) -> Lab:
    # One thread never waits for another by spinning, so it may run wherever the system likes: with fewer cores than
    # machines, a fixed core would be shared by two of them while another one idles.
    return Lab(machine_names(count), link, cores=None if task.threads == 1 else task.threads)


@contextlib.contextmanager
def _started(lab: Lab, task: Task, run: Run, *, count_turns: bool = False) -> Iterator[Setting]:
    """The configuration of that run, with its load written down."""
    counts = even_split(inspect(task.model).n_layers, run.workers + 1)
    if run.name == "upstream":
        context = settings.upstream(lab, task, run.workers, count_turns=count_turns)
    else:
        context = settings.ring(lab, task, counts, count_turns=count_turns)
    with context as setting:
        _loaded(run, setting, [] if run.name == "upstream" else counts)
        yield setting


def _loaded(run: Run, setting: Setting, counts: Sequence[int]) -> None:
    run.layers = list(counts)
    run.loads.seconds.append(setting.load_s)
    run.loads.wire.append(max(setting.load_bytes.values()))


@contextlib.contextmanager
def _asking(setting: Setting, run: Run) -> Iterator[Asker]:
    """Asks until the block ends; then a ring is asked how it pushed."""
    with setting.lab.client(setting.client_node) as client:
        asker = Asker(setting, client, run)
        yield asker
        if run.name != "ring":
            return
        asker.ask(GENERATION_PROMPT, 1)
        pushes = settings.find_pushes(setting)
        run.pushes, run.push_faults = list(pushes.made), list(pushes.faults)
        for fault in pushes.faults:
            print(f"\n*** NOT PUSHED, {run.workers} workers: {fault} ***", file=sys.stderr, flush=True)


def _solo_run(plan: Plan, model: Model) -> Run:
    """What the single process said, in whatever session."""
    for run in plan.done:
        if (run.model, run.name) == (model.name, "solo"):
            return run
    run = Run(model.name, "solo", 0, "none")
    plan.done.append(run)
    return run


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    print(f"{what} ...", file=sys.stderr, end=" ", flush=True)
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
