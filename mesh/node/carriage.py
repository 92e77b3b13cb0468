"""Where streams of the mesh lead on this node: into its engine, and from its engine to other members."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from mesh.election.core import Election
from mesh.node.underway import UnderWay
from mesh.supervise.runner import RpcEndpoint
from mesh.transport.lane import Stream
from mesh.tunnel.handover import Doors
from mesh.tunnel.host import HostTunnels, OpenBulk
from mesh.tunnel.member import HttpTunnel, WorkerTunnel
from mesh.tunnel.push import PushTunnels
from mesh.wire.facts import NO_EPOCH, Epoch, NodeId
from mesh.wire.messages import Open, OpenHttp, OpenPush, OpenRpc


class Engine(Protocol):
    """The ports of what runs here, by the number it was started under."""

    def rpc_endpoint(self, epoch: Epoch) -> RpcEndpoint | None: ...
    def http_port(self, epoch: Epoch) -> int | None: ...


class Carriage:
    """All tunnels of one node.

    Args:
        open_bulk: a stream to a member, for what the message says.
        election: says who may be carried for.
        engine: asked when a stream comes, not before.
        doors: where our engine asks for connections of its own, and is given them.
    """

    def __init__(
        self,
        me: NodeId,
        open_bulk: OpenBulk,
        election: Election,
        engine: Callable[[], Engine],
        doors: Doors | None,
    ) -> None:
        self.launched: Epoch = NO_EPOCH
        """The number under which the engine was started; a layout may go on under newer ones."""
        self.to_workers = HostTunnels(open_bulk, door=None if doors is None else doors.of_host)
        given = None if doors is None else doors.of_server
        self.from_host = WorkerTunnel(self._rpc_endpoint, election.may_carry, door=given)
        self.pushes = PushTunnels(open_bulk, self._rpc_endpoint, election.may_push, doors)
        self._http = HttpTunnel(self._http_port)
        self.under_way = UnderWay(self._http)
        self._me = me
        self._open_bulk = open_bulk
        self._election = election
        self._engine = engine

    def engine_epoch(self, epoch: Epoch) -> Epoch:
        """The number of ``epoch`` that the engine knows."""
        return self.launched if self._election.covers(epoch) else epoch

    def accept(self, peer: NodeId, request: Open, stream: Stream) -> Coroutine[Any, Any, None] | None:
        """What carries a stream that ``peer`` opened; None when it is of no kind that is carried."""
        match request:
            case OpenRpc():
                return self.from_host.serve(peer, request, stream)
            case OpenPush():
                return self.pushes.serve(peer, request, stream)
            case OpenHttp():
                return self._http.serve(peer, request, stream)
            case _:
                return None

    async def open_server(self, host: NodeId, epoch: Epoch) -> Stream:
        """A connection to the llama-server that answers for ``epoch``, here or at another member.

        Raises:
            MeshError: there is no way to it.
        """
        if host == self._me:
            return await self.under_way.open(self._http_port(epoch) or 0)
        newest = self._election.epoch if self._election.covers(epoch) else epoch
        return await self._open_bulk(host, OpenHttp(newest))

    def drop(self, member: NodeId) -> None:
        """``member`` is dead: close what leads to it, before its connections have noticed."""
        self.to_workers.drop(member)
        self.pushes.drop(member)

    def close(self) -> None:
        """Close what leads to the server."""
        self._http.close()

    def _rpc_endpoint(self, epoch: Epoch) -> RpcEndpoint | None:
        return self._engine().rpc_endpoint(self.engine_epoch(epoch))

    def _http_port(self, epoch: Epoch) -> int | None:
        return self._engine().http_port(self.engine_epoch(epoch))
