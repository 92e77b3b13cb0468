"""Who may take part: a chain of signed grants from the founder, and signed revocations.

Signed bytes are a domain string and a msgpack array of the fields in order, so that a signature for one kind of record
can never stand for another.

What a revocation means. The subject is out from then on; a grant issued later lets it in again. What the subject had
granted to others before stays good, so a mesh outlives any of its members. The time in a record is its signer's word: a
thief of a revoked key could antedate a new grant. So grants of a revoked issuer that a roster sees only *after* the
revocation are taken from members (who hold what they had accepted before), never from the one who profits.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mesh.errors import AdmissionError
from mesh.identity.key import NodeKey, node_id, signed_by
from mesh.wire.facts import MeshId, NodeId, Role
from mesh.wire.messages import Grant, Revocation

MAX_RECORDS = 512
"""Grants, and as many revocations; what fits in one Hello."""

_GRANT = b"mesh grant 1\0"
_REVOCATION = b"mesh revocation 1\0"


def _grant_bytes(mesh: MeshId, subject: bytes, role: Role, issuer: bytes, issued_at: int, expires_at: int) -> bytes:
    return _GRANT + msgspec.msgpack.encode((mesh, subject, role, issuer, issued_at, expires_at))


def _revocation_bytes(mesh: MeshId, subject: bytes, issuer: bytes, issued_at: int) -> bytes:
    return _REVOCATION + msgspec.msgpack.encode((mesh, subject, issuer, issued_at))


def sign_grant(key: NodeKey, *, mesh: MeshId, subject: bytes, role: Role, wall: float, expires_at: int = 0) -> Grant:
    """``key`` says that the holder of ``subject`` may take part as ``role``. Times are seconds since 1970; 0: never."""
    issued_at = int(wall)
    signature = key.sign(_grant_bytes(mesh, subject, role, key.public, issued_at, expires_at))
    return Grant(mesh, subject, role, key.public, issued_at, expires_at, signature)


def found_mesh(key: NodeKey, wall: float) -> Grant:
    """The first grant of a mesh: its founder's, to itself. The mesh's id is the founder's."""
    return sign_grant(key, mesh=key.id, subject=key.public, role="worker", wall=wall)


def sign_revocation(key: NodeKey, *, mesh: MeshId, subject: bytes, wall: float) -> Revocation:
    """``key`` says that ``subject`` is out."""
    issued_at = int(wall)
    return Revocation(
        mesh, subject, key.public, issued_at, key.sign(_revocation_bytes(mesh, subject, key.public, issued_at))
    )


def is_signed(record: Grant | Revocation) -> bool:
    """Did the issuer sign exactly this?"""
    if isinstance(record, Grant):
        message = _grant_bytes(
            record.mesh, record.subject, record.role, record.issuer, record.issued_at, record.expires_at
        )
    else:
        message = _revocation_bytes(record.mesh, record.subject, record.issuer, record.issued_at)
    return signed_by(record.issuer, record.signature, message)


class Roster:
    """All grants and revocations of one mesh that count, and the questions they answer. Pure.

    Args:
        mesh: id of the mesh.
        founder: raw public key of its founder.
        grants: accepted before, by this or a trusted roster.
        revocations: likewise; they apply after the grants.

    Raises:
        AdmissionError: ``founder`` is not the founder of ``mesh``.
    """

    def __init__(
        self,
        mesh: MeshId,
        founder: bytes,
        grants: Iterable[Grant] = (),
        revocations: Iterable[Revocation] = (),
    ) -> None:
        if node_id(founder) != mesh:
            raise AdmissionError(
                f"the founder key {node_id(founder)} does not belong to mesh {mesh}", code="wrong-mesh"
            )
        self.mesh = mesh
        self.founder = founder
        self._grants: dict[Grant, None] = {grant: None for grant in grants if grant.mesh == mesh and is_signed(grant)}
        self._revocations: dict[bytes, Revocation] = {}
        for revocation in revocations:
            self._accept(revocation)

    @property
    def grants(self) -> tuple[Grant, ...]:
        return tuple(self._grants)

    @property
    def revocations(self) -> tuple[Revocation, ...]:
        return tuple(self._revocations.values())

    def subjects(self) -> tuple[bytes, ...]:
        """Public keys of everyone who was ever granted anything."""
        return tuple(dict.fromkeys(grant.subject for grant in self._grants))

    def members(self, wall: float) -> set[bytes]:
        """Public keys of everyone who may take part at ``wall``."""
        return {grant.subject for grant in self._warrants(wall) if self._stands(grant)}

    def add(self, grants: Iterable[Grant], wall: float, *, vouched: bool = False) -> bool:
        """Take in new grants that lead to the founder at ``wall``; the others leave no trace.

        Args:
            vouched: they come from a member, not from the one they speak for.

        Returns:
            Did anything change?
        """
        fresh: list[Grant] = []
        for grant in grants:
            if len(self._grants) + len(fresh) >= MAX_RECORDS:
                break
            if grant.mesh != self.mesh or grant in self._grants or (not vouched and self.is_revoked(grant.issuer)):
                continue
            if is_signed(grant):
                fresh.append(grant)
        if not fresh:
            return False
        kept = self._grants
        self._grants = kept | dict.fromkeys(fresh)
        warrants = self._warrants(wall)
        self._grants = kept | {grant: None for grant in fresh if grant in warrants}
        return len(self._grants) > len(kept)

    def revoke(self, revocations: Iterable[Revocation], wall: float) -> list[bytes]:
        """Take in revocations whose issuer is a worker in good standing.

        Returns:
            Keys that are out by them.
        """
        out = []
        for revocation in revocations:
            known = self._revocations.get(revocation.subject)
            if revocation.mesh != self.mesh or (known is not None and known.issued_at >= revocation.issued_at):
                continue
            if len(self._revocations) >= MAX_RECORDS or self.role_of(revocation.issuer, wall) != "worker":
                continue
            if is_signed(revocation):
                self._accept(revocation)
                out.append(revocation.subject)
        return out

    def role_of(self, key: bytes, wall: float) -> Role | None:
        """What the holder of ``key`` may do at ``wall``; None: nothing."""
        chain = self.chain(key, wall)
        return chain[-1].role if chain else None

    def is_revoked(self, key: bytes) -> bool:
        """Is ``key`` out by a revocation that no later grant has undone?"""
        return key in self._revocations and not any(self._stands(g) for g in self._grants if g.subject == key)

    def chain(self, key: bytes, wall: float) -> tuple[Grant, ...]:
        """The grants that prove ``key``'s role at ``wall``, the founder's first; empty when it has none."""
        warrants = self._warrants(wall)
        mine = [grant for grant in warrants if grant.subject == key and self._stands(grant)]
        link: Grant | None = max(mine, key=lambda grant: grant.role == "worker", default=None)
        chain: list[Grant] = []
        while link is not None:
            chain.append(link)
            link = warrants[link]
        return tuple(reversed(chain))

    def _accept(self, revocation: Revocation) -> None:
        known = self._revocations.get(revocation.subject)
        if known is None or known.issued_at < revocation.issued_at:
            self._revocations[revocation.subject] = revocation

    def _stands(self, grant: Grant) -> bool:
        """Has no revocation overtaken it? On a tie the revocation wins."""
        revocation = self._revocations.get(grant.subject)
        return revocation is None or grant.issued_at > revocation.issued_at

    def _warrants(self, wall: float) -> dict[Grant, Grant | None]:
        """Every grant that leads to the founder at ``wall``, with the grant that its issuer held.

        Breadth first from the founder, each grant once: circles and forests of grants that lead nowhere cost nothing.
        """
        by_issuer: dict[bytes, list[Grant]] = {}
        found: dict[Grant, Grant | None] = {}
        for grant in self._grants:
            if grant.expires_at and grant.expires_at <= wall:
                continue
            if grant.issuer != grant.subject:
                by_issuer.setdefault(grant.issuer, []).append(grant)
            elif grant.subject == self.founder:
                found[grant] = None
        queue = list(found)
        while queue:
            warrant = queue.pop(0)
            if warrant.role != "worker":
                continue
            out = self._revocations.get(warrant.subject)
            for grant in by_issuer.get(warrant.subject, []):
                overtaken = out is not None and warrant.issued_at <= out.issued_at <= grant.issued_at
                if grant not in found and not overtaken:
                    found[grant] = warrant
                    queue.append(grant)
        return found


def known_as(roster: Roster, node: NodeId) -> bytes | None:
    """The public key of ``node``, if the roster ever heard of it."""
    return next((key for key in roster.subjects() if node_id(key) == node), None)
