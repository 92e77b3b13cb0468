"""A mesh node on a lab machine, driven the way a person drives it: through its command line and its API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

from bench.lab import Lab

ROOT = Path(__file__).resolve().parents[1]
ENGINE_NAMES = ("llama-server", "ggml-rpc-server")


class MeshNodeError(Exception):
    """A node did not do what was waited for; the message ends with its last words."""


class MeshNode:
    """One node: a lab machine, a state directory, and at most one running ``mesh up`` or ``mesh client``.

    Args:
        machine: the lab machine; also the node's name.
        directory: where the state directory and the output go.
        arguments: more of ``mesh up``'s, e.g. ``("--split", "always")``.
        role: ``up`` or ``client``.
        bind_host: the machine's address when left out; ``0.0.0.0`` for one that moves.
        program: what Python runs as the node; commands are always ``mesh``'s own.
    """

    def __init__(
        self,
        lab: Lab,
        machine: str,
        directory: Path,
        *,
        model: Path | None = None,
        arguments: Sequence[str] = (),
        role: str = "up",
        api_port: int = 9337,
        bind_port: int = 7842,
        bind_host: str | None = None,
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "mesh.cli"),
    ) -> None:
        self.lab, self.machine, self.role = lab, machine, role
        self.state_dir = directory / machine / "state"
        self.output_path = directory / machine / "output.txt"
        self.output_path.parent.mkdir(parents=True, exist_ok=True)
        self.base_url = f"http://127.0.0.1:{api_port}"
        self.process: subprocess.Popen[Any] | None = None
        self._model, self._arguments, self._bind_host = model, tuple(arguments), bind_host
        self._ports = ("--bind-port", str(bind_port), "--api-port", str(api_port))
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), "MESH_STUN": "none", **(env or {})}
        self._program = tuple(program)
        self._output: IO[bytes] | None = None
        self._client: httpx.Client | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, *, join: str | None = None) -> None:
        """Start the node; with the same state directory as before it is the same node."""
        host = self._bind_host or self.lab.address(self.machine)
        argv = [self.role, "--bind-host", host, "--name", self.machine, *self._ports]
        argv += ["--state-dir", str(self.state_dir), "--plain"]
        if self.role == "up" and self._model is not None:
            argv += ["--model", str(self._model)]
        if join is not None:
            argv += ["--join", join]
        self._output = self.output_path.open("ab")
        self.process = self.lab.popen(
            self.machine,
            [sys.executable, *self._program, *argv, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=self._env,
            cwd=ROOT,
            start_new_session=True,  # an interrupt typed at the bench's terminal is not for it
        )

    def stop(self, within: float = 20.0) -> int:
        """Ctrl-C, as a person would; returns the exit code.

        Raises:
            MeshNodeError: it runs on.
        """
        self.interrupt()
        return self.wait_stopped(within)

    def interrupt(self) -> None:
        """Ctrl-C, without waiting."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)

    def wait_stopped(self, within: float = 20.0) -> int:
        """Wait for the node to exit by itself; returns the exit code.

        Raises:
            MeshNodeError: it runs on.
        """
        assert self.process is not None
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired as error:
            raise MeshNodeError(f"{self.machine} still runs {within:g} s after an interrupt: {self.said()}") from error
        self._close()
        return code

    def kill(self) -> float:
        """SIGKILL the node's own process, not its engine; returns when (``time.monotonic``)."""
        assert self.process is not None
        self.process.kill()
        at = time.monotonic()
        self.process.wait()
        self._close()
        return at

    def kill_engine(self, name: str | None = None) -> float:
        """SIGKILL the node's ``llama-server`` or ``ggml-rpc-server``, or whichever it runs; returns when."""
        pids = self.engine_pids(name)
        if not pids:
            raise MeshNodeError(f"{self.machine} runs no {name or 'engine'}")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    def pause(self) -> None:
        """SIGSTOP the node's own process."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def forget(self) -> None:
        """The process ended by itself."""
        self._close()

    def _close(self) -> None:
        if self._output is not None:
            self._output.close()
        if self._client is not None:
            self._client.close()
        self._output = self._client = self.process = None

    # -- what it says ----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any] | None:
        """``GET /mesh/status``, or None while the API does not answer."""
        try:
            response = self.client.get(f"{self.base_url}/mesh/status", timeout=5)
            return response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    @property
    def client(self) -> httpx.Client:
        """An HTTP client on the node's machine."""
        if self._client is None:
            self._client = self.lab.client(self.machine)
        return self._client

    def wait(self, until: Callable[[dict[str, Any]], Any], within: float, what: str) -> dict[str, Any]:
        """Poll the status until it satisfies ``until``.

        Raises:
            MeshNodeError: not within so many seconds, or the node exited.
        """
        deadline = time.monotonic() + within
        seen: dict[str, Any] | None = None
        while time.monotonic() < deadline:
            if not self.running:
                code = None if self.process is None else self.process.returncode
                raise MeshNodeError(f"{self.machine} exited ({code}) before {what}: {self.said()}")
            seen = self.status() or seen
            if seen is not None and until(seen):
                return seen
            time.sleep(0.02)
        state = None if seen is None else seen.get("mesh")
        raise MeshNodeError(f"{self.machine}: not within {within:g} s: {what}; last state {state}; {self.said()}")

    def wait_serving(self, within: float = 120.0, *, members: int | None = None, after: int = -1) -> dict[str, Any]:
        """Wait until the mesh serves, with so many ``members`` in the ring, in an epoch above ``after``."""

        def serves(status: dict[str, Any]) -> bool:
            layout = status.get("layout")
            return (
                status["mesh"]["state"] == "serving"
                and status["mesh"]["epoch"] > after
                and layout is not None
                and (members is None or len(layout["ring"]) == members)
            )

        return self.wait(serves, within, f"serving with {members or 'any number of'} members after epoch {after}")

    def said(self, lines: int = 12) -> str:
        """The end of what the node printed."""
        with contextlib.suppress(OSError):
            return " / ".join(self.output_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    # -- commands --------------------------------------------------------------------------------------------------

    def command(self, *argv: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """``mesh ARGV... --state-dir`` on this machine."""
        words = self._mesh(*argv, "--state-dir", str(self.state_dir))
        return self.lab.run(self.machine, words, timeout=timeout, env=self._env, cwd=ROOT)

    def invite(self, *, uses: int = 1, role: str = "worker") -> str:
        """A token of this node.

        Raises:
            MeshNodeError: the command failed.
        """
        done = self.command("invite", "--json", "--uses", str(uses), "--role", role)
        if done.returncode != 0:
            raise MeshNodeError(f"mesh invite on {self.machine}: {done.stdout}{done.stderr}")
        return str(json.loads(done.stdout)["token"])

    def engine_pids(self, name: str | None = None) -> list[int]:
        """Engine processes on this machine, orphans among them."""
        found = []
        for pid in self.lab.pids(self.machine):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE and process.name() in ([name] if name else ENGINE_NAMES):
                    found.append(pid)
        return found

    def _mesh(self, *argv: str) -> list[str]:
        return [sys.executable, "-m", "mesh.cli", *argv]


@contextlib.contextmanager
def mesh_of(
    lab: Lab,
    directory: Path,
    machines: Sequence[str],
    *,
    model: Path,
    arguments: Sequence[str] = ("--split", "always", "--no-discovery"),
    within: float = 60.0,
) -> Iterator[dict[str, MeshNode]]:
    """Start a node on every machine and let all join the first; stops them in the end. Does not wait for serving."""
    nodes = {m: MeshNode(lab, m, directory, model=model, arguments=arguments) for m in machines}
    first, *others = nodes.values()
    try:
        first.start()
        first.wait(lambda status: True, within, "an API")
        token = first.invite(uses=max(1, len(others))) if others else None
        for node in others:
            node.start(join=token)
        yield nodes
    finally:
        stop_all(list(nodes.values()))


def stop_all(nodes: Iterable[MeshNode], within: float = 20.0) -> None:
    """Interrupt every running node at once, and kill what does not stop in time."""
    running = [node for node in nodes if node.running]
    for node in running:
        node.interrupt()
    for node in running:
        try:
            node.wait_stopped(within)
        except MeshNodeError:
            node.kill()
