"""Runs seeds and says what came of them:  bin/sim --seeds N --start S [--trace] [--jobs J]."""

from __future__ import annotations

import argparse
import sys
import time
from multiprocessing import Pool

from tests.sim.world import Outcome, run_seed


def attempt(seed: int) -> Outcome | str:
    try:
        return run_seed(seed)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def at(values: list[float], share: float) -> str:
    """The value below which ``share`` of ``values`` lie."""
    ordered = sorted(values)
    return f"{ordered[min(len(ordered) - 1, int(len(ordered) * share))]:.2f}" if ordered else "-"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/sim", description="Simulate meshes of the real cores, by seed.")
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--trace", action="store_true", help="tell the story of the first failing seed, or of the only one"
    )
    args = parser.parse_args()
    seeds = range(args.start, args.start + args.seeds)
    began = time.monotonic()
    outcomes: list[Outcome] = []
    failed: list[int] = []
    with Pool(args.jobs) as pool:
        for seed, result in zip(seeds, pool.imap(attempt, seeds, chunksize=8), strict=True):
            if isinstance(result, Outcome):
                outcomes.append(result)
                continue
            failed.append(seed)
            print(f"seed {seed} FAILED  {result}\n     again: bin/sim --start {seed} --seeds 1 --trace", flush=True)
    took = time.monotonic() - began
    agreed = [o.converged_after_s for o in outcomes]
    seen = [s for o in outcomes for s in o.detected_s]
    print(f"{len(seeds)} seeds, {len(failed)} failed, {took:.1f} s, {len(seeds) / took:.1f} seeds/s")
    for what, values in (("agreement after healing, s:", agreed), ("crash detected after, s:", seen)):
        spread = "  ".join(f"p{share:g} {at(values, share / 100)}" for share in (50, 95, 99, 100))
        print(f"{what:28}{spread}  ({len(values)})")
    print(f"healthy nodes evicted: {sum(o.evicted_alive for o in outcomes)}  epochs: {sum(o.epochs for o in outcomes)}")
    print(f"simulated: {sum(o.simulated_s for o in outcomes) / 60:.0f} min of {sum(o.nodes for o in outcomes)} nodes")
    if args.trace and (failed or args.seeds == 1):
        tell(failed[0] if failed else args.start)
    return 1 if failed else 0


def tell(seed: int) -> None:
    story: list[str] = []
    try:
        run_seed(seed, story=story)
    except Exception as error:
        story.append(f"           {type(error).__name__}: {error}")
    print("\n".join(story))


if __name__ == "__main__":
    sys.exit(main())
