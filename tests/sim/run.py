"""Runs seeds and says what came of them:  bin/sim --seeds N [--start S] [--jobs J] [--trace]."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import Pool

from tests.sim import evictions, scale
from tests.sim.parts import REAL, Parts
from tests.sim.world import Outcome, run_seed

SHOW_EVERY_S = 10.0


def attempt(seed: int) -> Outcome | str:
    try:
        return run_seed(seed)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _give_way() -> None:
    """Whatever else runs on this machine has a clock that does not wait."""
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)


def run_all(seeds: Iterable[int], jobs: int) -> Iterator[tuple[int, Outcome | str]]:
    """Each seed with what came of it, or why it failed, in order."""
    with Pool(jobs, _give_way) as pool:
        yield from zip(seeds, pool.imap(attempt, seeds, chunksize=8), strict=True)


def at(values: list[float], share: float) -> str:
    """The value below which ``share`` of ``values`` lie."""
    ordered = sorted(values)
    return f"{ordered[min(len(ordered) - 1, int(len(ordered) * share))]:.2f}" if ordered else "-"


def spread(values: list[float]) -> str:
    shares = ((50, "p50"), (90, "p90"), (99, "p99"), (100, "worst"))
    return "  ".join(f"{name} {at(values, share / 100)}" for share, name in shares) + f"  ({len(values)})"


class Tally:
    """What came of the seeds so far."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.failed: list[int] = []
        self.began = self._shown = time.monotonic()

    def take(self, seed: int, result: Outcome | str) -> None:
        if isinstance(result, Outcome):
            self.outcomes.append(result)
        else:
            self.failed.append(seed)
            print(f"seed {seed} FAILED  {result}\n     again: bin/sim --start {seed} --seeds 1 --trace", flush=True)

    def progress(self, total: int) -> None:
        now = time.monotonic()
        done = len(self.outcomes) + len(self.failed)
        if now - self._shown >= SHOW_EVERY_S:
            self._shown = now
            pace = done / (now - self.began)
            left = (total - done) / pace
            print(
                f"   {done} of {total} seeds, {len(self.failed)} failed, {left:.0f} s left", file=sys.stderr, flush=True
            )

    def summary(self) -> str:
        outcomes, took = self.outcomes, time.monotonic() - self.began
        done = len(outcomes) + len(self.failed)
        requests: Counter[str] = Counter()
        for outcome in outcomes:
            requests.update(outcome.requests)
        ends = ", ".join(f"{how} {n}" for how, n in requests.most_common())
        return "\n".join(
            [
                f"{done} seeds, {len(self.failed)} failed, {took:.0f} s, {done / took:.1f} seeds/s",
                f"one host after healing, s:  {spread([o.one_host_after_s for o in outcomes])}",
                f"and it serves, s:           {spread([o.served_after_s for o in outcomes])}",
                f"crash detected after, s:    {spread([s for o in outcomes for s in o.detected_s])}",
                f"healthy nodes evicted: {sum(o.evicted_alive for o in outcomes)}",
                f"epochs: {sum(o.epochs for o in outcomes)}  deaths in the middle of a step: "
                f"{sum(o.deaths_midway for o in outcomes)}",
                f"requests: {ends}",
                f"simulated: {sum(o.simulated_s * o.nodes for o in outcomes) / 3600:.0f} node-hours",
            ]
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/sim", description="Simulate meshes of the real cores, by seed.")
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--trace", action="store_true", help="tell the story of the first failing seed, or of the only one"
    )
    parser.add_argument("--evictions", action="store_true", help="detectors alone: are healthy nodes left in?")
    parser.add_argument("--hours", type=float, default=200, help="node-hours of --evictions")
    parser.add_argument("--scale", type=int, nargs="*", metavar="N", help="what meshes of N members say to each other")
    args = parser.parse_args()
    if args.evictions:
        return evictions.main(args.hours, args.jobs)
    if args.scale is not None:
        return scale.main(args.scale or [5, 32, 100, 1000])
    tally = Tally()
    for seed, result in run_all(range(args.start, args.start + args.seeds), args.jobs):
        tally.take(seed, result)
        tally.progress(args.seeds)
    print(tally.summary())
    if args.trace and (tally.failed or args.seeds == 1):
        tell(tally.failed[0] if tally.failed else args.start)
    return 1 if tally.failed else 0


def tell(seed: int, parts: Parts = REAL) -> None:
    story: list[str] = []
    try:
        run_seed(seed, parts, story)
    except Exception as error:
        story.append(f"           {type(error).__name__}: {error}")
    print("\n".join(story))


if __name__ == "__main__":
    sys.exit(main())
