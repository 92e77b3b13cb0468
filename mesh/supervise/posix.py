"""Children that die with us on Linux, macOS and other POSIX systems."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mesh.errors import EngineError
from mesh.supervise.launch import PipedChild, check_program
from mesh.supervise.output import Output

_ROOM = Path(__file__).parent
TRAMPOLINE = _ROOM / "trampoline.py"
GUARD = _ROOM / "guard.py"


class PosixChild(PipedChild):
    """Leads a session, and so a process group, of its own."""

    def __init__(self, output: Output, *, is_guarded: bool) -> None:
        super().__init__(output)
        self.is_guarded = is_guarded

    def kill(self) -> None:
        if self._exit_code is None and self.transport is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class PosixLauncher:
    """Starts programs through a small Python script that ties them to us.

    Args:
        script: the trampoline (the kernel does the tying; Linux) or the guard (a process does; everywhere).
    """

    def __init__(self, script: Path | None = None) -> None:
        self._script = script or (TRAMPOLINE if sys.platform == "linux" else GUARD)

    async def launch(
        self, argv: Sequence[str], env: Mapping[str, str], output: Output, book: Callable[[int], None]
    ) -> PosixChild:
        check_program(argv)
        loop = asyncio.get_running_loop()
        try:
            transport, child = await loop.subprocess_exec(
                lambda: PosixChild(output, is_guarded=self._script == GUARD),
                *(sys.executable, "-I", "-S", str(self._script), str(os.getpid()), *argv),
                env=env,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"cannot start {argv[0]}: {error.strerror}") from error
        try:
            book(child.pid)
        except BaseException:
            child.kill()
            await child.wait()
            raise
        # Until this byte nothing of the engine runs. The pipe stays open: for the guard, its end is our end.
        stdin = transport.get_pipe_transport(0)
        assert isinstance(stdin, asyncio.WriteTransport)
        stdin.write(b"\n")
        return child
