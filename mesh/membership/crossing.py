"""How to reach members that cannot just be dialed: introductions first, a relay when nothing direct works. Pure.

For each member without a link: give the ordinary dial a moment, then ask up to three members for an introduction. Each
that reaches the other directly tells both sides at once where the other is, and both dial: their first packets open the
NATs on the way. If that comes to nothing in time, the best of those members is asked to carry datagrams. A relayed link
goes on asking for introductions, ever more slowly, and moves to a direct path when one is found. A link that falls
silent, because a NAT forgot it or a machine moved, is given a new path in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from mesh.membership.introducer import Bucket
from mesh.wire.facts import NodeId
from mesh.wire.messages import Apart, Carried, Carry, Introduce, Meet

HEAD_START_S = 0.7
"""For the ordinary dial: on a LAN it needs a hundredth of that."""
MEET_WITHIN_S = 2.5
"""From asking for an introduction to a link: a trip to the introducer and one on, then three packets."""
MEET_AGAIN_WITHIN_S = 0.6
"""For two that needed a relay before: the answers of the introducers, and hardly more."""
CARRY_WITHIN_S = 1.5
LINK_WITHIN_S = 4.0
"""From a channel to a link through it."""
FIRST_PAUSE_S = 2.0
LAST_PAUSE_S = 30.0
FIRST_DIRECT_S = 10.0
"""Until a relayed link tries to become a direct one again, then twice as long."""
LAST_DIRECT_S = 300.0
HELPERS = 3
REDIAL_S = 1.0
"""Others may make us dial one member so often: each dial is a few packets to each of at most six addresses."""
DIALS_PER_S, DIALS_AT_ONCE = 2.0, 40.0
"""All members together; after a change of network everybody is dialed at once."""


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """There is no link to ``peer``, and there should be one."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Unwanted:
    """``peer`` is no member any more."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Linked:
    """A link to ``peer`` is there, or its path is another one now."""

    peer: NodeId
    relayed: bool


@dataclass(frozen=True, slots=True)
class Silent:
    """Nothing comes over the link to ``peer`` any more: its path may be broken, and the peer well."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Helper:
    """``node`` is linked directly, and may introduce and relay. Told again when ``rtt_ms`` has changed."""

    node: NodeId
    rtt_ms: float
    relay_only: bool


@dataclass(frozen=True, slots=True)
class HelperGone:
    """The direct link to ``node`` is lost."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Heard:
    """``via`` said something that concerns a member it may help us to reach."""

    via: NodeId
    message: Meet | Carried | Apart


@dataclass(frozen=True, slots=True)
class Moved:
    """This node has other addresses than before: what did not work may work now."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that ``next_timer`` named has come."""


Event = Wanted | Unwanted | Linked | Silent | Helper | HelperGone | Heard | Moved | Tick


# -- effects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """Put ``message`` on the control stream to ``via``."""

    via: NodeId
    message: Introduce | Carry


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial ``peer`` at all of these at once, now. A relayed link is to move onto what answers."""

    peer: NodeId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DialOver:
    """Dial ``peer`` through ``via``, which carries for us on ``channel``."""

    peer: NodeId
    via: NodeId
    channel: int


Effect = Tell | Dial | DialOver


class Phase(Enum):
    WAITING = "the ordinary dial has its chance"
    MEETING = "introductions are asked for"
    ASKING = "a relay is asked for"
    LINKING = "a dial through a relay is under way"
    RESTING = "nothing worked; again later"
    RELAYED = "linked through a relay; a direct path is tried again later"


@dataclass(slots=True)
class _Want:
    phase: Phase
    due: float
    pause: float
    vias: dict[NodeId, float] = field(default_factory=dict)
    """Members that reach the peer directly, and its round trip to them, ms."""
    asked: set[NodeId] = field(default_factory=set)
    """Introducers that have not answered; then the relays tried in this attempt."""
    via: NodeId = ""
    """The relay asked, or in use."""


class Crossing:
    """Decides what to try for each member. ``may_dial`` says whether a node is a member without a direct link."""

    def __init__(self, me: NodeId, may_dial: Callable[[NodeId], bool]) -> None:
        self._me = me
        self._may_dial = may_dial
        self._wants: dict[NodeId, _Want] = {}
        self._helpers: dict[NodeId, Helper] = {}
        self._dialed: dict[NodeId, float] = {}
        self._dials = Bucket(DIALS_PER_S, DIALS_AT_ONCE, 0.0)

    def next_timer(self) -> float | None:
        """When to send :class:`Tick` at the latest; None while every member is linked directly."""
        return min((want.due for want in self._wants.values()), default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event in; effects are to be carried out in order."""
        match event:
            case Wanted(peer):
                return self._wanted(peer, now)
            case Unwanted(peer):
                self._wants.pop(peer, None)
                self._dialed.pop(peer, None)
            case Linked(peer, relayed):
                self._linked(peer, relayed, now)
            case Silent(peer):
                return self._silent(peer, now)
            case Helper():
                return self._helper(event, now)
            case HelperGone(node):
                self._helpers.pop(node, None)
                for want in self._wants.values():
                    want.vias.pop(node, None)
            case Heard(via, message):
                return self._heard(via, message, now)
            case Moved():
                for want in self._wants.values():
                    if want.phase in (Phase.RESTING, Phase.RELAYED):
                        want.due, want.pause = now, _first_pause(want.phase)
                return self._tick(now)
            case Tick():
                return self._tick(now)
        return []

    # -- events --------------------------------------------------------------------------------------------------------

    def _wanted(self, peer: NodeId, now: float) -> list[Effect]:
        before = self._wants.get(peer)
        if before is None:
            self._wants[peer] = _Want(Phase.WAITING, now + HEAD_START_S, FIRST_PAUSE_S)
            return []
        return self._silent(peer, now) if before.phase is Phase.RELAYED else []

    def _silent(self, peer: NodeId, now: float) -> list[Effect]:
        want = self._wants.get(peer)
        if want is None:
            want = self._wants[peer] = _Want(Phase.WAITING, now, FIRST_PAUSE_S)
            return self._seek(peer, want, now)
        if want.phase is not Phase.RELAYED:
            return []
        # Its relay is gone, most likely. A direct path was tried for long enough.
        want.pause, want.asked = FIRST_PAUSE_S, set()
        want.vias.pop(want.via, None)
        if any(via in self._helpers for via in want.vias):
            return self._ask_relay(peer, want, now)
        return self._seek(peer, want, now, MEET_AGAIN_WITHIN_S)

    def _linked(self, peer: NodeId, relayed: bool, now: float) -> None:
        want = self._wants.get(peer)
        if not relayed:
            self._wants.pop(peer, None)
        elif want is None or want.phase is not Phase.RELAYED:
            vias, via = ({}, "") if want is None else (want.vias, want.via)
            self._wants[peer] = _Want(Phase.RELAYED, now + FIRST_DIRECT_S, FIRST_DIRECT_S, vias, via=via)

    def _helper(self, helper: Helper, now: float) -> list[Effect]:
        new = helper.node not in self._helpers
        self._helpers[helper.node] = helper
        effects: list[Effect] = []
        for peer, want in self._wants.items() if new else ():
            if want.phase is Phase.RESTING and peer != helper.node:
                effects += self._seek(peer, want, now)
        return effects

    def _heard(self, via: NodeId, message: Meet | Carried | Apart, now: float) -> list[Effect]:
        if via not in self._helpers:
            return []  # whoever is relayed to us has nothing to say about paths
        match message:
            case Meet(peer, addresses, rtt_ms):
                return self._met(via, peer, addresses, rtt_ms, now)
            case Carried(peer, channel):
                want = self._wants.get(peer)
                if want is None or want.phase is not Phase.ASKING or want.via != via:
                    return []
                want.phase, want.due = Phase.LINKING, now + LINK_WITHIN_S
                return [DialOver(peer, via, channel)]
            case Apart(peer, _):
                want = self._wants.get(peer)
                if want is None:
                    return []
                if want.phase is Phase.ASKING and want.via == via:
                    return self._ask_relay(peer, want, now)
                want.asked.discard(via)
                if want.phase is Phase.MEETING and not want.asked and not want.vias:
                    self._rest(want, now)
        return []

    def _met(self, via: NodeId, peer: NodeId, addresses: tuple[str, ...], rtt_ms: float, now: float) -> list[Effect]:
        if peer in (self._me, via) or not self._may_dial(peer):  # who speaks of itself is no way to itself
            return []
        want = self._wants.get(peer)
        if want is not None:
            want.vias[via] = rtt_ms
            want.asked.discard(via)
        if not addresses or now - self._dialed.get(peer, float("-inf")) < REDIAL_S or not self._dials.take(1, now):
            return []
        self._dialed[peer] = now
        return [Dial(peer, addresses)]

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for peer, want in self._wants.items():
            if want.due > now:
                continue
            match want.phase:
                case Phase.WAITING | Phase.RESTING:
                    effects += self._seek(peer, want, now)
                case Phase.MEETING:
                    want.asked = set()
                    effects += self._ask_relay(peer, want, now)
                case Phase.ASKING | Phase.LINKING:
                    effects += self._ask_relay(peer, want, now)
                case Phase.RELAYED:
                    want.pause = min(2 * want.pause, LAST_DIRECT_S)
                    want.due = now + want.pause
                    effects += self._introductions(peer)
        return effects

    # -- what is tried -------------------------------------------------------------------------------------------------

    def _introductions(self, peer: NodeId) -> list[Effect]:
        able = [helper for helper in self._helpers.values() if helper.node != peer]
        able.sort(key=lambda helper: (not helper.relay_only, helper.rtt_ms, helper.node))
        return [Tell(helper.node, Introduce(peer)) for helper in able[:HELPERS]]

    def _seek(self, peer: NodeId, want: _Want, now: float, within: float = MEET_WITHIN_S) -> list[Effect]:
        asking = self._introductions(peer)
        if not asking:
            self._rest(want, now)
            return []
        want.phase, want.due, want.via = Phase.MEETING, now + within, ""
        want.vias.clear()
        want.asked = {tell.via for tell in asking if isinstance(tell, Tell)}
        return asking

    def _ask_relay(self, peer: NodeId, want: _Want, now: float) -> list[Effect]:
        """Ask the best that was not asked yet: those that do nothing else first, then by the sum of both ways."""
        able = [self._helpers[via] for via in want.vias if via in self._helpers and via not in want.asked]
        if not able:
            self._rest(want, now)
            return []
        best = min(able, key=lambda h: (not h.relay_only, h.rtt_ms + want.vias[h.node], h.node))
        want.asked.add(best.node)
        want.phase, want.due, want.via = Phase.ASKING, now + CARRY_WITHIN_S, best.node
        return [Tell(best.node, Carry(peer))]

    def _rest(self, want: _Want, now: float) -> None:
        want.phase, want.due, want.via = Phase.RESTING, now + want.pause, ""
        want.asked = set()
        want.pause = min(2 * want.pause, LAST_PAUSE_S)


def _first_pause(phase: Phase) -> float:
    return FIRST_DIRECT_S if phase is Phase.RELAYED else FIRST_PAUSE_S
