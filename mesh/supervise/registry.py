"""The engine processes this node has started, on disk, so that the next run can end what a crashed one left.

A pid alone proves nothing: it may belong to another program by now. Each entry carries a mark made of the moment the
process started, and nothing is ever killed whose mark differs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import msgspec
import psutil

from mesh.supervise.reasons import ProcessKind

log = logging.getLogger(__name__)
FILE_NAME = "engine-processes.json"


class Entry(msgspec.Struct, frozen=True):
    pid: int
    mark: str
    kind: ProcessKind


def process_mark(pid: int) -> str | None:
    """When ``pid`` started, in a form that equals itself only; None when there is no such (living) process.

    On Linux the boot id and the kernel's own tick count: unlike a wall-clock start time, neither moves when somebody
    sets the clock.
    """
    if sys.platform == "linux":
        try:
            # Fields after the last ')' (the program's name may hold anything): state is the 1st, starttime the 20th.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


class ProcessRegistry:
    """The list in ``state_dir``. One node holds a state directory, so one writer."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE_NAME
        self._entries: dict[int, Entry] = {}

    def record(self, pid: int, kind: ProcessKind) -> None:
        """Put a process on the books before it runs anything of the engine."""
        mark = process_mark(pid)
        if mark is not None:
            self._entries[pid] = Entry(pid, mark, kind)
            self._save()

    def forget(self, pid: int) -> None:
        if self._entries.pop(pid, None) is not None:
            self._save()

    def left_over(self) -> list[Entry]:
        """What an earlier run wrote and never took back. A damaged file means nothing can be said: nothing is."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Entry])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("cannot read %s: %s", self._path, error)
            return []

    def sweep(self, within: float = 5.0) -> list[Entry]:
        """Kill what a crashed run left behind and wait for it to be gone. Blocking; call it before anything starts.

        Returns:
            The entries whose process was still there.
        """
        found = [entry for entry in self.left_over() if process_mark(entry.pid) == entry.mark]
        for entry in found:
            _kill(entry.pid)
        deadline = time.monotonic() + within
        while any(process_mark(e.pid) == e.mark for e in found) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._save()
        return found

    def _save(self) -> None:
        # No fsync: should the machine go down, the processes go with it.
        scratch = self._path.with_suffix(".tmp")
        try:
            scratch.write_bytes(msgspec.json.encode(list(self._entries.values())))
            scratch.replace(self._path)
        except OSError as error:  # a full disk: the kernel still ties the children to us
            log.warning("cannot write %s: %s", self._path, error)


def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.Error, OSError):
        if sys.platform != "win32" and os.getpgid(pid) == pid:
            os.killpg(pid, 9)
        else:
            psutil.Process(pid).kill()
