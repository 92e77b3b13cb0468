"""What a thousand requests in bad weather are held to. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench import tables
from bench.endure.asking import SDK_TRIES, Fate, Outcome, Try
from bench.endure.weather import Happened
from bench.lab.selfcheck import percentile
from bench.verdicts import Verdict

FAULTS = {Fate.REFUSED: "requests failed", Fate.CUT: "answers truncated", Fate.ALTERED: "answers altered"}


@dataclass(slots=True)
class Endured:
    """What was seen.

    Args:
        asked: how many questions there were.
        whole_s: until all machines were in one ring again at the end; None: they were not.
        ended: nodes that should have run, and did not.
    """

    weather: str
    asked: int
    happened: list[Happened] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    whole_s: float | None = None
    ended: list[str] = field(default_factory=list)


def verdicts(endured: Endured) -> list[Verdict]:
    """Every bar."""
    return [*_faults(endured), *_ingress(endured), *_figures(endured), *_afterwards(endured)]


def hit(endured: Endured) -> list[tuple[Outcome, Try]]:
    """Tries that were under way when something happened."""
    times = [happened.at_s for happened in endured.happened]
    return [
        (outcome, one)
        for outcome in endured.outcomes
        for one in outcome.tries
        if any(one.began_s <= at <= one.ended_s for at in times)
    ]


def _faults(endured: Endured) -> Iterator[Verdict]:
    faults = Counter(one.fate for outcome in endured.outcomes for one in outcome.faults)
    for fate, what in FAULTS.items():
        yield Verdict(what, "0", str(faults[fate]), faults[fate] == 0)
    answered = sum(outcome.fate is Fate.ANSWERED for outcome in endured.outcomes)
    yield Verdict("requests answered", str(endured.asked), str(answered), answered == endured.asked)


def _ingress(endured: Endured) -> Iterator[Verdict]:
    lost = [outcome for outcome in endured.outcomes if outcome.lost_its_ingress]
    again = [outcome for outcome in lost if outcome.fate is Fate.ANSWERED]
    soon = sum(len(outcome.tries) <= SDK_TRIES for outcome in again)
    what = "lost with the machine they were asked at, answered when asked again"
    measured = f"{len(again)} of {len(lost)}, {soon} of them by the {SDK_TRIES}rd try"
    yield Verdict(what, "all", measured, len(again) == len(lost))


def _figures(endured: Endured) -> Iterator[Verdict]:
    deeds = Counter(f"{happened.deed} ({happened.role})" for happened in endured.happened)
    yield Verdict(endured.weather, "some", ", ".join(f"{n} {deed}" for deed, n in deeds.items()), bool(deeds))
    struck = hit(endured)
    streams = sum(outcome.request.streams for outcome, _ in struck)
    yield Verdict(
        "requests under way when it happened", "some", f"{len(struck)}, {streams} of them streams", bool(struck)
    )
    for what, tries in (
        ("pause of those, s", [one for _, one in struck]),
        ("pause of the others, s", _others(endured, struck)),
    ):
        pauses = [one.pause_s for one in tries if one.fate is Fate.ANSWERED]
        yield Verdict(f"{what}: p50 / p95 / p99 / longest", "-", spread(pauses), None)


def _others(endured: Endured, struck: Sequence[tuple[Outcome, Try]]) -> list[Try]:
    known = {id(one) for _, one in struck}
    return [one for outcome in endured.outcomes for one in outcome.tries if id(one) not in known]


def _afterwards(endured: Endured) -> Iterator[Verdict]:
    whole = "not within the wait" if endured.whole_s is None else f"{endured.whole_s:.1f}"
    yield Verdict("all machines in one ring again after, s", "some time", whole, endured.whole_s is not None)
    yield Verdict("nodes that ended by themselves", "none", ", ".join(endured.ended) or "none", not endured.ended)


def spread(values: Sequence[float]) -> str:
    """p50 / p95 / p99 / max."""
    if not values:
        return "-"
    return " / ".join(f"{percentile(list(values), share):.2f}" for share in (0.5, 0.95, 0.99)) + f" / {max(values):.2f}"


def fault_table(endured: Endured) -> str:
    """Why tries that should have been answered were not."""
    rows = [
        [f"{one.began_s:.1f}", one.node, outcome.request.words, one.fate.value, one.why]
        for outcome in endured.outcomes
        for one in outcome.faults
    ]
    return tables.markdown(["at s", "node", "asked", "fate", "why"], rows)


def kind_table(endured: Endured) -> str:
    """Answers by endpoint and way of asking."""
    kinds = Counter((o.request.endpoint.name, o.request.streams, o.fate is Fate.ANSWERED) for o in endured.outcomes)
    struck = Counter((outcome.request.endpoint.name, outcome.request.streams) for outcome, _ in hit(endured))
    names = sorted({(name, streams) for name, streams, _ in kinds})
    rows = [
        [
            name,
            "streamed" if streams else "whole",
            str(kinds[name, streams, True]),
            str(kinds[name, streams, False]),
            str(struck[name, streams]),
        ]
        for name, streams in names
    ]
    return tables.markdown(["endpoint", "", "answered", "not", "under way when it happened"], rows)
