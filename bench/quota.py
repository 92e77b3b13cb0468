"""Less processor time, or less memory, for some processes: control groups of the first generation, or of the second.

A processor's quota is dealt in periods of a few milliseconds, so that a machine which computes for ten and then waits
for the others is slowed as much as one that computes all the time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.measure import BenchError

ROOT = Path("/sys/fs/cgroup")
PERIOD_US, LEAST_US = 2000, 1000
SLICE = Path("/proc/sys/kernel/sched_cfs_bandwidth_slice_us")
"""In which a quota is handed to a processor, which keeps what it does not use: by five milliseconds, as it comes, a
machine that computes for three and waits for seven is not slowed at all."""


@dataclass(frozen=True, slots=True)
class Group:
    """One control group; whoever is in it, and whoever they start, shares its limits."""

    places: tuple[Path, ...]

    def take(self, pid: int) -> None:
        """Move a process in, before it has started others."""
        for place in self.places:
            (place / "cgroup.procs").write_text(str(pid))

    def read(self, *names: str) -> int | None:
        """The first of these files that is there and holds a number."""
        for place in self.places:
            for name in names:
                with contextlib.suppress(OSError, ValueError):
                    return int((place / name).read_text().split()[0])
        return None


@contextlib.contextmanager
def limited(name: str, *, cpus: float | None = None, memory_bytes: int | None = None) -> Iterator[Group]:
    """A group while in the block.

    Raises:
        BenchError: this machine does not let us limit anything.
    """
    places: list[Path] = []
    stack = contextlib.ExitStack()
    try:
        if cpus is not None:
            stack.enter_context(_fine_slices())
            period = max(PERIOD_US, round(LEAST_US / cpus))
            quota = round(period * cpus)
            place = _make("cpu", name)
            places.append(place)
            _set(place, {"cpu.max": f"{quota} {period}"}, {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": quota})
        if memory_bytes is not None:
            place = _make("memory", name)
            if place not in places:
                places.append(place)
            _set(place, {"memory.max": memory_bytes}, {"memory.limit_in_bytes": memory_bytes})
        yield Group(tuple(places))
    except OSError as error:
        raise BenchError(f"no control group can be made here: {error}") from error
    finally:
        for place in places:
            _remove(place)
        stack.close()


@contextlib.contextmanager
def _fine_slices() -> Iterator[None]:
    """Where the kernel has a say in it; as it was before, afterwards."""
    before = SLICE.read_text() if SLICE.exists() else None
    if before is not None:
        SLICE.write_text(str(LEAST_US))
    try:
        yield
    finally:
        if before is not None:
            SLICE.write_text(before)


def _make(controller: str, name: str) -> Path:
    base = ROOT / controller if (ROOT / controller).is_dir() else ROOT
    place = base / f"meshbench-{os.getpid()}-{name}"
    place.mkdir(exist_ok=True)
    return place


def _set(place: Path, second: dict[str, object], first: dict[str, object]) -> None:
    names = second if (place / next(iter(second))).exists() else first
    for name, value in names.items():
        (place / name).write_text(str(value))


def _remove(place: Path) -> None:
    for _ in range(50):
        try:
            place.rmdir()
            return
        except OSError:  # a process is still ending
            time.sleep(0.1)
