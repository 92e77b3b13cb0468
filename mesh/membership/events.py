"""What the failure detector is told, and what it asks for. Messages are those of :mod:`mesh.wire.messages`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mesh.wire.facts import NodeFacts, NodeId
from mesh.wire.messages import Control


class Down(Enum):
    """How the last link to a peer ended."""

    CLOSED = "closed"
    """The other side said so: its process ended, or threw us out. A strong hint."""
    TIMEOUT = "timeout"
    """Nothing came for the transport's idle time. Silence was counted already, so this adds nothing."""
    LOCAL = "local"
    """We closed it."""


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkUp:
    """An admitted link to ``peer`` is open, and its Hello carried ``facts``. Comes again when a link is replaced."""

    peer: NodeId
    facts: NodeFacts


@dataclass(frozen=True, slots=True)
class LinkDown:
    """No link to ``peer`` is left. Not to be sent while another link to the same peer is open."""

    peer: NodeId
    reason: Down


@dataclass(frozen=True, slots=True)
class Heard:
    """Any authenticated packet came from ``peer``. Cheap: may be sent for each of them."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Received:
    """A control message came from ``peer``; those of other rooms are ignored, but count as life."""

    peer: NodeId
    message: Control


@dataclass(frozen=True, slots=True)
class FactsChanged:
    """This node's own facts, with a higher ``version``."""

    facts: NodeFacts


@dataclass(frozen=True, slots=True)
class Expelled:
    """``peer``'s membership was revoked: out at once, and not back by being heard."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Leave:
    """This node goes on purpose; ``reason`` is for people."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``next_timer`` named has come."""


Event = LinkUp | LinkDown | Heard | Received | FactsChanged | Expelled | Leave | Tick


# -- effects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Put ``message`` on the control stream to ``peer``; nothing when there is no link."""

    peer: NodeId
    message: Control


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Put ``message`` on every control stream."""

    message: Control


@dataclass(frozen=True, slots=True)
class MemberAlive:
    """``node`` is in: new, back, or no longer suspected."""

    node: NodeId
    facts: NodeFacts


@dataclass(frozen=True, slots=True)
class MemberSuspect:
    """Nothing was heard from ``node``; others are being asked. It is still a member."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class MemberLost:
    """``node`` is out: ``crashed``, ``left``, ``unreachable``, ``restarted`` (back at once), ``revoked``."""

    node: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """``node`` told something new of itself."""

    node: NodeId
    facts: NodeFacts


@dataclass(frozen=True, slots=True)
class CutsChanged:
    """Which pairs of members cannot hear each other has changed: see ``View.cuts``."""


Effect = Send | Broadcast | MemberAlive | MemberSuspect | MemberLost | MemberFacts | CutsChanged
VIEW_EFFECTS = (MemberAlive, MemberSuspect, MemberLost, MemberFacts, CutsChanged)
"""After any of these ``view()`` has changed, and whoever depends on it should be given the new one."""
