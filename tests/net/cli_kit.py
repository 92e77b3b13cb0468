"""The real command line as subprocesses, in a place of its own: no test sees the user's models, state or caches."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from mesh.engine.cache import cache_root, find_engine

ROOT = Path(__file__).parents[2]
MESH = (sys.executable, "-m", "mesh.cli")
PROMPT = "The machines in the attic"
T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], within: float = 20.0, what: str = "it") -> T:
    """The first truthy value of ``condition``."""
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come about within {within:g} s"
        time.sleep(0.05)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Up:
    """A running ``mesh up`` or ``mesh client``, and every line it said."""

    process: subprocess.Popen[str]
    place: Place
    state: Path
    lines: list[str] = field(default_factory=list)
    family: dict[int, psutil.Process] = field(default_factory=dict)
    """Every process it was ever seen to have started."""

    def said(self, words: str) -> str | None:
        return next((line for line in tuple(self.lines) if words in line), None)

    def wait_for(self, words: str, within: float = 30.0) -> str:
        def heard() -> str | None:
            line = self.said(words)
            assert line or self.process.poll() is None, "it ended:\n" + "\n".join(self.lines)
            return line

        return wait_until(heard, within, f"{words!r} in\n" + "\n".join(self.lines))

    def run(self, *arguments: str) -> Result:
        """A command to this node."""
        return self.place.run(*arguments, "--state-dir", str(self.state))

    def status(self) -> Any:
        return self.run("status", "--json").json

    def wait_serving(self, ring: int, within: float = 40.0) -> Any:
        """The status once a layout of ``ring`` machines serves."""

        def serving() -> Any:
            # Not through the command: this asks often, and starting Python costs more than the answer.
            note = json.loads((self.state / "node.json").read_text())
            if not note["api_url"]:
                return None
            request = urllib.request.Request(
                f"{note['api_url']}/mesh/status", headers={"Authorization": f"Bearer {note['token']}"}
            )
            with urllib.request.urlopen(request, timeout=5) as answer:
                found = json.load(answer)
            whole = found["mesh"]["state"] == "serving" and len(found["layout"]["ring"]) == ring
            return found if whole else None

        return wait_until(serving, within, f"a ring of {ring}")

    def invite(self, *arguments: str) -> str:
        return str(self.run("invite", "--json", *arguments).json["token"])

    @property
    def api(self) -> str:
        return str(json.loads((self.state / "node.json").read_text())["api_url"])

    def complete(self, tokens: int = 24) -> str:
        """Greedy text through this node's own API."""
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{self.api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    def children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.family[child.pid] = child
        return [child for child in self.family.values() if child.is_running() and child.status() != "zombie"]

    def signal(self, number: signal.Signals) -> None:
        self.children()
        self.process.send_signal(number)

    def ended(self, within: float = 20.0) -> int:
        """The exit status; nothing that the node started is left."""
        code = self.process.wait(within)
        wait_until(lambda: not self.children(), 5, f"the end of {self.children()}")
        return code


class Place:
    """A private models folder, cache and default state directory, and what runs in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "cache").mkdir(parents=True)
        # The engine is the user's own: building one takes minutes. What is remembered of model files is not.
        (root / "cache" / "engine").symlink_to(cache_root())
        self.environment = dict(
            os.environ,
            MESH_MODELS_DIR=str(root / "models"),
            MESH_CACHE_DIR=str(root / "cache"),
            XDG_STATE_HOME=str(root / "state"),
            PYTHONPATH=str(ROOT),
            TERM="xterm",
        )
        self.running: list[Up] = []

    def run(self, *arguments: str, within: float = 60.0, stdin: str = "") -> Result:
        done = subprocess.run(
            [*MESH, *arguments], env=self.environment, input=stdin, capture_output=True, text=True, timeout=within
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str, name: str = "kitchen", discovery: bool = False) -> Up:
        """A node on loopback with free ports; ``arguments`` begin with the command. With ``discovery`` it meets
        whatever else is announced on this machine's loopback."""
        state = self.root / name
        command = [
            *MESH, *arguments, "--name", name, "--state-dir", str(state), "--bind-host", "127.0.0.1",
            *("" if "--bind-port" in arguments else "--bind-port 0").split(),
            *("" if "--api-port" in arguments else "--api-port 0").split(),
            *([] if discovery else ["--no-discovery"]),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        up = Up(process, self, state)
        self.running.append(up)
        threading.Thread(target=_listen, args=(up,), daemon=True).start()
        return up

    def close(self) -> None:
        """End what a failed test left."""
        for up in self.running:
            if up.process.poll() is None:
                up.signal(signal.SIGTERM)
        for up in self.running:
            try:
                up.process.wait(10)
            except subprocess.TimeoutExpired:
                up.process.kill()
                up.process.wait(10)
            for child in up.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def _listen(up: Up) -> None:
    assert up.process.stdout is not None
    for line in up.process.stdout:
        up.lines.append(line.rstrip("\n"))


def a_place(root: Path, *, engine: bool = True) -> Iterator[Place]:
    """For fixtures. Somebody may be building the engine right now: wait a little rather than build a second one."""
    if engine:
        deadline = time.monotonic() + 30
        while find_engine("cpu") is None:
            if time.monotonic() > deadline:
                pytest.skip("the engine is not built: bin/mesh engine build")
            time.sleep(1)
    place = Place(root)
    yield place
    place.close()


def lines_of(text: str) -> Sequence[str]:
    return [line for line in text.splitlines() if line.strip()]
