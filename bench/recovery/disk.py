"""A disk that reads slowly for one machine: the kernel's own throttle, and a page cache without the file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

_ROOTS = (Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup"))


class SlowDiskError(Exception):
    """This system cannot throttle reads; the message says why."""


class SlowDisk:
    """A control group whose processes read ``path``'s device at ``bytes_per_second`` (blkio, of cgroups v1 or v2).

    Only what is not in the page cache is read from a disk: :meth:`forget` drops a file from there, as long as nobody
    has it mapped.

    Raises:
        SlowDiskError: there is no such controller, or no right to it.
    """

    def __init__(self, path: Path, bytes_per_second: int) -> None:
        self._path = path
        device = path.stat().st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        self._rate = bytes_per_second
        self._group: Path | None = None

    def __enter__(self) -> SlowDisk:
        for root in _ROOTS:
            group = root / f"meshbench-{os.getpid()}-{time.monotonic_ns()}"
            try:
                group.mkdir()
            except OSError:
                continue
            self._group = group
            if self._throttle(group):
                return self
            self._remove()
        raise SlowDiskError("no blkio or io controller that this user may use")

    def _throttle(self, group: Path) -> bool:
        v1, v2 = group / "blkio.throttle.read_bps_device", group / "io.max"
        with contextlib.suppress(OSError):
            if v1.exists():
                v1.write_text(f"{self._device} {self._rate}")
                return True
            if v2.exists():
                v2.write_text(f"{self._device} rbps={self._rate}")
                return True
        return False

    def add(self, pids: Iterable[int]) -> None:
        """These processes, and all that they start from now on."""
        assert self._group is not None
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self._group / "cgroup.procs").write_text(str(pid))

    def forget(self) -> None:
        """The file's next reader must read it from the disk."""
        fd = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._group is None:
            return
        parent = self._group.parent / "cgroup.procs"
        with contextlib.suppress(OSError):
            for pid in (self._group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    parent.write_text(pid)
        self._remove()

    def _remove(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(OSError):
                group.rmdir()
