"""Membership that ends by itself: grants expire, and standing that came from them goes with them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.identity.grants import Roster
from mesh.wire.facts import NodeId, Role

LOOK_EVERY_S = 1.0
REVOKED = "revoked"
EXPIRED = "its grant expired"
DEMOTED = "its grant as a worker expired"
OUT = (REVOKED, EXPIRED)
"""What links to members that are none any more are said to end of."""


@dataclass(frozen=True, slots=True)
class Lapse:
    """One whose standing ended."""

    node: NodeId
    reason: str

    @property
    def is_out(self) -> bool:
        """It is no member at all any more."""
        return self.reason in OUT


class Lapses:
    """Finds those whose standing ended while they were connected.

    Args:
        wall: seconds since 1970.
    """

    def __init__(self, roster: Roster, wall: float) -> None:
        self._roster = roster
        self._looked_at = wall

    def due(self, wall: float) -> bool:
        """Has any grant expired since this was asked last? Cheap."""
        before, self._looked_at = self._looked_at, wall
        return any(before < grant.expires_at <= wall for grant in self._roster.grants if grant.expires_at)

    def lapsed(self, linked: Mapping[NodeId, tuple[bytes, Role]], wall: float) -> list[Lapse]:
        """Of those ``linked``, by key and the role they were let in with, who is it no more."""
        found = []
        for node, (key, role) in linked.items():
            now = self._roster.role_of(key, wall)
            if now is None:
                found.append(Lapse(node, REVOKED if self._roster.is_revoked(key) else EXPIRED))
            elif role == "worker" and now != "worker":
                found.append(Lapse(node, DEMOTED))
        return found
