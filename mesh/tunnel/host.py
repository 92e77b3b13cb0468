"""The host's end: one loopback listener per worker, behind which its rpc-server seems to be."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence

from mesh.errors import MeshError, TransportError
from mesh.transport.lane import Stream
from mesh.tunnel.pump import LocalEnd, Traffic, pump
from mesh.wire.facts import NO_EPOCH, Epoch, NodeId
from mesh.wire.messages import OpenPush, OpenRpc

SECRET_BYTES = 32
SECRET_WITHIN_S = 5.0
OPEN_WITHIN_S = 15.0
MAX_STRANGERS = 16
"""Local connections that have not shown the secret yet; more are closed at once."""

OpenBulk = Callable[[NodeId, OpenRpc | OpenPush], Awaitable[Stream]]
"""Opens a stream to a member, says what it is for, and returns it once the other end answered ``Opened``.

Raises a ``MeshError`` when the member cannot be reached or refuses."""


class HostTunnels:
    """Loopback ports that lead to the workers of one epoch at a time.

    Any program of this machine can connect to a loopback port, so a client must first say the epoch's secret, which
    only our own llama-server has. Not a byte reaches a worker before.

    Args:
        open_bulk: the way to the members.
        on_failure: told once per broken or refused tunnel of the current epoch, with what happened.
        request: what the streams are opened with.
    """

    def __init__(
        self,
        open_bulk: OpenBulk,
        *,
        on_failure: Callable[[Epoch, NodeId, str], None] = lambda epoch, worker, reason: None,
        request: Callable[[Epoch], OpenRpc | OpenPush] = OpenRpc,
    ) -> None:
        self.on_failure = on_failure
        self._request = request
        self._open_bulk = open_bulk
        self._epoch = NO_EPOCH
        self._secret = b""
        self._servers: list[asyncio.Server] = []
        self._carrying: dict[asyncio.Task[None], NodeId] = {}
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
            endpoints.append(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        return tuple(endpoints)

    async def close(self) -> None:
        """Close every listener and every connection at once."""
        self._epoch = NO_EPOCH
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
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
            stream = await self._open(epoch, worker)
        except MeshError as error:
            self._failed(epoch, worker, error)
            return
        traffic = self._traffic[worker]
        traffic.connections += 1
        number = traffic.connections
        try:
            await pump(local, stream, traffic, outlives_peer=False)
        except TransportError as error:
            # An rpc-server drops a connection when our engine has made another: only the newest one's end is a loss.
            if number == traffic.connections:
                self._failed(epoch, worker, error)

    def _failed(self, epoch: Epoch, worker: NodeId, error: MeshError) -> None:
        if epoch == self._epoch:
            self.on_failure(epoch, worker, error.message)

    async def _open(self, epoch: Epoch, worker: NodeId) -> Stream:
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                return await self._open_bulk(worker, self._request(epoch))
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
