"""A node's state directory: who holds it, and how commands find the node in it.

node.key  grants, members    identity and membership, see :mod:`mesh.identity`
lock                         held while a node runs; freed by the system when it dies
node.json                    how commands reach the running node
logs/                        the engine's output, rotated
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from mesh.config import default_state_dir
from mesh.errors import StateError
from mesh.identity.store import load, save
from mesh.supervise.registry import process_mark

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
                remedy=f"stop it with: {command_for(self.path, 'down')}   "
                "or give this one its own: --state-dir DIR --bind-port N --api-port N",
            ) from error
        except OSError as error:
            raise StateError(
                f"cannot use the state directory {self.path}: {error.strerror}",
                remedy="choose another: --state-dir DIR",
            ) from error
        # So that a command is told "still starting", and `mesh down` has somebody to stop.
        write_running(self.path, this_process("", ""))
        return self

    def __exit__(self, *_: object) -> None:
        remove_running(self.path)
        self._lock.release()


class Running(msgspec.Struct, frozen=True):
    """What a running node leaves in its state directory (mode 0600) for commands on the same machine."""

    pid: int
    started: str
    """When the process began (:func:`process_mark`): a pid alone may belong to another program by now."""
    api_url: str
    """Empty while the node prepares its engine and model, and answers nobody yet."""
    token: str
    """Opens the control endpoints."""


def this_process(api_url: str, token: str) -> Running:
    return Running(os.getpid(), process_mark(os.getpid()) or "", api_url, token)


def write_running(state_dir: Path, running: Running) -> None:
    """Publish the node; readable by its owner only."""
    save(state_dir / RUNNING_FILE, running)


def remove_running(state_dir: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (state_dir / RUNNING_FILE).unlink()


def is_alive(running: Running) -> bool:
    """Whether that very process still runs; one that only waits for its parent to notice its end does not."""
    return process_mark(running.pid) == running.started


def find_process(state_dir: Path) -> Running | None:
    """The process that holds this state directory, also while it is still starting."""
    running = load(state_dir / RUNNING_FILE, Running)
    return running if running is not None and is_alive(running) else None


def find_running(state_dir: Path) -> Running:
    """The node of this state directory.

    Raises:
        StateError: none is running there, or it does not answer yet.
    """
    running = find_process(state_dir)
    if running is None:
        raise StateError(
            f"no node is running in {state_dir}",
            remedy="start one with: mesh up   (or name its directory: --state-dir DIR)",
        )
    if not running.api_url:
        raise StateError(
            f"the node in {state_dir} (pid {running.pid}) is still preparing its engine and model, "
            "or waiting to be let into a mesh",
            remedy=f"wait until it says that it is ready:  {command_for(state_dir, 'logs -f')}",
            code="starting",
        )
    return running


def command_for(state_dir: Path, command: str) -> str:
    """How to give ``command`` to the node of this directory."""
    return f"mesh {command}" if state_dir == default_state_dir() else f"mesh {command} --state-dir {state_dir}"
