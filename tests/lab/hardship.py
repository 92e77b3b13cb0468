"""Machines that are badly off: a disk that can be filled, a clock that can be set, engines without memory or peace.

Each is real where the kernel allows it: a small tmpfs in a mount namespace of its own, a resource limit, a signal. The
clock of one machine alone cannot be set (time namespaces leave CLOCK_REALTIME out), so a library between the process
and libc adds an offset that a file holds.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from bench.meshnode import MeshNode

_SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    char text[32] = {0};
    const char *path = getenv("CLOCK_OFFSET_FILE");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    if (read(fd, text, sizeof text - 1) < 0) text[0] = 0;
    close(fd);
    return atol(text);
}

int clock_gettime(clockid_t id, struct timespec *at) {
    int failed = (int)syscall(SYS_clock_gettime, id, at);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += offset();
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) { at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000; }
    return 0;
}
"""

_IN_BOX = """
import ctypes, os, runpy, sys
box = os.open({namespace!r}, os.O_RDONLY)
if ctypes.CDLL(None, use_errno=True).setns(box, 0x20000) != 0:
    sys.exit("cannot enter the mount namespace")
os.chdir({directory!r})
runpy.run_module("mesh.cli", run_name="__main__", alter_sys=True)
"""


class SettableClock:
    """A wall clock that processes with :attr:`env` see; :meth:`set` moves it for those that run, too."""

    def __init__(self, directory: Path) -> None:
        self._offset = directory / "clock-offset"
        self.set(0)
        source, library = directory / "clock.c", directory / "clock.so"
        source.write_text(_SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        self.env = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._offset)}

    def set(self, offset_s: int) -> None:
        """So many seconds ahead of this machine's."""
        draft = self._offset.with_suffix(".new")
        draft.write_text(str(offset_s))
        draft.replace(self._offset)


class SmallDisk:
    """A tmpfs at ``path``, of ``size`` bytes, in a mount namespace that lives until :meth:`close`."""

    def __init__(self, path: Path, size: int) -> None:
        path.mkdir(parents=True)
        self._path = path
        script = f"mount -t tmpfs -o size={size},mode=700 tmpfs '{path}' && echo mounted && exec sleep 3600"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "mounted\n", "no tmpfs here"
        self.inside = Path(f"/proc/{self._holder.pid}/root{path}")
        """The same directory, as others reach it."""
        self.program = ("-c", _IN_BOX.format(namespace=f"/proc/{self._holder.pid}/ns/mnt", directory=str(Path.cwd())))
        """What Python runs to be ``mesh`` with this disk."""

    def fill(self) -> None:
        """To the last byte."""
        with (self.inside / "filler").open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size) == size:
                        pass

    def free(self) -> None:
        (self.inside / "filler").unlink()

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


class BoxedNode(MeshNode):
    """A node with its state on a small disk; its commands see it too."""

    disk: SmallDisk

    def _mesh(self, *argv: str) -> list[str]:
        return [super()._mesh()[0], *self.disk.program, *argv]


@contextlib.contextmanager
def to_every(node: MeshNode, name: str | None, do: Callable[[psutil.Process], None]) -> Iterator[list[int]]:
    """Do something to every engine process (called ``name``) as soon as it is there; yields their ids.

    Not to one that only says what devices there are, which every start asks first.
    """
    met: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for pid in node.engine_pids(name):
                with contextlib.suppress(psutil.Error, OSError):
                    process = psutil.Process(pid)
                    if pid not in met and "--list-devices" not in process.cmdline():
                        met.append(pid)
                        do(process)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield met
    finally:
        over.set()
        watcher.join()


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def give_no_more_memory(process: psutil.Process) -> None:
    """Its address space is as large as it may ever be, but for a megabyte."""
    limit = process.memory_info().vms + (1 << 20)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))


def wait_for(condition: Callable[[], bool], within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.02)
