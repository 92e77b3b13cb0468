"""Ephemeral loopback ports: picked free, then handed to a child that may find them taken."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import psutil

from mesh.errors import EngineError

if TYPE_CHECKING:
    from mesh.supervise.launch import Child

LOOPBACK = "127.0.0.1"
ATTEMPTS = 5
_LOST_RACE = re.compile(r"\bbind\b|address already in use|failed to create server socket", re.I)
"""What the engine's programs print when another program was faster, which may have let go of the port since."""


class EarlyExitError(Exception):
    """The child ended before it listened, and not for want of its port."""

    def __init__(self, code: int, tail: tuple[str, ...]) -> None:
        super().__init__(f"exit code {code}")
        self.code = code
        self.tail = tail


def free_port() -> int:
    """A loopback port nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def is_taken(port: int) -> bool:
    """Somebody else has ``port``: it cannot be bound."""
    with socket.socket() as probe:
        # As the engine binds: connections that linger after an exit do not make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error.errno in (errno.EADDRINUSE, errno.EACCES)
        return False


def listens_on(pid: int, port: int, *, children: bool = False) -> bool:
    """``pid`` (or, with ``children``, a child of it) listens on TCP ``port``.

    Asks the system who owns the socket, so nobody else's listener is taken for ours, and the engine never sees a
    connection that says nothing.
    """
    try:
        process = psutil.Process(pid)
        for owner in (process, *(process.children() if children else ())):
            for connection in owner.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    except psutil.Error:
        return False
    return False


async def listening(child: Child, port: int, *, every: float = 0.02) -> None:
    """Wait until ``child`` listens on ``port``. No deadline of its own: cancel it.

    Raises:
        EarlyExitError: it ended first.
    """
    ended = asyncio.ensure_future(child.wait())
    try:
        while not child.listens_on(port):
            done, _ = await asyncio.wait({ended}, timeout=every)
            if done:
                raise EarlyExitError(ended.result(), child.tail)
            every = min(every * 1.2, 0.25)
    finally:
        ended.cancel()


async def start_on_free_port(
    launch: Callable[[int], Awaitable[Child]],
    *,
    pick: Callable[[], int] = free_port,
    attempts: int = ATTEMPTS,
) -> tuple[Child, int]:
    """Launch a child on a port it can have, trying others when another program was faster.

    Raises:
        EarlyExitError: the child ended for another reason.
        EngineError: every port was taken by the time the child came to it.
    """
    for _ in range(attempts):
        port = pick()
        child = await launch(port)
        try:
            await listening(child, port)
        except EarlyExitError as early:
            if not is_taken(port) and not any(_LOST_RACE.search(line) for line in early.tail):
                raise
            continue
        return child, port
    raise EngineError(
        f"{attempts} ports in a row were taken by other programs before the engine could listen",
        remedy="see which program opens so many ports on 127.0.0.1",
    )
