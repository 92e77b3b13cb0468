"""What a soak is held to. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from bench import tables
from bench.soak.asking import Fate, Outcome
from bench.soak.census import TASKS
from bench.soak.watching import Sample
from bench.verdicts import Verdict

SERVES_WITHIN_S = 30.0
FLAT_RSS_PER_MIN = 200_000
"""Bytes per minute over the second half: 2 MB in ten minutes, an hour's growth of which nobody would notice."""
FLAT_DESCRIPTORS_PER_MIN = 0.5
MORE_WHEN_IDLE = 4
"""Tasks, descriptors and streams that an idle node may have more after the flaps than before them."""
STREAMS = ("Stream", "Exchange", "Connection", "QuicConnection", "Splice", "Link")
"""Ends of the names of classes that stand for something open."""


@dataclass(slots=True)
class Soak:
    """What was seen.

    Args:
        flapped_s: how long paths flapped.
        samples: of each node, while they did.
        idle: of each node at rest, a sample and a census, before the flaps and after them.
        again_s: from the last flap's end to a right answer, by node; None: none came.
        whole_s: until all machines were in the ring again; None: they were not.
    """

    flapped_s: float
    outcomes: list[Outcome] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    idle: dict[str, list[tuple[Sample, dict[str, int]]]] = field(default_factory=dict)
    again_s: dict[str, float | None] = field(default_factory=dict)
    whole_s: float | None = None
    epochs: int = 0
    problems: list[str] = field(default_factory=list)


def verdicts(soak: Soak) -> list[Verdict]:
    """Every bar."""
    return [*_fates(soak), *_again(soak), *_flat(soak), *_idle(soak), *_problems(soak)]


def slope_per_min(points: Sequence[tuple[float, float]]) -> float:
    """Theil and Sen's: the median slope over all pairs, which a few outliers do not move. x in seconds."""
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if b[0] > a[0]]
    return 60 * statistics.median(slopes) if slopes else 0.0


def second_half(soak: Soak, node: str) -> list[Sample]:
    return [sample for sample in soak.samples.get(node, []) if sample.at_s >= soak.flapped_s / 2]


def growth(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What there is more of, most first."""
    more = {name: count - before.get(name, 0) for name, count in after.items()}
    return dict(sorted(((n, c) for n, c in more.items() if c > 0), key=lambda item: -item[1]))


def _fates(soak: Soak) -> Iterator[Verdict]:
    fates = Counter(outcome.fate for outcome in soak.outcomes)
    lost = fates[Fate.LOST]
    yield Verdict("requests neither answered rightly nor refused", "0", str(lost), lost == 0)
    said = ", ".join(f"{fates[fate]} {fate.value}" for fate in Fate if fates[fate])
    answering = {outcome.node for outcome in soak.outcomes if outcome.fate is Fate.ANSWERED}
    yield Verdict(
        "requests", "some answered on every node", said, bool(soak.samples) and answering >= set(soak.samples)
    )
    slowest = max((o.took_s for o in soak.outcomes if o.fate is Fate.ANSWERED), default=0.0)
    silent = max((o.silence_s for o in soak.outcomes), default=0.0)
    yield Verdict("slowest answer, longest silence, s", "-", f"{slowest:.1f}, {silent:.1f}", None)


def _again(soak: Soak) -> Iterator[Verdict]:
    times = list(soak.again_s.values())
    met = bool(times) and all(time is not None and time <= SERVES_WITHIN_S for time in times)
    measured = ", ".join(f"{name} {'never' if s is None else f'{s:.1f}'}" for name, s in soak.again_s.items())
    yield Verdict("right answer after the last flap, s", f"{SERVES_WITHIN_S:g}", measured, met)
    whole = "not within the wait" if soak.whole_s is None else f"{soak.whole_s:.0f}"
    yield Verdict("all machines in the ring again after, s", "-", whole, None)
    yield Verdict("epochs", "-", str(soak.epochs), None)


def _flat(soak: Soak) -> Iterator[Verdict]:
    rss = {n: slope_per_min([(s.at_s, s.rss_bytes) for s in second_half(soak, n)]) for n in soak.samples}
    measured = ", ".join(f"{name} {slope / 1e3:+.0f} KB" for name, slope in rss.items())
    bar = f"{FLAT_RSS_PER_MIN / 1e3:g} KB"
    yield Verdict("memory per minute, second half", bar, measured, _all(rss.values(), FLAT_RSS_PER_MIN))
    fds = {n: slope_per_min([(s.at_s, s.descriptors) for s in second_half(soak, n)]) for n in soak.samples}
    measured = ", ".join(f"{name} {slope:+.2f}" for name, slope in fds.items())
    bar = f"{FLAT_DESCRIPTORS_PER_MIN:g}"
    yield Verdict("descriptors per minute, second half", bar, measured, _all(fds.values(), FLAT_DESCRIPTORS_PER_MIN))


def _idle(soak: Soak) -> Iterator[Verdict]:
    pairs = {name: (seen[0], seen[-1]) for name, seen in soak.idle.items() if len(seen) > 1}
    waiting = {name: after.active + after.held for name, (_, (after, _)) in pairs.items()}
    measured = ", ".join(f"{name} {count}" for name, count in waiting.items())
    yield Verdict("requests under way when nobody asks", "0", measured, _all((abs(n) for n in waiting.values()), 0))
    # In a smaller ring there is less of everything: what is more than before still says something.
    for what, count in (
        ("descriptors", lambda seen: seen[0].descriptors),
        ("tasks", lambda seen: seen[1].get(TASKS, 0)),
        ("streams and connections", lambda seen: sum(_open(seen[1]).values())),
    ):
        both = {name: (count(before), count(after)) for name, (before, after) in pairs.items()}
        measured = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in both.items())
        more = [after - before for before, after in both.values()]
        yield Verdict(f"{what} at rest, before -> after", f"+{MORE_WHEN_IDLE}", measured, _all(more, MORE_WHEN_IDLE))
    megabytes = [f"{n} {b.rss_bytes / 1e6:.1f} -> {a.rss_bytes / 1e6:.1f}" for n, ((b, _), (a, _)) in pairs.items()]
    yield Verdict("memory at rest, before -> after, MB", "-", ", ".join(megabytes), None)
    engines = {name: after.engines for name, (_, (after, _)) in pairs.items()}
    measured = ", ".join(f"{name} {count}" for name, count in engines.items())
    yield Verdict("engine processes at rest", "1", measured, _all(engines.values(), 1))


def _open(census: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in census.items() if name.startswith("mesh.") and name.endswith(STREAMS)}


def _problems(soak: Soak) -> Iterator[Verdict]:
    yield Verdict("nodes still running, nothing unexpected said", "all", "; ".join(soak.problems), not soak.problems)


def _all(values: Iterable[float], bar: float) -> bool:
    found = list(values)
    return bool(found) and max(found) <= bar


def why_table(outcomes: Sequence[Outcome]) -> str:
    """What requests came to, by kind of request, and why."""
    rows = []
    for (fate, why), count in sorted(Counter((o.fate.value, o.why) for o in outcomes).items()):
        streamed = sum(o.request.streams for o in outcomes if (o.fate.value, o.why) == (fate, why))
        rows.append([fate, why or "-", str(streamed), str(count - streamed)])
    return tables.markdown(["fate", "why", "streamed", "whole"], rows)
