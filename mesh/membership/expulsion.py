"""How members stop being members: thrown out by a revocation, or because the grants they came in by expired.

Either way live links end within seconds, over every lane and path, and nobody dials them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from mesh.clock import Clock
from mesh.errors import AdmissionError
from mesh.identity.grants import Roster, known_as, sign_revocation
from mesh.identity.key import NodeKey, node_id
from mesh.membership.callbacks import Callbacks
from mesh.membership.lapse import LOOK_EVERY_S, Lapses
from mesh.membership.link import Link
from mesh.wire.facts import NodeId
from mesh.wire.messages import Control, Refused, Revocation, Revoke


class House(Protocol):
    """What the members are connected to."""

    def peers(self) -> Mapping[NodeId, Link]: ...
    def broadcast(self, message: Control, *, but: NodeId | None = None) -> None: ...
    def forget(self, node: NodeId) -> None: ...
    def show_out(self, link: Link, reason: str) -> None: ...


class Expulsion:
    """Shows out who is no member any more."""

    def __init__(self, house: House, key: NodeKey, roster: Roster, clock: Clock, tell: Callbacks) -> None:
        self._house = house
        self._key = key
        self._roster = roster
        self._clock = clock
        self._tell = tell
        self._lapses = Lapses(roster, clock.wall())
        self._seen = {revocation.subject: revocation for revocation in roster.revocations}

    async def watch(self) -> None:
        """Look for expired grants until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._lapses.due(self._clock.wall()):
                self._end_lapsed()

    def revoke(self, subject: NodeId) -> Revocation:
        """Throw ``subject`` out: close its links and tell the others.

        Raises:
            AdmissionError: unknown node, or this node may not.
        """
        public = known_as(self._roster, subject)
        if public is None:
            raise AdmissionError(f"this mesh knows no node {subject}", remedy="mesh status", code="unknown-node")
        # Clocks differ: a revocation dated before the grant it is meant for would do nothing, and one dated before what
        # the subject had granted to others would throw them out as well.
        to = max((grant.issued_at for grant in self._roster.grants if grant.subject == public), default=0)
        by = max((grant.issued_at + 1 for grant in self._roster.grants if grant.issuer == public), default=0)
        wall = max(self._clock.wall(), to, by)
        revocation = sign_revocation(self._key, mesh=self._roster.mesh, subject=public, wall=wall)
        if not self.take(revocation, None):
            raise AdmissionError(f"this node may not revoke {subject}", code="not-allowed")
        return revocation

    def take(self, revocation: Revocation, teller: NodeId | None) -> bool:
        """Somebody was revoked, says ``teller``. Returns whether that is so, and news."""
        out = self._roster.revoke([revocation], self._clock.wall())
        self.review(teller)
        return bool(out)

    def review(self, teller: NodeId | None) -> None:
        """The roster may hold new revocations, from ``teller``'s Hello, say: pass them on, and carry them out."""
        news = [each for each in self._roster.revocations if self._seen.get(each.subject) != each]
        for revocation in news:
            self._seen[revocation.subject] = revocation
            subject = node_id(revocation.subject)
            self._house.broadcast(Revoke(revocation), but=teller)
            self._tell.on_roster_changed()
            if not self._roster.is_revoked(revocation.subject):
                continue  # let in again since
            if subject == self._key.id:
                self._tell.on_expelled(teller or subject, Refused("revoked", "this node was revoked"))
            else:
                self._house.forget(subject)
        if news:
            self._end_lapsed()

    def _end_lapsed(self) -> None:
        wall = self._clock.wall()
        links = dict(self._house.peers())
        linked = {peer: (link.connection.peer_key, link.role) for peer, link in links.items()}
        for lapse in self._lapses.lapsed(linked, wall):
            if lapse.is_out:
                self._house.forget(lapse.node)
            self._house.show_out(links[lapse.node], lapse.reason)
        me = self._key.public
        if self._roster.role_of(me, wall) is None and not self._roster.is_revoked(me):
            self._tell.on_expelled(self._key.id, Refused("expired", "the grant of this node has expired"))
