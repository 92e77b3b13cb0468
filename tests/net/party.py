"""Nodes on 127.0.0.1: an endpoint, a roster and links each, with everything that happens written down."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from mesh.clock import SystemClock
from mesh.errors import TransportError
from mesh.identity.grants import Roster, found_mesh, sign_grant
from mesh.identity.invite import Invite, InviteBook, create_invite
from mesh.identity.key import NodeKey
from mesh.membership.links import Callbacks, Links
from mesh.membership.requests import Request
from mesh.transport.address import split_address
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Connection, Stream
from mesh.transport.tcp import TcpLane
from mesh.wire.facts import NodeFacts, NodeId, Role
from mesh.wire.messages import Control, Grant, MemberAddress, Open, Refused


def facts_of(
    key: NodeKey, name: str, role: Role = "worker", addresses: tuple[str, ...] = (), *, tcp: bool = False
) -> NodeFacts:
    return NodeFacts(
        id=key.id, version=1, name=name, role=role, mesh_version="0", engine="", backend="cpu", devices=(),
        budget_bytes=0, threads=1, models=(), wants="", addresses=addresses, tcp=tcp,
        pairs=role == "worker", crosses=True,
    )  # fmt: skip


@dataclass
class Node:
    """One node and its diary."""

    name: str
    key: NodeKey
    roster: Roster
    book: InviteBook
    role: Role = "worker"
    members: tuple[MemberAddress, ...] = ()
    mesh_name: str = "home"
    address: str = ""
    ups: list[NodeId] = field(default_factory=list)
    downs: list[tuple[NodeId, str]] = field(default_factory=list)
    messages: list[tuple[NodeId, Control]] = field(default_factory=list)
    bulk: list[tuple[NodeId, Open, Stream]] = field(default_factory=list)
    expelled: list[Refused] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    saves: int = 0
    seen: list[tuple[NodeId, str]] = field(default_factory=list)
    listens_over_tcp: bool = True
    relay_rate: int = 0

    async def start(self, port: int = 0) -> Node:
        self.tcp = TcpLane(self.key)
        while True:
            self.endpoint = Endpoint(self.key, SystemClock(), on_connection=self._accept)
            [self.address] = await self.endpoint.start([("127.0.0.1", port)])
            try:
                if self.listens_over_tcp:
                    await self.tcp.start([split_address(self.address)])
                break
            except TransportError:
                if port:
                    break
                await self.endpoint.close()  # a free UDP port may be somebody's TCP port
        self.links = Links(
            self.endpoint,
            self.key,
            self.roster,
            SystemClock(),
            Callbacks(
                on_up=lambda peer, facts, connection: self.ups.append(peer),
                on_down=lambda peer, reason: self.downs.append((peer, reason)),
                on_message=lambda peer, message: self.messages.append((peer, message)),
                on_bulk=lambda peer, request, stream: self.bulk.append((peer, request, stream)),
                on_roster_changed=self._save,
                on_expelled=lambda peer, refused: self.expelled.append(refused),
                on_seen=lambda peer, address: self.seen.append((peer, address)),
                on_asked=self.asked.append,
            ),
            facts=lambda: facts_of(self.key, self.name, self.role, (self.address,), tcp=self.tcp.listening),
            members=self.members,
            mesh_name=self.mesh_name,
            invites=self.book if self.role == "worker" else None,
            tcp=self.tcp,
            relay_rate=self.relay_rate,
            random=lambda: 0.5,
        )
        self.links.start()
        return self

    def _accept(self, connection: Connection) -> None:
        self.links.accept(connection)

    def _save(self) -> None:
        self.saves += 1

    async def stop(self, reason: str = "the test is over") -> None:
        await self.links.close(reason)
        await self.endpoint.close()
        await self.tcp.close()

    async def vanish(self) -> int:
        """Die without a word; returns the port that was used."""
        for udp in self.endpoint._sockets:
            port = int(udp.address[1])
            udp.close()
        await self.tcp.close()
        await self.links.close("")
        await self.endpoint.close()
        return port

    def where(self) -> MemberAddress:
        return MemberAddress(self.key.id, self.name, (self.address,))

    def invite(
        self, *, uses: int = 1, role: Role = "worker", lifetime_s: float = 60, wall: float | None = None
    ) -> Invite:
        return create_invite(
            self.book,
            mesh=self.roster.mesh,
            inviter=self.key.public,
            addresses=(self.address,),
            randomness=secrets.token_bytes,
            wall=SystemClock().wall() if wall is None else wall,
            lifetime_s=lifetime_s,
            uses=uses,
            role=role,
        )


class Party:
    """Founds a mesh, and makes nodes of it or strangers to it."""

    def __init__(self) -> None:
        self.wall = SystemClock().wall()
        self.founder = NodeKey.generate()
        self.grants: list[Grant] = [found_mesh(self.founder, self.wall)]
        self.nodes: list[Node] = []

    def member_key(self, role: Role = "worker") -> NodeKey:
        key = NodeKey.generate()
        self.grants.append(
            sign_grant(self.founder, mesh=self.founder.id, subject=key.public, role=role, wall=self.wall)
        )
        return key

    async def node(
        self,
        name: str,
        key: NodeKey | None = None,
        *,
        role: Role = "worker",
        knows: tuple[Node, ...] = (),
        port: int = 0,
        grants: list[Grant] | None = None,
        tcp: bool = True,
        relay_rate: int = 0,
    ) -> Node:
        key = key or self.member_key(role)
        roster = Roster(self.founder.id, self.founder.public, self.grants if grants is None else grants)
        node = Node(name, key, roster, InviteBook(None), role=role, members=tuple(other.where() for other in knows))
        node.listens_over_tcp = tcp
        node.relay_rate = relay_rate
        self.nodes.append(node)
        return await node.start(port)

    async def lane(self, key: NodeKey | None = None) -> Endpoint:
        """A bare endpoint that belongs to nobody."""
        endpoint = Endpoint(key or NodeKey.generate(), SystemClock(), on_connection=lambda connection: None)
        await endpoint.start([("127.0.0.1", 0)])
        return endpoint

    async def over(self) -> None:
        await asyncio.gather(*(node.stop() for node in self.nodes))
