"""What one connection asks of the endpoint that it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.transport.connection import PeerConnection


class Router:
    """What a connection needs of its endpoint; replaced whole by the endpoint."""

    def learn_cid(self, cid: bytes, connection: PeerConnection) -> None:
        raise NotImplementedError

    def forget_cid(self, cid: bytes) -> None:
        raise NotImplementedError

    def ready(self, connection: PeerConnection) -> None:
        """The handshake is done and the peer's key is known."""
        raise NotImplementedError

    def gone(self, connection: PeerConnection) -> None:
        """Nothing will be sent or received any more."""
        raise NotImplementedError
