"""Network namespaces that know whose they are, so that only ours are ever removed, and all of ours are.

A namespace is called ``meshlab-<owner pid>-<owner start time>-<serial>-<node>``: when no process with that pid and
start time lives, it is a leftover.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PREFIX = "meshlab"
DIRECTORY = Path("/run/netns")
_CLONE_NEWNET = 0x40000000


class LabError(Exception):
    """The lab cannot do what was asked; the message says why."""


def start_time(pid: int) -> int | None:
    """Clock ticks between boot and the start of ``pid``; None when there is no such process."""
    try:
        # The command's name may hold spaces and brackets: count fields from the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie holds nothing any more.
    return None if fields[0] in "ZX" else int(fields[19])


def group_prefix(owner: int, serial: int) -> str:
    """What the names of one lab's namespaces begin with."""
    return f"{PREFIX}-{owner}-{start_time(owner)}-{serial}-"


def run_ip(*arguments: str, script: str | None = None) -> None:
    """Call ``ip``.

    Raises:
        LabError: it failed, with what it said.
    """
    try:
        done = subprocess.run(["ip", *arguments], input=script, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"ip {' '.join(arguments)}: {error}") from error
    if done.returncode != 0:
        raise LabError(f"ip {' '.join(arguments)}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def path_of(name: str) -> Path:
    return DIRECTORY / name


def create(name: str) -> None:
    run_ip("netns", "add", name)


def enter(name: str) -> None:
    """Move the calling thread, and nothing else, into the namespace."""
    fd = os.open(path_of(name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_fd(fd)
    finally:
        os.close(fd)


def enter_fd(fd: int) -> None:
    """Move the calling thread into the namespace that a descriptor stands for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise LabError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


def open_socket(name: str, family: int, kind: int) -> socket.socket:
    """A socket that lives in the namespace, for use from any thread of this process.

    A socket belongs to the namespace it was made in for good, so only its making needs a thread in there.
    """
    made: list[socket.socket | Exception] = []

    def make() -> None:
        try:
            enter(name)
            made.append(socket.socket(family, kind))
        except (OSError, LabError) as error:
            made.append(error)

    thread = threading.Thread(target=make, name=f"socket in {name}")
    thread.start()
    thread.join()
    result = made[0]
    if isinstance(result, Exception):
        raise LabError(f"no socket in {name}: {result}") from result
    return result


def pids_in(name: str) -> list[int]:
    """Processes in the namespace right now."""
    try:
        inode = path_of(name).stat().st_ino
    except OSError:
        return []
    if inode == Path("/proc/self/ns/net").stat().st_ino:  # a name that was never mounted must not mean ourselves
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "ns/net").stat().st_ino == inode:
                    found.append(int(entry.name))
    return found


def kill_all_in(name: str, within: float = 5.0) -> None:
    """SIGKILL everything in the namespace, and what it forks meanwhile, until nothing is left."""
    deadline = time.monotonic() + within
    while pids := [pid for pid in pids_in(name) if start_time(pid) is not None]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"processes {pids} in {name} survive SIGKILL")
        time.sleep(0.005)


def remove(name: str) -> None:
    """Kill what runs in the namespace and take its name away; twice does no harm."""
    if not path_of(name).exists():
        return
    kill_all_in(name)
    try:
        run_ip("netns", "delete", name)
    except LabError:
        if path_of(name).exists():
            raise


def remove_group(prefix: str) -> None:
    """Remove every namespace whose name begins with ``prefix``."""
    problems = []
    for path in sorted(DIRECTORY.glob(f"{prefix}*")):
        try:
            remove(path.name)
        except LabError as error:
            problems.append(str(error))
    if problems:
        raise LabError("; ".join(problems))


def sweep() -> list[str]:
    """Remove what labs whose owner is gone left behind; returns the names."""
    swept = []
    for path in sorted(DIRECTORY.glob(f"{PREFIX}-*")):
        words = path.name.split("-", 4)
        if len(words) == 5 and words[1].isdigit() and str(start_time(int(words[1]))) != words[2]:
            # Its own router may be at the same work: losing that race is success.
            with contextlib.suppress(LabError):
                remove(path.name)
            swept.append(path.name)
    return swept


def lab_available() -> tuple[bool, str]:
    """Whether a lab can run here and, if not, why."""
    if not sys.platform.startswith("linux"):
        return False, "network namespaces need Linux"
    if os.geteuid() != 0:
        return False, "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return False, "no /dev/net/tun (modprobe tun)"
    probe = f"{group_prefix(os.getpid(), 0)}probe{threading.get_native_id()}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        run_ip("netns", "add", probe)
        run_ip("netns", "delete", probe)
        subprocess.run(["nsenter", "--version"], capture_output=True, check=True)
    except (OSError, LabError, subprocess.CalledProcessError) as error:
        return False, str(error)
    return True, ""
