"""Runs the application on the API port, inside the node's own event loop and without touching its signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from mesh.errors import StateError

BACKLOG = 256
MAX_CONNECTIONS = 1000
KEEP_ALIVE_S = 75
"""Longer than clients keep theirs, so that none sends into a closing connection."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.leave = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The node has its own."""
        yield

    async def main_loop(self) -> None:
        """Wake once a second, for the date header, rather than ten times; and at once to stop."""
        while not self.leave.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.leave.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close idle connections now and the others after their answer; the caller bounds the wait."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections and not self.force_exit:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0.02)


class ApiServer:
    """Listens for clients.

    Args:
        hosts: addresses; an IPv6 one that this machine does not have is passed over if another can be bound.
        port: 0 for any, the same on each address.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], port: int) -> None:
        self._app = app
        self._hosts = tuple(hosts)
        self._asked_port = port
        self._sockets: list[socket.socket] = []
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.port = port
        """The one that was bound."""

    async def start(self) -> list[str]:
        """Bind, listen, and return the addresses, ``host:port``.

        Raises:
            StateError: the port is taken, or an address is not this machine's. Nothing is left open then.
        """
        self._sockets = self._bind()
        config = uvicorn.Config(
            self._app,
            loop="none",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=self._sockets))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise StateError("the API server ended before it began")
            await asyncio.sleep(0)
        return [_written(sock.getsockname()) for sock in self._sockets]

    async def stop(self, within_s: float = 2.0) -> None:
        """Stop listening, let answers under way finish, and cut what is left after ``within_s``. Idempotent."""
        server, task = self._server, self._task
        self._server = self._task = None
        if server is None or task is None:
            return
        server.leave.set()
        await asyncio.wait([task], timeout=within_s)
        server.force_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        answering = [task, *server.server_state.tasks]
        await asyncio.wait(answering, timeout=1.0)
        for late in answering:
            late.cancel()

    def _bind(self) -> list[socket.socket]:
        bound: list[socket.socket] = []
        port = self._asked_port
        try:
            for host in self._hosts:
                sock = _listener(host, port, optional=len(bound) > 0)
                if sock is not None:
                    bound.append(sock)
                    port = sock.getsockname()[1]
        except StateError:
            for sock in bound:
                sock.close()
            raise
        self.port = port
        return bound


def _listener(host: str, port: int, *, optional: bool) -> socket.socket | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = None
    try:
        # asyncio turns Nagle's delay off only where the protocol is spelled out; with it, small answers take 40 ms.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if sys.platform == "win32":  # where SO_REUSEADDR lets any program take the port over
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise StateError(
                f"port {port} on {host}, where the API should answer, is taken or not allowed: {error.strerror}",
                remedy="choose another: --api-port N   (is another node running? mesh status)",
            ) from error
        if optional and family == socket.AF_INET6:
            return None
        raise StateError(
            f"the API cannot listen on {host}: {error.strerror or error}", remedy="name an address of this machine"
        ) from error
    sock.setblocking(False)
    return sock


def _written(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
