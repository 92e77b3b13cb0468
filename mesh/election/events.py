"""What the election is told, and what it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.membership.events import Broadcast, Send
from mesh.membership.view import View
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeFacts, NodeId
from mesh.wire.messages import Control

# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """Membership sees the mesh like this now."""

    view: View


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link to ``peer`` opened; what was sent on an earlier one may be lost. After ``ViewChanged``, if both come."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Received:
    """A control message from ``peer``; those of other rooms are ignored."""

    peer: NodeId
    message: Control


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to :class:`NeedPlan`. ``layout`` None: nothing can run, and ``reason`` says what is missing.

    ``excluded``: members the layout leaves out, and why, for people.
    """

    request_id: int
    layout: Layout | None
    reason: str
    excluded: dict[NodeId, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineListening:
    """This node's rpc-server of ``epoch`` can be reached."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class EngineServing:
    """A token came through the ring of ``epoch``, which this node hosts."""

    epoch: Epoch
    api_key: str


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """This node's engine of ``epoch`` ended, or never came up."""

    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """This node goes; nothing it hears from now on matters."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``next_timer`` named has come."""


Event = (
    ViewChanged | LinkUp | Received | Planned | EngineListening | EngineServing | EngineFailed | Shutdown | Tick
)  # fmt: skip


# -- effects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NeedPlan:
    """Compute a layout and answer with :class:`Planned` of the same ``request_id``; a later request replaces this one.

    ``members`` are all members, lite clients included. ``current``: the layout that runs, or None; a planner that sees
    little gain in another one should return it. ``excluded``: members held off for now, and why: not to be used.
    ``cuts``: pairs (lower id first) that cannot hear each other: no host with a ring member it is cut from.
    """

    request_id: int
    members: tuple[NodeFacts, ...]
    current: Layout | None
    excluded: dict[NodeId, str]
    cuts: frozenset[tuple[NodeId, NodeId]]


@dataclass(frozen=True, slots=True)
class Remember:
    """Write ``number`` to disk before anything after this effect: after a restart it is the ``seen`` argument."""

    number: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Follow ``epoch``: whatever runs for an older one must stop, then this node's part of ``layout`` starts.

    One exception: when ``lifts`` is not ``NO_EPOCH``, the same layout goes on under a new number. What runs (or starts)
    for ``lifts`` keeps running, is not reported again, and counts as ``epoch`` from now on.
    """

    epoch: Epoch
    layout: Layout | None
    reason: str
    lifts: Epoch = NO_EPOCH
    drain_s: float = 0.0
    """What runs is well: it may first finish what it has begun, for so many seconds. Its end is this node's to see."""


@dataclass(frozen=True, slots=True)
class WorkersReady:
    """To the host: every worker of ``epoch``'s ring listens; open the tunnels and start. Comes once, also for solo."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Served:
    """Requests may go to ``host``."""

    epoch: Epoch
    host: NodeId
    api_key: str


@dataclass(frozen=True, slots=True)
class Unserved:
    """Requests must wait; those under way have ``drain_s`` seconds to finish. Only after :class:`Served`."""

    reason: str
    drain_s: float = 0.0


Effect = Send | Broadcast | NeedPlan | Remember | Adopt | WorkersReady | Served | Unserved


@dataclass(frozen=True, slots=True)
class Status:
    """For people: ``state`` is ``electing``, ``starting``, ``serving`` or ``waiting``, and ``reason`` says why."""

    state: str
    epoch: Epoch
    reason: str
    layout: Layout | None
    excluded: dict[NodeId, str]
    coordinator: NodeId | None
