"""How a child is started so that it ends with us, however we end.

A :class:`Launcher` starts programs; the system decides how: through a trampoline that asks the kernel (Linux), under a
guard process that watches a pipe (macOS and other POSIX systems), or in a job object (Windows).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from mesh.errors import EngineError
from mesh.supervise.output import Output
from mesh.supervise.ports import listens_on


class Command(Protocol):
    """What to run. ``env`` is added to the environment."""

    @property
    def argv(self) -> Sequence[str]: ...
    @property
    def env(self) -> Mapping[str, str]: ...


class Child(Protocol):
    """A process of ours."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        ...

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines it printed."""
        ...

    def listens_on(self, port: int) -> bool:
        """It, and not some other program, listens on TCP ``port``."""
        ...

    def kill(self) -> None:
        """End it and everything in its group, now. Harmless when it has ended."""
        ...

    async def wait(self) -> int:
        """Its exit code (negative: that signal), once all it printed has been read."""
        ...


class Launcher(Protocol):
    async def launch(
        self, argv: Sequence[str], env: Mapping[str, str], output: Output, book: Callable[[int], None]
    ) -> Child:
        """Start ``argv`` with exactly ``env``.

        ``book`` is called with the pid before the program itself runs. Call from the main thread: on Linux the kernel
        ties a child to the thread that made it.

        Raises:
            EngineError: the program is not there, or the system refused.
        """
        ...


_NOT_INHERITED = ("LLAMA_", "MESH_", "AIP_", "GGML_RPC")
"""Prefixes of variables that would quietly change what llama-server does, or that are not the engine's to know."""


def child_environment(own: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Our environment without what would steer the engine behind our back, plus ``extra``."""
    kept = {name: value for name, value in own.items() if not name.upper().startswith(_NOT_INHERITED)}
    # A failing assertion otherwise starts a debugger to print a backtrace, which delays the exit by seconds.
    return {**kept, "GGML_NO_BACKTRACE": "1", **extra}


def check_program(argv: Sequence[str]) -> None:
    """Raises:
    EngineError: ``argv[0]`` is not a program we may run.
    """
    program = Path(argv[0])
    if not program.is_file() or not os.access(program, os.X_OK):
        raise EngineError(f"the engine's {program.name} is not at {program}", remedy="build it with: mesh engine build")


class PipedChild(asyncio.SubprocessProtocol):
    """The part of a child that is the same everywhere: its pipes and its end."""

    EXIT_GRACE_S = 0.5
    """How long to read on after the exit, should a grandchild still hold the pipes."""

    is_guarded = False
    """The process we know is a guard, and the engine its child."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._grace: asyncio.TimerHandle | None = None
        self._exit_code: int | None = None
        self.transport: asyncio.SubprocessTransport | None = None

    @property
    def pid(self) -> int:
        assert self.transport is not None
        pid = self.transport.get_pid()
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        return self._exit_code

    @property
    def tail(self) -> tuple[str, ...]:
        return self._output.tail

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def listens_on(self, port: int) -> bool:
        return self._exit_code is None and listens_on(self.pid, port, children=self.is_guarded)

    def kill(self) -> None:
        raise NotImplementedError

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.SubprocessTransport, transport)
        self.transport = transport

    def pipe_data_received(self, fd: int, data: bytes | str) -> None:
        assert isinstance(data, bytes)
        self._output.feed(fd, data)

    def process_exited(self) -> None:
        assert self.transport is not None
        code = self.transport.get_returncode()
        self._exit_code = -1 if code is None else code
        self._grace = self._loop.call_later(self.EXIT_GRACE_S, self._finish)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
        if not self._ended.done():
            self._output.end()
            self._ended.set_result(-1 if self._exit_code is None else self._exit_code)
            if self.transport is not None:
                self.transport.close()


def system_launcher() -> Launcher:
    """The one for this system."""
    if sys.platform == "win32":
        from mesh.supervise.windows import WindowsLauncher

        return WindowsLauncher()
    from mesh.supervise.posix import PosixLauncher

    return PosixLauncher()
