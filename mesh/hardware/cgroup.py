"""What a container or a service manager allows this process, on Linux; both generations of control groups.

https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60
"""Bytes. The first generation writes "no limit" as nearly 2^63, rounded to pages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``memory_bytes`` None: no limit. ``free_bytes`` is what is left under it. ``cpus`` may be a fraction."""

    memory_bytes: int | None = None
    free_bytes: int | None = None
    cpus: float | None = None


def limits(proc: Path = Path("/proc/self")) -> Limits:
    """The tightest limits on the way from this process's group up to the root. Unreadable ones are none."""
    memory: int | None = None
    free: int | None = None
    cpus = math.inf
    for directory in _directories(proc, "memory"):
        limit, used = _memory(directory)
        if limit is not None:
            memory = limit if memory is None else min(memory, limit)
            free = max(0, limit - used) if free is None else min(free, max(0, limit - used))
    for directory in _directories(proc, "cpu"):
        cpus = min(cpus, _cpus(directory))
    return Limits(memory, free, None if cpus == math.inf else cpus)


def _directories(proc: Path, controller: str) -> Iterator[Path]:
    """This process's group for a controller and all groups above it that can be seen."""
    for line in _read(proc / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        second = controllers == ""
        if not second and controller not in controllers.split(","):
            continue
        mount = _mount(proc, "" if second else controller)
        if mount is None:
            continue
        root, place = mount
        try:
            below = PurePosixPath(path).relative_to(root)
        except ValueError:
            # In a container the path is the host's and the mount is already the group itself.
            below = PurePosixPath()
        directory = place / below
        while True:
            yield directory
            if directory == place:
                break
            directory = directory.parent


def _mount(proc: Path, controller: str) -> tuple[PurePosixPath, Path] | None:
    for line in _read(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == ("cgroup" if controller else "cgroup2") and (not controller or controller in kind[2].split(",")):
            return PurePosixPath(fields[3]), Path(fields[4])
    return None


def _memory(directory: Path) -> tuple[int | None, int]:
    limit = _number(_read(directory / "memory.max")) or _number(_read(directory / "memory.limit_in_bytes"))
    if limit is None or limit >= _NO_LIMIT:
        return None, 0
    used = _number(_read(directory / "memory.current")) or _number(_read(directory / "memory.usage_in_bytes")) or 0
    statistics = dict(line.split(" ", 1) for line in _read(directory / "memory.stat").splitlines() if " " in line)
    # File pages that nobody used lately are given up first: a model just read fills a container with them.
    cached = _number(statistics.get("total_inactive_file", "")) or _number(statistics.get("inactive_file", "")) or 0
    return limit, max(0, used - cached)


def _cpus(directory: Path) -> float:
    quota, _, period = _read(directory / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (_read(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    parts = _number(quota), _number(period)
    if parts[0] is None or not parts[1] or parts[0] <= 0:
        return math.inf
    return parts[0] / parts[1]


def _number(text: str) -> int | None:
    try:
        return int(text.strip())
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
