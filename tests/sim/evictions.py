"""Do healthy nodes stay in, and are dead ones found?  bin/sim --evictions --hours 2000 [--jobs J]."""

from __future__ import annotations

import sys
import time
from functools import partial
from multiprocessing import Pool

from tests.sim.detectors import false_verdicts, verdicts

CHUNK_H = 1.0
NODES = 5
LOSS = 0.05
JITTER_S = 0.2
PATHS = {"lan": 0.0001, "wan20": 0.020}
"""One way, seconds; the jitter comes on top of it."""


def _chunk(seed: int, loss: float = LOSS, jitter: float = JITTER_S) -> tuple[float, int]:
    delay = list(PATHS.values())[seed % len(PATHS)]
    return false_verdicts(seed, CHUNK_H, NODES, delay, jitter, loss)


def count_evictions(hours: float, jobs: int = 1, start: int = 0) -> tuple[float, int, list[int]]:
    """Node-hours at 5% loss and 200 ms of jitter, verdicts on healthy nodes, and the seeds that had some."""
    seeds = range(start, start + round(hours / (CHUNK_H * NODES) + 0.499))
    done, wrong, guilty, shown = 0.0, 0, [], time.monotonic()
    with Pool(jobs) as pool:
        for seed, (node_hours, evicted) in zip(seeds, pool.imap(partial(_chunk), seeds), strict=True):
            done, wrong = done + node_hours, wrong + evicted
            guilty += [seed] if evicted else []
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                print(f"   {done:.0f} of {hours:.0f} node-hours, {wrong} false evictions", file=sys.stderr, flush=True)
    return done, wrong, guilty


def main(hours: float, jobs: int) -> int:
    began = time.monotonic()
    for name, delay in PATHS.items():
        took = sorted(t for seed in range(100) for t in verdicts(NODES, seed, delay, delay / 10))
        p50, p99 = took[len(took) // 2], took[int(len(took) * 0.99)]
        print(
            f"{name:6} crash detected: p50 {p50:.2f} s  p99 {p99:.2f} s  max {took[-1]:.2f} s  ({len(took)})",
            flush=True,
        )
    done, wrong, guilty = count_evictions(hours, jobs)
    print(
        f"{done:.0f} node-hours at {LOSS:.0%} loss and {JITTER_S * 1000:.0f} ms jitter: {wrong} healthy nodes evicted"
    )
    if guilty:
        print(f"   by seeds {guilty[:20]}")
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if wrong else 0
