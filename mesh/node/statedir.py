"""A node's state directory: who holds it, and how commands find the node in it.

node.key  grants, members    identity and membership, see :mod:`mesh.identity`
lock                         held while a node runs; freed by the system when it dies
node.json                    how commands reach the running node
logs/                        the engine's output, rotated
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import msgspec
import psutil
from filelock import FileLock, Timeout

from mesh.errors import StateError
from mesh.identity.store import load, save

RUNNING_FILE = "node.json"


class StateDir:
    """Holds the directory for one node at a time.

    Raises:
        StateError: another node holds it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / "lock")

    def __enter__(self) -> StateDir:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if sys.platform != "win32":
                self.path.chmod(0o700)
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise StateError(
                f"{self.path} is in use by a running node",
                remedy="stop it with: mesh down   or give this one its own: --state-dir DIR --bind-port N --api-port N",
            ) from error
        except OSError as error:
            raise StateError(
                f"cannot use the state directory {self.path}: {error.strerror}",
                remedy="choose another: --state-dir DIR",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        remove_running(self.path)
        self._lock.release()


class Running(msgspec.Struct, frozen=True):
    """What a running node leaves in its state directory (mode 0600) for commands on the same machine."""

    pid: int
    started: float
    """The process's creation time: a pid alone may belong to another program by now."""
    api_url: str
    token: str
    """Opens the control endpoints."""


def write_running(state_dir: Path, running: Running) -> None:
    """Publish the node; readable by its owner only."""
    save(state_dir / RUNNING_FILE, running)


def remove_running(state_dir: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (state_dir / RUNNING_FILE).unlink()


def is_alive(running: Running) -> bool:
    """Whether that very process still runs; one that only waits for its parent to notice its end does not."""
    try:
        process = psutil.Process(running.pid)
        with process.oneshot():
            same = abs(process.create_time() - running.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_running(state_dir: Path) -> Running:
    """The node of this state directory.

    Raises:
        StateError: none is running there.
    """
    running = load(state_dir / RUNNING_FILE, Running)
    if running is None or not is_alive(running):
        raise StateError(
            f"no node is running in {state_dir}",
            remedy="start one with: mesh up   (or name its directory: --state-dir DIR)",
        )
    return running
