"""The epoch a node follows, and how far it has come."""

from __future__ import annotations

from enum import Enum

from mesh.membership.view import View
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeId
from mesh.wire.messages import Propose

NOTHING = Propose(NO_EPOCH, None, "")
"""What a node follows before anybody proposed."""


class Phase(Enum):
    """Derived, never stored: see :meth:`Following.phase`."""

    ELECTING = "electing"
    """No layout was agreed, or the agreed one cannot go on; a proposal will come."""
    STARTING = "starting"
    SERVING = "serving"
    WAITING = "waiting"
    """It was agreed that nothing can run; something has to change first."""


class Engine(Enum):
    """This node's own engine process, in the epoch followed."""

    IDLE = "idle"
    LISTENING = "listening"
    DOWN = "down"


class Following:
    """One agreed proposal and everything learned about it. A new one begins with a clean slate, a lifted one not."""

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self.propose = NOTHING
        self.since = 0.0
        self._clear()

    def _clear(self) -> None:
        self.aliases: frozenset[Epoch] = frozenset()
        """Numbers the same running layout had before."""
        self.api_key: str | None = None
        self.downs: dict[NodeId, str] = {}
        """Ring members whose part ended, and why."""
        self.restarted: dict[NodeId, str] = {}
        """Ring members with a new process, and so without their part, unless they took it up again. For the coordinator
        to act on; for the others a layout that serves is well, however it came to be."""
        self.ready: set[NodeId] = set()
        self.ready_told = False
        self.engine = Engine.IDLE
        self.overdue = ""
        """Why the coordinator gave up on the start."""
        self.failure_counted = False
        self.drains_until = float("-inf")
        """Until then what was followed before may still answer requests here."""
        self._boots: dict[NodeId, int] = {}

    @property
    def epoch(self) -> Epoch:
        return self.propose.epoch

    @property
    def layout(self) -> Layout | None:
        return self.propose.layout

    @property
    def host(self) -> NodeId | None:
        return None if self.layout is None else self.layout.host

    def covers(self, epoch: Epoch) -> bool:
        """Whether ``epoch`` names what is followed, be it by an earlier number."""
        return epoch == self.epoch or epoch in self.aliases

    def time_to_drain(self, at_most: float, view: View, now: float) -> float:
        """For how many seconds what is followed may finish its requests if something else is followed now.

        Only a layout that serves has any, or one that was left to its drain before; what is broken is not waited for.
        """
        if self.broken(view):
            return 0.0
        left = at_most if self.phase(view) is Phase.SERVING else self.drains_until - now
        return max(0.0, min(left, at_most))

    def adopt(self, propose: Propose, now: float, drain_s: float = 0.0) -> bool:
        """Follow ``propose`` from now on; True when it only renumbers what was followed before."""
        old = self.propose
        lifted = (
            old.layout is not None
            and propose.layout is not None
            and self.covers(propose.lifts)
            and old.layout.shape() == propose.layout.shape()
        )
        if lifted:
            self.aliases |= {old.epoch}
            # Whoever lifts it holds it to be well; a member that is down says so again under the new number.
            self.downs = {node: why for node, why in self.downs.items() if node == self._me}
            self.restarted, self.overdue = {}, ""
        else:
            self._clear()
            self.since = now
            self.drains_until = now + drain_s
        self.propose = propose
        return lifted

    def note_boots(self, view: View) -> None:
        """A ring member with a new process has lost its part, even if nobody missed it."""
        if self.layout is None:
            return
        for share in self.layout.ring:
            member = view.find(share.id)
            if member is not None and member.boot:
                if self._boots.setdefault(share.id, member.boot) != member.boot:
                    self.restarted[share.id] = f"{share.name} restarted"
                    if share.id == self.host:
                        self.api_key = None
                self._boots[share.id] = member.boot

    def note_own_restart(self) -> None:
        """What is followed is from before this process began: if it has a part in it, it has lost that."""
        for share in () if self.layout is None else self.layout.ring:
            if share.id == self._me:
                self.restarted[share.id] = f"{share.name} restarted"

    def lost(self, view: View) -> list[NodeId]:
        """Ring members that are not in."""
        return [] if self.layout is None else [share.id for share in self.layout.ring if share.id not in view]

    def broken(self, view: View) -> str:
        """Why the layout cannot go on; empty when it can, or when there is none."""
        if self.layout is None:
            return ""
        lost = self.lost(view)
        if lost:
            return departure(view, lost[0])
        if self.downs:
            return next(iter(self.downs.values()))
        return self.overdue

    def is_intact(self, view: View) -> bool:
        return self.layout is not None and not self.broken(view)

    def phase(self, view: View) -> Phase:
        if self.layout is None:
            return Phase.ELECTING if self.epoch == NO_EPOCH else Phase.WAITING
        if self.broken(view):
            return Phase.ELECTING
        return Phase.STARTING if self.api_key is None else Phase.SERVING


def departure(view: View, node: NodeId) -> str:
    """``attic crashed``, for people."""
    reason = next((d.reason for d in view.departed if d.facts.id == node), "is not in")
    return f"{view.name(node)} {'is ' if reason == 'unreachable' else ''}{reason}"
