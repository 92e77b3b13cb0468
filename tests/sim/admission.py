"""Keys, disks, and the door of one simulated node: real invites, grants and revocations over a simulated connection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from mesh.errors import AdmissionError
from mesh.identity.grants import Roster, sign_grant
from mesh.identity.invite import InviteBook, _Pages
from mesh.identity.key import NodeKey, node_id, signed_by
from mesh.membership.callbacks import Callbacks
from mesh.membership.door import Admitted, answer_join, weigh_hello
from mesh.membership.expulsion import Expulsion
from mesh.membership.join import accept
from mesh.membership.rights import may_say
from mesh.node.record import Record, found, from_join
from mesh.wire.facts import NodeId, Role
from mesh.wire.messages import PROTOCOL, Control, Hello, Join, Joined, Members, Refused, Revoke
from tests.sim.fakes import node_id as letters_of

if TYPE_CHECKING:
    from tests.sim.node import Node

WALL = 1_800_000_000.0
"""Seconds since 1970 when a simulation begins, by a clock that is right."""


@lru_cache(maxsize=64)
def key_of(index: int) -> NodeKey:
    """A key whose id begins with the ``index``-th letter, so that stories can be read."""
    letter = letters_of(index)[0]
    tries = (NodeKey.from_seed(f"{index:8}{n:24}".encode()) for n in range(10_000))
    return next(key for key in tries if key.id[0] == letter)


_sign = lru_cache(maxsize=4096)(sign_grant)
_checked = lru_cache(maxsize=65536)(signed_by)


@contextlib.contextmanager
def signatures_checked_once() -> Iterator[None]:
    """Checking one signature twice says nothing new, and costs more than all else in a simulation."""
    with mock.patch("mesh.identity.grants.signed_by", _checked):
        yield


@dataclass
class Disk:
    """What outlives the process of a node."""

    key: NodeKey
    record: Record | None = None
    invites: _Pages = field(default_factory=lambda: _Pages([]))
    wrote: Callable[[], None] = lambda: None
    """Called after every write: the process may die right there."""


class DiskBook(InviteBook):
    """The real book; its file is a :class:`Disk`."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(None)
        self._disk = disk
        self._pages = disk.invites

    def _write(self, entries: list[Any]) -> None:
        self._pages = self._disk.invites = _Pages(entries)
        self._disk.wrote()


@dataclass(eq=False)
class Token:
    """An invite, as the world counts it: whoever was let in by it, without a look into the book."""

    secret: bytes
    inviter: NodeId
    mesh: NodeId
    uses: int
    role: Role
    admitted: set[NodeId] = field(default_factory=set)
    tries: int = 0

    @property
    def is_spent(self) -> bool:
        return len(self.admitted) >= self.uses


def founded(disk: Disk, others: list[tuple[Disk, Role]]) -> None:
    """A mesh of ``disk``'s node, which has let in ``others`` before the simulation begins."""
    record = found(disk.key, "sim", WALL - 1000)
    invited = [
        _sign(disk.key, mesh=record.mesh, subject=other.key.public, role=role, wall=WALL - 900)
        for other, role in others
    ]
    members = Record(record.mesh, record.name, record.founder, (*record.grants, *invited))
    for one in (disk, *(other for other, _ in others)):
        one.record = members


class House:
    """The door of one run of a node: whom it greets, whom it looks for, and what it says of both.

    Mirrors :class:`mesh.membership.links.Links` where that is bound to real connections; decisions are the real ones.
    """

    def __init__(self, node: Node, record: Record) -> None:
        self.node = node
        self.record = record
        self.roster: Roster = record.roster()
        self.book = node.world.parts.book(node.disk) if node.facts.role == "worker" else None
        self._roles: dict[NodeId, Role] = {}
        self._forgotten: set[NodeId] = set()
        self._learn()
        tell = Callbacks(
            lambda peer, facts, connection: None,
            lambda peer, reason: None,
            lambda peer, message: None,
            lambda peer, request, stream: None,
            on_roster_changed=self.save,
            on_expelled=self._expelled,
        )
        self.expulsion = Expulsion(self, node.disk.key, self.roster, node, tell)  # type: ignore[arg-type]

    # -- of the node ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self._learn()
        disk = self.node.disk
        assert disk.record is not None
        disk.record = disk.record.grown(self.roster, ())
        disk.wrote()

    def _learn(self) -> None:
        wall = self.node.wall()
        keys = {node_id(key): key for key in self.roster.subjects()}
        self.keys = keys
        self.wanted = tuple(
            node for node, key in keys.items() if node != self.node.id and self.roster.role_of(key, wall) is not None
        )

    def hello(self) -> Hello:
        chain = self.roster.chain(self.node.disk.key.public, self.node.wall())
        return Hello(PROTOCOL, self.roster.mesh, chain, self.roster.revocations, self.node.facts)

    def greets(self, hello: Hello, key: bytes) -> Admitted | Refused:
        verdict = weigh_hello(hello, key, self.roster, self.node.wall())
        if len(self.roster.subjects()) != len(self.keys):
            self._learn()  # also when no link comes of this greeting
        return verdict

    def admit(self, peer: NodeId, verdict: Admitted) -> None:
        """A link to ``peer`` is up."""
        self._roles[peer] = verdict.role
        self.node.send(peer, Members((), self.roster.grants))
        if verdict.changed:
            self.save()
            chain = self.roster.chain(self.keys.get(peer, b""), self.node.wall())
            self.broadcast(Members((), chain), but=peer)

    def admitted(self, peer: NodeId, verdict: Admitted) -> None:
        """... and the cores know of it."""
        if verdict.changed:
            self.expulsion.review(peer)

    def received(self, peer: NodeId, message: Control) -> bool:
        """Whether ``message`` is for the cores; what is about admission is dealt with here."""
        if isinstance(message, Members):
            if self.roster.add(message.grants, self.node.wall(), vouched=self._roles.get(peer) == "worker"):
                self.save()
                self.broadcast(message, but=peer)
            return False
        if isinstance(message, Revoke):
            self.expulsion.take(message.revocation, peer)
            return False
        return may_say(self._roles.get(peer, "client"), peer, message)

    def answer_join(self, join: Join, joiner: bytes) -> Joined | Refused:
        answer = answer_join(
            join,
            joiner,
            key=self.node.disk.key,
            roster=self.roster,
            book=self.book,
            mesh_name="sim",
            members=(),
            wall=self.node.wall(),
        )
        if isinstance(answer, Joined):
            self.save()
            self.broadcast(Members((), answer.grants))
        return answer

    # -- of those who show out (see expulsion.House) -------------------------------------------------------------------

    def peers(self) -> Mapping[NodeId, Any]:
        linked = [peer for node, peer in self.node.world.network.link if node == self.node.id]
        return {
            peer: SimpleNamespace(
                peer=peer, role=self._roles[peer], connection=SimpleNamespace(peer_key=self.keys.get(peer, b""))
            )
            for peer in linked
        }

    def broadcast(self, message: Control, *, but: NodeId | None = None) -> None:
        self.node.broadcast(message, but=but)

    def forget(self, node: NodeId) -> None:
        self._learn()

    def show_out(self, link: Any, reason: str) -> None:
        self.node.world.clock.after(0.02, self.node.show_out, link.peer, reason, self.node.boots)

    def _expelled(self, teller: NodeId, refused: Refused) -> None:
        self.node.expelled(refused.message)


def let_in(disk: Disk, answer: object, mesh: NodeId, wall: float) -> str:
    """What a joiner makes of the answer; why it is not in, or nothing."""
    connection = SimpleNamespace(address="", peer="")
    try:
        joined = accept(answer, mesh, connection, disk.key.public, wall)  # type: ignore[arg-type]
        disk.record = from_join(joined, disk.record)
    except AdmissionError as error:
        return error.code
    return ""
