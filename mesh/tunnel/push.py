"""From each worker straight to the next one in the ring: what one has computed need not pass through the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from mesh.transport.lane import Stream
from mesh.tunnel.handover import Doors
from mesh.tunnel.host import HostTunnels, OpenBulk
from mesh.tunnel.member import Endpoint, WorkerTunnel
from mesh.tunnel.pump import Traffic
from mesh.wire.facts import Epoch, NodeId
from mesh.wire.messages import OpenPush

log = logging.getLogger(__name__)


class PushTunnels:
    """Both ends at one worker: a loopback port that leads to its successor, and what its predecessor asks for.

    Nothing that fails here is a failure of the layout: the engine finds out before its first graph and goes through the
    host, or later by the end of its connection.

    Args:
        open_bulk: the way to the members.
        endpoint: our rpc-server of an epoch; None when that epoch is not, or no longer, the one we run.
        may_push: the peer is right before us in the ring of the epoch, and the epoch is the newest we know (fencing).
        doors: where our rpc-server asks for a connection of its own, and is given one.
    """

    def __init__(
        self,
        open_bulk: OpenBulk,
        endpoint: Callable[[Epoch], Endpoint | None],
        may_push: Callable[[NodeId, Epoch], bool],
        doors: Doors | None = None,
    ) -> None:
        ours, given = (None, None) if doors is None else (doors.of_pushes, doors.of_server)
        self._out = HostTunnels(open_bulk, on_failure=_note, request=OpenPush, door=ours)
        self._in = WorkerTunnel(endpoint, may_push, door=given)

    @property
    def traffic(self) -> Mapping[NodeId, Traffic]:
        """Bytes and connections to the successor, of the current epoch or the last there was."""
        return self._out.traffic

    async def open(self, epoch: Epoch, successor: NodeId, secret: bytes) -> str:
        """Listen for our own rpc-server, which first says ``secret``; whatever was open before is closed.

        Returns:
            ``127.0.0.1:port`` that leads to the successor's rpc-server.

        Raises:
            TransportError: the system gave no port.
        """
        (endpoint,) = await self._out.open(epoch, (successor,), secret)
        return endpoint

    async def serve(self, peer: NodeId, request: OpenPush, stream: Stream) -> None:
        """Answer ``request``, then carry until either side ends. Never raises for what the peer or the engine does."""
        await self._in.serve(peer, request, stream)

    def drop(self, member: NodeId) -> None:
        """``member`` is dead: close what leads to it or comes from it, before its connection has noticed."""
        self._out.drop(member)
        self._in.drop(member)

    async def close(self) -> None:
        """Close both ends at once."""
        self._in.close()
        await self._out.close()


def _note(epoch: Epoch, successor: NodeId, reason: str) -> None:
    log.warning("no way to push to %s in epoch %d: %s", successor, epoch.number, reason)
