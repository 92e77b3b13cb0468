"""The bars of a recovery, and the table of what was measured. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench import tables
from bench.lab.selfcheck import percentile
from bench.recovery.cases import CASES
from bench.recovery.figures import Recovery

DETECTED_P50_S, DETECTED_P99_S = 1.5, 3.0
ELECTED_S = 0.3
BEYOND_S = 1.0
LEAVE_NOTICED_S = 0.5
"""Far below any patience of the detector: a process has to hear of the signal, and a coordinator has to be told."""
DETECTED = ("worker", "host", "cut-off", "mute")
"""Cases in which a machine is gone for everybody, so that silence must be judged."""
RECOVERED = ("worker", "host")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar. ``met`` is None where nothing was measured."""

    what: str
    bar: str
    measured: str
    met: bool | None


def verdicts(done: Sequence[Recovery]) -> list[Verdict]:
    """Every bar, of the cases that were run."""
    return [*_detection(done), *_election(done), *_leave(done), *_naps(done), *_beyond(done), *_rest(done)]


def _detection(done: Sequence[Recovery]) -> Iterator[Verdict]:
    for case in DETECTED:
        seen = [r.detected_s for r in done if r.case == case]
        known = [s for s in seen if s is not None]
        if seen:
            bar = f"p50 <= {DETECTED_P50_S} s, p99 <= {DETECTED_P99_S} s"
            met = len(known) == len(seen) and (
                percentile(known, 0.5) <= DETECTED_P50_S and percentile(known, 0.99) <= DETECTED_P99_S
            )
            yield Verdict(f"{case}: detected", bar, spread(seen), met)


def _election(done: Sequence[Recovery]) -> Iterator[Verdict]:
    for case in RECOVERED:
        seen = [r.elected_s for r in done if r.case == case]
        if seen:
            met = all(s is not None for s in seen) and percentile(_known(seen), 0.99) <= ELECTED_S
            yield Verdict(f"{case}: elected after detection", f"p99 <= {ELECTED_S} s", spread(seen), met)


def _leave(done: Sequence[Recovery]) -> Iterator[Verdict]:
    for case in ("leave", "leave-host"):
        seen = [r.detected_s for r in done if r.case == case]
        if seen:
            met = all(s is not None and s <= LEAVE_NOTICED_S for s in seen)
            yield Verdict(f"{case}: known to the others", f"<= {LEAVE_NOTICED_S} s", spread(seen), met)


def _naps(done: Sequence[Recovery]) -> Iterator[Verdict]:
    for case, what in (("stall-1", "evicted, or a new epoch"), ("slow-disk", "the slow machine taken for dead")):
        seen = [r for r in done if r.case == case]
        if seen:
            wrong = sum(bool(r.accused) or (case == "stall-1" and r.epochs > 0) for r in seen)
            yield Verdict(f"{case}: {what}", "never", f"{wrong} of {len(seen)}", wrong == 0)


def _beyond(done: Sequence[Recovery]) -> Iterator[Verdict]:
    for case in RECOVERED:
        seen = [r.beyond_s for r in done if r.case == case]
        if seen:
            met = all(s is not None and s <= BEYOND_S for s in seen)
            yield Verdict(f"{case}: next token beyond detection and load", f"<= {BEYOND_S} s", spread(seen), met)


def _rest(done: Sequence[Recovery]) -> Iterator[Verdict]:
    orphans = sum(r.orphans for r in done)
    yield Verdict("engine processes that outlived their node", "0", str(orphans), orphans == 0)
    changed = [r for r in done if r.case not in ("stall-1",)]
    if changed:
        lower = sum(r.epochs < 1 for r in changed)
        yield Verdict("faults that led to no new epoch", "0", str(lower), lower == 0)


def recovery_table(done: Sequence[Recovery]) -> str:
    """One row per case: p50 / p95 / p99, or the median and the worst of fewer than five."""
    header = ["fault", "runs", "detected s", "elected s", "load s", "next token s", "beyond s", "whole again s"]
    header.append("epochs")
    columns: list[Callable[[Recovery], float | None]] = [
        lambda r: r.detected_s, lambda r: r.elected_s, lambda r: r.load_s, lambda r: r.token_s,
        lambda r: r.beyond_s, lambda r: r.whole_s,
    ]  # fmt: skip
    rows = []
    for case in CASES:
        runs = [r for r in done if r.case == case.name]
        if runs:
            numbers = sorted({r.epochs for r in runs})
            span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            rows.append([case.name, str(len(runs)), *(spread([column(r) for r in runs]) for column in columns), span])
    return tables.markdown(header, rows)


def spread(values: Sequence[float | None]) -> str:
    """``p50 / p95 / p99``; of fewer than five the median and the worst."""
    known = _known(values)
    if not known:
        return "-"
    if len(known) < 5:
        return f"{statistics.median(known):.2f} (worst {max(known):.2f})"
    return " / ".join(f"{percentile(known, share):.2f}" for share in (0.5, 0.95, 0.99))


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
