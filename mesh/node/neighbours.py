"""A running node among the others on its network: it is announced, and its members are looked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mesh.clock import Clock
from mesh.config import Settings
from mesh.discovery.lan import PREFIX_LENGTH as PREFIX
from mesh.discovery.lan import Effect, Hint, Lan, Meshes, Tick, announcement, mesh_tag
from mesh.discovery.mdns import Mdns
from mesh.errors import TransportError
from mesh.node.record import Record
from mesh.notice import Notice, View
from mesh.pump import Pump
from mesh.transport.address import split_address
from mesh.wire.facts import NodeId

MAX_TOLD = 4
"""Other meshes that people are told of: anybody can announce one."""


class Neighbours:
    """Local discovery for one node.

    Args:
        on_hint: a member, by the beginning of its id, may be at these addresses.
        tell_meshes: say which other meshes are here.
    """

    def __init__(
        self,
        settings: Settings,
        me: NodeId,
        record: Record,
        view: View,
        clock: Clock,
        *,
        on_hint: Callable[[str, tuple[str, ...]], None],
        tell_meshes: bool,
    ) -> None:
        self._announced = announcement(me, record.mesh, record.name) if settings.role == "worker" else None
        self._view = view
        self._on_hint = on_hint
        self._tell_meshes = tell_meshes
        self._told: set[str] = set()
        self._lan = Pump(Lan(mesh_tag(record.mesh), me[:PREFIX], ()), self._carry_out, Tick, clock)
        self._mdns: Mdns | None = None

    async def start(self, bound: Sequence[str]) -> None:
        """Begin. What keeps it from working is one line: the mesh goes on without.

        Args:
            bound: ``host:port`` of each of the node's sockets.
        """
        sockets = [split_address(address) for address in bound]
        self._mdns = Mdns([host for host, _ in sockets], sockets[0][1], self._announced, self._lan.feed)
        try:
            await self._mdns.start()
        except TransportError as error:
            self._view.show(Notice("warning", error.message, {"remedy": error.remedy}))

    async def close(self) -> None:
        """Say good-bye to the network."""
        self._lan.stop()
        if self._mdns is not None:
            await self._mdns.close()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Hint(prefix, addresses):
                self._on_hint(prefix, addresses)
            case Meshes(meshes) if self._tell_meshes:
                for name in dict.fromkeys(mesh.name for mesh in meshes):
                    if name not in self._told and len(self._told) < MAX_TOLD:
                        self._told.add(name)
                        text = f'mesh "{name}" is on this network, too; to be part of it: mesh up --join TOKEN'
                        text += ", or mesh leave and then mesh up"
                        self._view.show(Notice("mesh", text, {"mesh_name": name}))
            case _:
                pass
