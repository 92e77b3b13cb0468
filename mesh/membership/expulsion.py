"""How members stop being members: thrown out by a revocation, or because the grants they came in by expired.

Either way live links end within seconds, over every lane and path, and nobody dials them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from mesh.clock import Clock
from mesh.errors import AdmissionError
from mesh.identity.grants import Roster, known_as, sign_revocation
from mesh.identity.key import NodeKey, node_id
from mesh.membership.callbacks import Callbacks
from mesh.membership.lapse import LOOK_EVERY_S, Lapses
from mesh.membership.link import Link, flush
from mesh.wire.facts import NodeId
from mesh.wire.messages import Control, Refused, Revocation, Revoke


class House(Protocol):
    """What the members are connected to."""

    def peers(self) -> Mapping[NodeId, Link]: ...
    def broadcast(self, message: Control, *, but: NodeId | None = None) -> None: ...
    def forget(self, node: NodeId) -> None: ...
    def lose(self, link: Link, reason: str) -> None: ...
    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Expulsion:
    """Shows out who is no member any more."""

    def __init__(self, house: House, key: NodeKey, roster: Roster, clock: Clock, tell: Callbacks) -> None:
        self._house = house
        self._key = key
        self._roster = roster
        self._clock = clock
        self._tell = tell
        self._lapses = Lapses(roster, clock.wall())

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
        # Clocks differ: a revocation dated before the grant it is meant for would do nothing.
        granted = max((grant.issued_at for grant in self._roster.grants if grant.subject == public), default=0)
        wall = max(self._clock.wall(), granted)
        revocation = sign_revocation(self._key, mesh=self._roster.mesh, subject=public, wall=wall)
        if not self.take(revocation, None):
            raise AdmissionError(f"this node may not revoke {subject}", code="not-allowed")
        return revocation

    def take(self, revocation: Revocation, teller: NodeId | None) -> bool:
        """Somebody was revoked, says ``teller``. Returns whether that is so, and news."""
        out = self._roster.revoke([revocation], self._clock.wall())
        for key in out:
            subject = node_id(key)
            self._house.broadcast(Revoke(revocation), but=teller)
            self._tell.on_roster_changed()
            if subject == self._key.id:
                self._tell.on_expelled(teller or subject, Refused("revoked", "this node was revoked"))
            else:
                self._house.forget(subject)
        if out:
            self._end_lapsed()
        return bool(out)

    def _end_lapsed(self) -> None:
        wall = self._clock.wall()
        links = dict(self._house.peers())
        linked = {peer: (link.connection.peer_key, link.role) for peer, link in links.items()}
        for lapse in self._lapses.lapsed(linked, wall):
            if lapse.is_out:
                self._house.forget(lapse.node)
            self._house.spawn(self._show_out(links[lapse.node], lapse.reason))
        me = self._key.public
        if self._roster.role_of(me, wall) is None and not self._roster.is_revoked(me):
            self._tell.on_expelled(self._key.id, Refused("expired", "the grant of this node has expired"))

    async def _show_out(self, link: Link, reason: str) -> None:
        """Let it read why, for a moment, then close."""
        await flush(link)
        self._house.lose(link, reason)
