"""Who is let in. Pure: decisions over a peer's proven key, what it says, and what we hold; no IO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mesh.errors import AdmissionError
from mesh.identity.grants import Roster, sign_grant
from mesh.identity.invite import InviteBook
from mesh.identity.key import NodeKey, node_id
from mesh.wire.facts import NodeId, Role
from mesh.wire.messages import PROTOCOL, Hello, Join, Joined, MemberAddress, Refused

MAX_CHAIN = 64
"""Grants a Hello may carry: each costs a signature check before we know whom we talk to."""
MAX_MEMBERS = 128
"""Everybody watches everybody: past this a crash is noticed too late, and what members say of each other when one joins
is tens of megabytes. Nobody is let in beyond it; whoever is in stays."""
FRESH_S = 3.0
"""How long two nodes that dialed each other at once may take to find out."""

REMEDIES = {
    "expired": "ask for a new one:  mesh invite",
    "spent": "ask for a new one:  mesh invite   (or one for several machines:  mesh invite --uses N)",
    "unknown": "ask for a new one:  mesh invite",
    "protocol": "update mesh on both machines:  git pull",
    "not-a-member": "join first:  on a machine of the mesh  mesh invite,  here  mesh up --join TOKEN",
    "revoked": "somebody ran `mesh revoke` for this machine; ask for a new invite",
    "full": "revoke members that are gone for good (mesh status, mesh revoke NODE), or found a second mesh",
    "too-many": "wait a minute and try again",
}
"""What to do about each code of :class:`Refused`."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The peer is a member and may take part as ``role``; ``changed``: our roster learned something."""

    role: Role
    changed: bool


def weigh_hello(hello: Hello, peer_key: bytes, roster: Roster, wall: float) -> Admitted | Refused:
    """Does the chain in ``hello`` make the holder of ``peer_key`` a member? Takes new records into ``roster``."""
    if hello.protocol != PROTOCOL:
        return Refused("protocol", f"this node speaks protocol {PROTOCOL}, yours {hello.protocol}")
    if hello.mesh != roster.mesh:
        return Refused("wrong-mesh", f"this node belongs to mesh {roster.mesh}, yours to {hello.mesh}")
    if hello.facts.id != node_id(peer_key):
        return Refused("impostor", f"your key is {node_id(peer_key)}, your facts are those of {hello.facts.id}")
    if len(hello.grants) > MAX_CHAIN:
        return Refused("not-a-member", f"a chain of {len(hello.grants)} grants is too long")
    changed = roster.add(hello.grants, wall)
    if roster.role_of(peer_key, wall) is None:
        return _outsider(peer_key, roster)
    # Only now, from a member: a stranger must not make us check hundreds of signatures.
    changed = bool(roster.revoke(hello.revocations, wall)) or changed
    role = roster.role_of(peer_key, wall)
    if role is None:
        return _outsider(peer_key, roster)
    if hello.facts.role == "worker" and role != "worker":
        return Refused("role", "your grant is a client's: run `mesh client`")
    return Admitted(role, changed)


def _outsider(peer_key: bytes, roster: Roster) -> Refused:
    if roster.is_revoked(peer_key):
        return Refused("revoked", f"node {node_id(peer_key)} was revoked")
    return Refused("not-a-member", f"node {node_id(peer_key)} is not a member of this mesh")


def answer_join(
    join: Join,
    joiner: bytes,
    *,
    key: NodeKey,
    roster: Roster,
    book: InviteBook | None,
    mesh_name: str,
    members: Iterable[MemberAddress],
    wall: float,
) -> Joined | Refused:
    """Burn a use of the invite and sign a grant for the holder of ``joiner``.

    One who is a member already, because an earlier answer got lost, say, is told so again and burns nothing.

    Raises:
        StateError: the use could not be burned.
    """
    if join.protocol != PROTOCOL:
        return Refused("protocol", f"this node speaks protocol {PROTOCOL}, yours {join.protocol}")
    role: Role | None = roster.role_of(joiner, wall)
    if role is None:
        if book is None or roster.role_of(key.public, wall) != "worker":
            return Refused("unknown", "this node does not invite")
        full = _is_full(joiner, roster, wall)
        if full is not None:
            return full
        try:
            role = book.redeem(join.secret, wall)
        except AdmissionError as error:
            return Refused(error.code, error.message)
    return let_in(joiner, role, key=key, roster=roster, mesh_name=mesh_name, members=members, wall=wall)


def let_in(
    joiner: bytes,
    role: Role,
    *,
    key: NodeKey,
    roster: Roster,
    mesh_name: str,
    members: Iterable[MemberAddress],
    wall: float,
) -> Joined | Refused:
    """Sign a grant for the holder of ``joiner``, unless it has as good a one: somebody who may invite has said so."""
    if roster.role_of(joiner, wall) not in (role, "worker"):
        if roster.role_of(key.public, wall) != "worker":
            return Refused("unknown", "this node does not invite")
        full = _is_full(joiner, roster, wall)
        if full is not None:
            return full
        grant = sign_grant(
            key, mesh=roster.mesh, subject=joiner, role=role, wall=_after_revocation(roster, joiner, wall)
        )
        roster.add([grant], wall, vouched=True)
        if roster.role_of(joiner, wall) not in (role, "worker"):
            return Refused("full", f"this mesh holds {len(roster.grants)} grants, which is all it can")
    return Joined(roster.mesh, mesh_name, roster.founder, roster.grants, tuple(members)[:256])


def _is_full(joiner: bytes, roster: Roster, wall: float) -> Refused | None:
    members = roster.members(wall)
    if len(members) < MAX_MEMBERS or joiner in members:
        return None
    return Refused("full", f"this mesh has {len(members)} members, which is all that can watch each other")


def _after_revocation(roster: Roster, subject: bytes, wall: float) -> float:
    """A new invite lets a revoked node in again, also in the very second of its revocation."""
    times = [record.issued_at + 1 for record in roster.revocations if record.subject == subject]
    return max([wall, *times])


Choice = Literal["take", "wait", "refuse"]


def choose(us: NodeId, peer: NodeId, *, dialing: bool, linked_s: float | None, linked_by_us: bool) -> Choice:
    """What to do with a connection that ``peer`` dialed and said Hello on.

    Both sides must end up with the same one of two. When both dial at once, the lower id's dial wins. A peer that dials
    although an older link stands has lost that link (it was restarted, say): the new one wins.

    Args:
        dialing: we are dialing ``peer``, too.
        linked_s: seconds since the link we have came up; None: we have none.
        linked_by_us: we dialed that link.
    """
    if us > peer:
        return "take"
    if linked_s is None:
        return "wait" if dialing else "take"
    return "refuse" if linked_by_us and linked_s < FRESH_S else "take"


class JoinGate:
    """Slows down those who knock with wrong tokens or no grant: per source, and all together. Pure.

    Args:
        per_source: failures per minute from one address.
        overall: failures per minute from anywhere.
    """

    WINDOW_S = 60.0
    MAX_SOURCES = 1024

    def __init__(self, per_source: int = 10, overall: int = 240) -> None:
        self._per_source = per_source
        self._overall = overall
        self._all: list[float] = []
        self._sources: OrderedDict[str, list[float]] = OrderedDict()

    def is_open(self, source: str, now: float) -> bool:
        """May ``source`` knock?"""
        self._all = [at for at in self._all if now - at < self.WINDOW_S]
        recent = [at for at in self._sources.get(source, ()) if now - at < self.WINDOW_S]
        return len(recent) < self._per_source and len(self._all) < self._overall

    def failed(self, source: str, now: float) -> None:
        """``source`` knocked in vain."""
        recent = [at for at in self._sources.pop(source, ()) if now - at < self.WINDOW_S]
        self._sources[source] = [*recent, now][-self._per_source :]
        self._all = [*self._all, now][-self._overall :]
        while len(self._sources) > self.MAX_SOURCES:
            self._sources.popitem(last=False)


def refusal(refused: Refused) -> AdmissionError:
    """The error a person sees for what a peer refused."""
    return AdmissionError(refused.message, remedy=REMEDIES.get(refused.code), code=refused.code)
