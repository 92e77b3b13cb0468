"""The bars, and which of them a run has met. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.ring.questions import LARGE, SMALL
from bench.ring.records import Model, Prompt, Run, Visit
from bench.tables import size

ABOVE_LIMIT = 1.05
TOKEN_SLACK = 1000
LOAD_WIRE = 300_000
ROUND_TRIPS = 12
LOAD_READS, LOAD_SLACK_S = 1.25, 0.6
STARTS_VARY_S = 0.05
PROMPT_SHARE, PROMPT_SLACK = 1.1, 200_000
CONTEXT_SLACK = 200
RETURN_TOKENS, RETURN_SLACK = 16, 200_000
"""What "next to nothing" is: tokens computed beside the new ones, and bytes beside their activations."""
OTHER_ENGINE_S = 3.7
"""What prima.cpp takes for the smaller prompt with the mid model at 20 ms one way."""
MID_BYTES = 200_000_000
"""Speed bars of prompts are for models from this size: a smaller one computes nothing worth dividing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar. ``met`` is None where nothing was asked of it: a figure to see beside the others."""

    model: str
    what: str
    bar: str
    upstream: str
    measured: str
    met: bool | None


def all_of(models: Sequence[Model], runs: Sequence[Run]) -> list[Verdict]:
    """Every bar for which there are figures, model by model."""
    found: list[Verdict] = []
    for model in models:
        ours = _Figures(model, [run for run in runs if run.model == model.name])
        for judge in (_tokens, _loads, _round_trips, _prompt_bytes, _prompt_seconds, _returns, _pushes, _texts):
            found += judge(ours)
    return found


def differing_texts(runs: Sequence[Run]) -> list[str]:
    """Which questions were not answered alike, and how many kinds of answers there were, by whom.

    Not by upstream: its prompts go in other parts, which round differently, and random weights decide by a hair.
    """
    found = []
    ours = [run for run in runs if run.name != "upstream"]
    for model, question in sorted({(run.model, key) for run in ours for key in run.texts}):
        answers: dict[str, list[str]] = {}
        for run in ours:
            if run.model == model and question in run.texts:
                answers.setdefault(run.texts[question], []).append(f"{run.name} {run.workers} ({run.link})")
        if len(answers) > 1:
            found.append(f"{model}, {question}: " + " | ".join(", ".join(who) for who in answers.values()))
    return found


def like_upstream(runs: Sequence[Run]) -> tuple[int, int]:
    """How many questions upstream answered as the ring did, and how many both were asked."""
    said = {(run.model, key): text for run in runs if run.name == "ring" for key, text in run.texts.items()}
    theirs = {(run.model, key): text for run in runs if run.name == "upstream" for key, text in run.texts.items()}
    both = said.keys() & theirs.keys()
    return sum(said[question] == theirs[question] for question in both), len(both)


@dataclass(frozen=True, slots=True)
class _Figures:
    model: Model
    runs: list[Run]

    def rings(self) -> Iterator[tuple[Run, Run | None]]:
        """Each ring with upstream's run of the same size over the same link, if there is one."""
        for run in self.runs:
            if run.name == "ring":
                same = [r for r in self.runs if (r.name, r.workers, r.link) == ("upstream", run.workers, run.link)]
                yield run, next(iter(same), None)

    def verdict(self, what: str, bar: str, upstream: str, measured: str, met: bool | None) -> Verdict:
        return Verdict(self.model.name, what, bar, upstream or "-", measured, met)


def _tokens(of: _Figures) -> Iterator[Verdict]:
    pairs = [(ring, theirs) for ring, theirs in of.rings() if ring.token]
    for ring, theirs in pairs:
        assert ring.token
        bar = ABOVE_LIMIT * ring.limit_ms
        ms = ring.token.over_solo_ms
        upstream = _spread(theirs.token.over_solo_ms, 1) if theirs and theirs.token else ""
        what = f"ms/token over solo, {_workers(ring)}"
        yield of.verdict(what, f"{bar:.1f}", upstream, _spread(ms, 1), statistics.median(ms) <= bar)
    for way in ("to", "from"):
        bar = of.model.n_embd * 4 + TOKEN_SLACK
        for ring, theirs in pairs:
            assert ring.token
            count = getattr(ring.token, f"{way}_worker")
            upstream = size(getattr(theirs.token, f"{way}_worker")) if theirs and theirs.token else ""
            what = f"per token {way} a worker, {_workers(ring)}"
            yield of.verdict(what, size(bar), upstream, size(count), count <= bar)


def _loads(of: _Figures) -> Iterator[Verdict]:
    pairs = [(r, u) for r, u in of.rings() if r.workers in of.model.share_read_s and r.loads.seconds and r.limit_ms > 1]
    for ring, theirs in pairs:
        wire = statistics.median(ring.loads.wire)
        upstream = size(statistics.median(theirs.loads.wire)) if theirs else ""
        yield of.verdict(f"load, wire, {_workers(ring)}", size(LOAD_WIRE), upstream, size(wire), wire <= LOAD_WIRE)
    for ring, theirs in pairs:
        bar = LOAD_READS * of.model.share_read_s[ring.workers] + LOAD_SLACK_S
        upstream = _spread(theirs.loads.seconds, 2) if theirs else ""
        met = statistics.median(ring.loads.seconds) <= bar
        yield of.verdict(f"load s, {_workers(ring)}", f"{bar:.2f}", upstream, _spread(ring.loads.seconds, 2), met)
    together = next((run for run in of.runs if run.name == "load together"), None)
    one = next((run for run in of.runs if run.name == "load one"), None)
    if together and one:
        bar = statistics.median(one.loads.seconds) + STARTS_VARY_S
        met = statistics.median(together.loads.seconds) <= bar
        what = f"load s, {_workers(together)} against one with the largest share"
        yield of.verdict(what, f"{bar:.2f}", "", _spread(together.loads.seconds, 2), met)


def _round_trips(of: _Figures) -> Iterator[Verdict]:
    for ring, theirs in of.rings():
        if ring.turns:
            count = ring.turns.to_first_token
            upstream = str(theirs.turns.to_first_token) if theirs and theirs.turns else ""
            what = f"round trips to the first token, {_workers(ring)}"
            yield of.verdict(what, str(ROUND_TRIPS), upstream, str(count), count <= ROUND_TRIPS)


def _prompt_bytes(of: _Figures) -> Iterator[Verdict]:
    for ring, theirs in of.rings():
        prompt, beside = _prompt(ring, LARGE), _prompt(theirs, LARGE)
        if prompt is None or ring.contexts is None:
            continue
        bar = PROMPT_SHARE * prompt.tokens * of.model.n_embd * 4 + PROMPT_SLACK
        what = f"prompt of {prompt.tokens:,} tokens, to a worker, {_workers(ring)}"
        upstream = size(beside.to_worker) if beside else ""
        yield of.verdict(what, size(bar), upstream, size(prompt.to_worker), prompt.to_worker <= bar)
    for ring, theirs in of.rings():
        if ring.contexts:
            more = ring.contexts.far - ring.contexts.near
            upstream = f"{theirs.contexts.far - theirs.contexts.near:+.0f} B" if theirs and theirs.contexts else ""
            what = f"more per token at {LARGE:,} tokens than at 40, {_workers(ring)}"
            yield of.verdict(what, f"{CONTEXT_SLACK} B", upstream, f"{more:+.0f} B", more <= CONTEXT_SLACK)


def _prompt_seconds(of: _Figures) -> Iterator[Verdict]:
    judged = of.model.bytes >= MID_BYTES
    for ring, _ in of.rings():
        for prompt in ring.prompts:
            if not prompt.solo_seconds:
                continue
            alone, took = statistics.median(prompt.solo_seconds), statistics.median(prompt.seconds)
            what = f"prompt of {prompt.tokens:,} tokens, s, {_workers(ring)} on {ring.link}"
            bar = f"solo {alone:.2f}"
            yield of.verdict(what, bar, "", _spread(prompt.seconds, 2), took < alone if judged else None)
    for ring, theirs in of.rings():
        for prompt in ring.prompts:
            beside = _prompt(theirs, prompt.wanted)
            if prompt.solo_seconds or beside is None or len(prompt.seconds) < len(beside.seconds):
                continue
            bars = [statistics.median(beside.seconds)]
            bars += [OTHER_ENGINE_S] if judged and prompt.wanted == SMALL else []
            what = f"prompt of {prompt.tokens:,} tokens, s, {_workers(ring)}"
            met = statistics.median(prompt.seconds) < min(bars) if judged else None
            upstream = _spread(beside.seconds, 2)
            yield of.verdict(what, f"{min(bars):.2f}", upstream, _spread(prompt.seconds, 2), met)


def _returns(of: _Figures) -> Iterator[Verdict]:
    for ring, theirs in of.rings():
        ours = [visit for visit in ring.visits if visit.again]
        others = [visit for visit in theirs.visits if visit.again] if theirs else []
        if ours:
            yield from _return(of, _workers(ring), ours, others)


def _return(of: _Figures, workers: str, ours: Sequence[Visit], others: Sequence[Visit]) -> Iterator[Verdict]:
    what = "back to a conversation of 2,000 tokens"
    tokens = max(visit.new_tokens for visit in ours) + RETURN_TOKENS

    def most(key: Callable[[Visit], int], show: Callable[[int], str], bar: int, named: str) -> Verdict:
        worst = max(map(key, ours))
        upstream = show(max(map(key, others))) if others else ""
        return of.verdict(f"{what}, {named}, {workers}", show(bar), upstream, show(worst), worst <= bar)

    yield most(lambda visit: visit.computed, str, tokens, "tokens computed")
    # Each way carries the new tokens' activations and those of the answer.
    bar = int(PROMPT_SHARE * tokens * of.model.n_embd * 4) + RETURN_SLACK
    yield most(lambda visit: max(visit.to_worker, visit.from_worker), size, bar, "bytes of a worker")
    upstream, measured = (
        _spread([visit.first_s for visit in visits], 2) if visits else "" for visits in (others, ours)
    )
    yield of.verdict(f"{what}, s to the first token, {workers}", "-", upstream, measured, None)


def _pushes(of: _Figures) -> Iterator[Verdict]:
    rings = [run for run in of.runs if run.name == "ring" and (run.pushes or run.push_faults)]
    if rings:
        faults = sorted({fault for run in rings for fault in run.push_faults})
        made = sum(len(run.pushes) for run in rings)
        total = made + sum(len(run.push_faults) for run in rings)
        said = f"{made} of {total}" + "".join(f"; {fault}" for fault in faults)
        yield of.verdict("neighbours that push", "all", "", said, not faults)


def _texts(of: _Figures) -> Iterator[Verdict]:
    asked = {key for run in of.runs if run.name != "upstream" for key in run.texts}
    if asked:
        differing = differing_texts(of.runs)
        said = f"{len(asked) - len(differing)} of {len(asked)}"
        same, both = like_upstream(of.runs)
        upstream = f"{same} of {both}" if both else ""
        yield of.verdict("questions with the text of a single process", "all", upstream, said, not differing)


def _prompt(run: Run | None, wanted: int) -> Prompt | None:
    return next((prompt for prompt in run.prompts if prompt.wanted == wanted), None) if run else None


def _workers(run: Run) -> str:
    return f"{run.workers} worker" + ("s" if run.workers != 1 else "")


def _spread(values: Sequence[float], digits: int) -> str:
    """The median, and what lies around it."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"
