"""The host's end: one loopback listener per worker, behind which its rpc-server seems to be."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from mesh.errors import MeshError, TransportError
from mesh.supervise.priority import priority
from mesh.transport.lane import Stream
from mesh.transport.tcpstream import TcpStream
from mesh.tunnel.handover import KEYS_BYTES, YES, Giving, Line, hand_over
from mesh.tunnel.pump import LocalEnd, Traffic, pump
from mesh.wire.facts import NO_EPOCH, Epoch, NodeId
from mesh.wire.messages import Open, Opened, OpenPush, OpenRpc

log = logging.getLogger(__name__)

SECRET_BYTES = 32
SECRET_WITHIN_S = 5.0
_PORT_BYTES = 2
OPEN_WITHIN_S = 15.0
MAX_STRANGERS = 16
"""Local connections that have not shown the secret yet; more are closed at once."""


class OpenBulk(Protocol):
    """Opens a stream to a member, says what it is for, and returns it once the other end answered ``Opened``, which
    ``heard`` is told.

    Raises a ``MeshError`` when the member cannot be reached or refuses."""

    async def __call__(self, member: NodeId, request: Open, /, *, heard: Callable[[Opened], None] = ...) -> Stream: ...


class HostTunnels:
    """Loopback ports that lead to the workers of one epoch at a time.

    Any program of this machine can connect to a loopback port, so a client must first say the epoch's secret, which
    only our own llama-server has. Not a byte reaches a worker before.

    Args:
        open_bulk: the way to the members.
        on_failure: told once per broken or refused tunnel of the current epoch, with what happened.
        request: what the streams are opened with.
        door: where our engine asks for connections that it carries on by itself; None: all go through the ports.
    """

    def __init__(
        self,
        open_bulk: OpenBulk,
        *,
        on_failure: Callable[[Epoch, NodeId, str], None] = lambda epoch, worker, reason: None,
        request: Callable[[Epoch], OpenRpc | OpenPush] = OpenRpc,
        door: Path | None = None,
    ) -> None:
        self.on_failure = on_failure
        self._request = request
        self._open_bulk = open_bulk
        self._epoch = NO_EPOCH
        self._secret = b""
        self._servers: list[asyncio.Server] = []
        self._carrying: dict[asyncio.Task[None], NodeId] = {}
        self._giving = None if door is None else Giving(door, self._asked)
        self._behind: dict[int, NodeId] = {}
        """Who is behind each port."""
        self._opened: dict[NodeId, Stream] = {}
        """What was opened for an engine that then has to use the port."""
        self._strangers = 0
        self._traffic: dict[NodeId, Traffic] = {}

    @property
    def traffic(self) -> Mapping[NodeId, Traffic]:
        """Bytes and connections per worker, of the current epoch or the last there was. ``up``: to the worker."""
        return self._traffic

    async def open(self, epoch: Epoch, workers: Sequence[NodeId], secret: bytes) -> tuple[str, ...]:
        """Listen for each worker; whatever was open before is closed.

        Args:
            secret: the 32 bytes each local client must send first.

        Returns:
            ``127.0.0.1:port`` for each of ``workers``, in their order.

        Raises:
            TransportError: the system gave no port.
        """
        await self.close()
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes, not {SECRET_BYTES}")
        self._epoch, self._secret = epoch, secret
        self._traffic = {worker: Traffic() for worker in workers}
        endpoints = []
        for worker in workers:
            try:
                server = await self._listen(epoch, worker)
            except OSError as error:
                await self.close()
                raise TransportError(f"no loopback port for a tunnel: {error.strerror}") from error
            self._servers.append(server)
            port = server.sockets[0].getsockname()[1]
            self._behind[port] = worker
            endpoints.append(f"127.0.0.1:{port}")
        if self._giving is not None:
            try:
                self._giving.open()
            except OSError as error:  # the ports do
                log.warning("the engine's connections go through this process: %s", error)
        return tuple(endpoints)

    async def close(self) -> None:
        """Close every listener and every connection at once."""
        self._epoch = NO_EPOCH
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        self._behind.clear()
        if self._giving is not None:
            self._giving.close()
        opened, self._opened = self._opened, {}
        for stream in opened.values():
            stream.abort()
        tasks = [*self._carrying]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drop(self, worker: NodeId) -> None:
        """``worker`` is dead: close what leads to it now, before its connection has noticed."""
        for task, to in self._carrying.items():
            if to == worker:
                task.cancel()

    async def _listen(self, epoch: Epoch, worker: NodeId) -> asyncio.Server:
        def accepted() -> LocalEnd:
            local = LocalEnd()
            task = asyncio.ensure_future(self._carry(epoch, worker, local))
            self._carrying[task] = worker
            task.add_done_callback(lambda task: self._carrying.pop(task, None))
            # Not in a finally: a task cancelled before its first step runs none.
            task.add_done_callback(lambda task: local.abort())
            return local

        return await asyncio.get_running_loop().create_server(accepted, "127.0.0.1", 0)

    async def _carry(self, epoch: Epoch, worker: NodeId, local: LocalEnd) -> None:
        try:
            if epoch != self._epoch or not await self._is_ours(local):
                return
            stream = self._opened.pop(worker, None) or await self._open(epoch, worker, self._request(epoch))
        except MeshError as error:
            self._failed(epoch, worker, error)
            return
        traffic = self._traffic[worker]
        with priority.urgent():
            await self._until_end(epoch, worker, pump(local, stream, traffic, outlives_peer=False))

    async def _until_end(self, epoch: Epoch, worker: NodeId, carried: Coroutine[Any, Any, None]) -> None:
        traffic = self._traffic[worker]
        traffic.connections += 1
        number = traffic.connections
        try:
            await carried
        except TransportError as error:
            # An rpc-server drops a connection when our engine has made another: only the newest one's end is a loss.
            if number == traffic.connections:
                self._failed(epoch, worker, error)

    # -- connections that our engine carries on by itself --------------------------------------------------------------

    def _asked(self, line: Line) -> None:
        task = asyncio.ensure_future(self._answer(self._epoch, line))
        self._carrying[task] = ""  # it has not said for whom
        task.add_done_callback(lambda task: self._carrying.pop(task, None))
        task.add_done_callback(lambda task: line.close())

    async def _answer(self, epoch: Epoch, line: Line) -> None:
        try:
            async with asyncio.timeout(SECRET_WITHIN_S):
                said = await line.read_exactly(SECRET_BYTES + _PORT_BYTES)
        except (TimeoutError, EOFError, OSError):
            return
        worker = self._behind.get(int.from_bytes(said[SECRET_BYTES:], "little"))
        if epoch != self._epoch or worker is None or not hmac.compare_digest(said[:SECRET_BYTES], self._secret):
            return
        task = asyncio.current_task()
        assert task is not None
        self._carrying[task] = worker
        heard: list[Opened] = []
        try:
            request = msgspec.structs.replace(self._request(epoch), sealed=True)
            stream = await self._open(epoch, worker, request, heard.append)
        except MeshError as error:
            self._failed(epoch, worker, error)
            return
        keys = heard[-1].seal if heard else b""
        if isinstance(stream, TcpStream) and len(keys) == KEYS_BYTES:
            await self._until_end(epoch, worker, hand_over(line, stream, YES + keys))
        else:
            unused = self._opened.pop(worker, None)
            if unused is not None:
                unused.abort()
            self._opened[worker] = stream
            line.refuse()

    def _failed(self, epoch: Epoch, worker: NodeId, error: MeshError) -> None:
        if epoch == self._epoch:
            self.on_failure(epoch, worker, error.message)

    async def _open(
        self,
        epoch: Epoch,
        worker: NodeId,
        request: OpenRpc | OpenPush,
        heard: Callable[[Opened], None] = lambda opened: None,
    ) -> Stream:
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                return await self._open_bulk(worker, request, heard=heard)
        except TimeoutError as error:
            raise TransportError(f"no answer within {OPEN_WITHIN_S:.0f} s") from error

    async def _is_ours(self, local: LocalEnd) -> bool:
        if self._strangers >= MAX_STRANGERS:
            return False
        self._strangers += 1
        try:
            async with asyncio.timeout(SECRET_WITHIN_S):
                said = await local.read_exactly(SECRET_BYTES)
        except (TimeoutError, EOFError, OSError):
            return False
        finally:
            self._strangers -= 1
        return hmac.compare_digest(said, self._secret)
