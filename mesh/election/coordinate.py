"""What the coordinator decides: when to plan, what to keep, what to propose."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from mesh.election.claims import Claims
from mesh.election.damping import Agenda, Backoff, HoldOffs
from mesh.election.events import NeedPlan, Planned
from mesh.election.following import Following, Phase
from mesh.membership.view import View
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeFacts, NodeId
from mesh.wire.messages import Propose


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, if not said otherwise."""

    start_settle: float = 1.0
    """After its own start a node first listens: somebody may know a layout already."""
    join_settle: float = 0.7
    settle_limit: float = 2.5
    gather: float = 0.2
    """For a second word to arrive (``Serving`` after ``Propose``) before two layouts are weighed."""
    accept: float = 3.0
    """In which every ring member must accept a proposal."""
    plan: float = 10.0
    load: float = 120.0
    load_bytes_per_second: float = 20e6
    patience: float = 3.0
    """Without any proposal, until a node that is not the coordinator proposes itself. Grows with its rank."""
    hold: float = 2.0
    """Until a proposal from somebody who is not the coordinator is followed for want of a better one."""
    refresh: float = 5.0
    """The host says this often that it serves, whoever may have missed or doubted it."""
    stable: float = 5.0
    """Serving this long ends a series of failures."""
    drain: float = 10.0
    """In which requests may finish before a layout that is well is stopped."""

    def start_limit(self, layout: Layout) -> float:
        return self.load + layout.model.size_bytes / self.load_bytes_per_second


@dataclass(frozen=True, slots=True)
class _Signature:
    """What a decision is based on."""

    mesh: Hashable
    held: frozenset[NodeId]
    free: tuple[int, ...]

    def differs(self, other: _Signature, nothing_runs: bool) -> bool:
        """Free memory is worth another look only while nothing runs for the want of it."""
        return (self.mesh, self.held) != (other.mesh, other.held) or (nothing_runs and self.free != other.free)


@dataclass(frozen=True, slots=True)
class _Request:
    id: int
    at: float
    signature: _Signature
    excluded: dict[NodeId, str]
    cause: str


def workers(view: View) -> list[NodeFacts]:
    """Whoever may coordinate or carry layers and is not about to leave."""
    return [facts for facts in view.facts if facts.role == "worker" and not facts.draining]


def rightful(view: View) -> NodeId | None:
    """The coordinator: of the workers that the fewest others are cut from, the one with the lowest id.

    In a mesh without cuts that is the lowest id. With cuts it is a node that reaches everyone, if there is one.
    """
    ids = [facts.id for facts in workers(view)] or [facts.id for facts in view.facts if facts.role == "worker"]
    if not view.cuts:
        return min(ids, default=None)
    cut = {node: sum(node in pair and pair[0] in ids and pair[1] in ids for pair in view.cuts) for node in ids}
    return min(ids, key=lambda node: (cut[node], node), default=None)


def is_leaving(view: View, layout: Layout | None) -> bool:
    """Whether a machine that ``layout`` needs is about to leave."""
    going = {facts.id for facts in view.facts if facts.draining}
    return layout is not None and any(share.id in going for share in layout.ring)


def concerns(facts: NodeFacts) -> Hashable:
    """What of a node's facts may change the layout, but for free memory, which moves all the time."""
    devices = tuple((d.name, d.kind, d.total_bytes) for d in facts.devices)
    models = tuple(model.fingerprint for model in facts.models)
    wishes = (
        facts.wants,
        facts.ctx_size,
        facts.parallel,
        facts.split,
        facts.budget_bytes,
        facts.draining,
        facts.gpu_layers,
    )
    return (facts.id, facts.role, facts.engine, devices, models, wishes)


class Coordination:
    """The coordinator's state of mind. ``review`` and ``planned`` return what to propose or to ask, or None.

    Args:
        seen: the newest epoch this node knows of; only ever grows.
    """

    def __init__(self, me: NodeId, following: Following, claims: Claims, timing: Timing, jitter: float, seen: Epoch):
        self._me = me
        self._following = following
        self._claims = claims
        self._timing = timing
        self.seen = seen
        self.backoff = Backoff(jitter)
        self.holds = HoldOffs()
        self.accepted: set[NodeId] = set()
        self.excluded: dict[NodeId, str] = {}
        self._agenda = Agenda(timing.join_settle, timing.settle_limit)
        self._request: _Request | None = None
        self._requests = 0
        self._considered: _Signature | None = None
        """What the last decision was based on; None: no decision of ours."""
        self._noticed: _Signature | None = None
        self._cause = ""
        self._accept_by: float | None = None
        self._retry_at = 0.0
        self._gather_wait = timing.gather
        self._gathered_at = float("-inf")

    # -- timers --------------------------------------------------------------------------------------------------------

    def timers(self, view: View, now: float) -> list[float]:
        times = [self._accept_by, self.holds.next_end(now)]
        times.append(self._agenda.at if self._request is None else self._request.at + self._timing.plan)
        if self._following.layout is not None and self._following.phase(view) is Phase.STARTING:
            times.append(self._start_by(self._following.layout))
        return [at for at in times if at is not None]

    # -- what happened -------------------------------------------------------------------------------------------------

    def note_cause(self, cause: str) -> None:
        """What to tell people if a new layout comes of it."""
        self._cause = cause

    def stand_down(self) -> None:
        """Somebody else leads."""
        self._agenda.clear()
        self._request, self._accept_by = None, None
        self._considered = self._noticed = None

    def reconsider(self) -> None:
        """Another's decision is followed: see whether it is what we would have decided."""
        self._considered = None

    def gather(self, now: float) -> None:
        """Word of another layout or a higher number came: decide, once more of it is here.

        Two who both think they lead must not chase each other in circles: the wait doubles until there was peace.
        """
        if self._request is not None or self._agenda.at is not None:
            return
        if now > self._gathered_at + 10:
            self._gather_wait = self._timing.gather
        self._agenda.soon(now + self._gather_wait)
        self._gathered_at = now
        self._gather_wait = min(5.0, self._gather_wait * 2)

    def expect_acceptance(self, now: float) -> None:
        self.accepted = set()
        self._accept_by = None if self._following.layout is None else now + self._timing.accept

    def failed(self, why: str, now: float) -> None:
        """The layout followed came to nothing: count it once an epoch."""
        following = self._following
        if following.layout is not None and not following.failure_counted:
            following.failure_counted = True
            shape = following.layout.shape()
            self.backoff.failed(shape, why)
            self._retry_at = now + self.backoff.delay(shape)

    @property
    def retry_at(self) -> float:
        """Before this moment a failed layout is not tried again."""
        return self._retry_at

    # -- deciding ------------------------------------------------------------------------------------------------------

    def review(self, view: View, now: float) -> NeedPlan | None:
        """Called after every event while this node leads."""
        following = self._following
        following.downs.update(following.restarted)
        self._check_deadlines(view, now)
        if self._request is not None and now >= self._request.at + self._timing.plan:
            self._request = None
        is_idle = self._request is None and self._agenda.at is None
        signature = self._signature(view, now)
        if self._noticed is None or signature.differs(self._noticed, following.layout is None):
            self._note_change(view, signature, now)
        elif is_idle and (self._considered is None or signature.differs(self._considered, following.layout is None)):
            self._agenda.settle(now)
        broken = following.broken(view)
        if broken and self._request is None:
            self._cause = broken
            self._agenda.soon(self._retry_at if following.failure_counted else self._missed_at(view, now))
        elif is_idle and following.epoch != NO_EPOCH and self.seen > following.epoch:
            self.gather(now)
        if self._request is None and self._agenda.is_due(now):
            return self._ask(view, signature, self.holds.held(now), now)
        return None

    def _missed_at(self, view: View, now: float) -> float:
        """When ring members that are not in count as lost: whom this node never met may still be on its way."""
        lost = self._following.lost(view)
        known = {gone.facts.id for gone in view.departed}
        if lost and not self._following.downs and known.isdisjoint(lost):
            return max(now, self._following.since + self._timing.start_settle)
        return now

    def _note_change(self, view: View, signature: _Signature, now: float) -> None:
        noticed, self._noticed = self._noticed, signature
        first = noticed is None
        if noticed is not None and signature.mesh != noticed.mesh:
            # Tried anew whenever the mesh is another one.
            self.backoff.forget()
            self._retry_at = now
        layout = self._following.layout
        if is_leaving(view, layout):
            self._cause = "a machine is about to leave"
            self._agenda.soon(now)
        elif self._following.epoch == NO_EPOCH and first:
            self._agenda.settle(now, self._timing.start_settle)
        else:
            self._cause = self._cause or "the machines have changed"
            self._agenda.settle(now)

    def _check_deadlines(self, view: View, now: float) -> None:
        following, layout = self._following, self._following.layout
        if layout is None or following.broken(view) or following.api_key is not None:
            self._accept_by = None
            return
        if self._accept_by is not None and now >= self._accept_by:
            self._accept_by = None
            missing = [m for m in layout.ring if m.id != self._me and m.id not in self.accepted]
            for member in missing:
                until = now + 5 * self._timing.accept
                self.holds.hold(member.id, f"{member.name} does not answer the coordinator", until)
                following.overdue = f"{member.name} did not accept epoch {following.epoch.number}"
        if following.phase(view) is Phase.STARTING and now >= self._start_by(layout):
            following.overdue = f"not served within {now - following.since:.0f} s"
        if following.overdue:
            self.failed(following.overdue, now)

    def _start_by(self, layout: Layout) -> float:
        """What the layout takes the place of may drain first."""
        following = self._following
        return following.since + following.propose.drain_s + self._timing.start_limit(layout)

    def _signature(self, view: View, now: float) -> _Signature:
        able = [facts for facts in view.facts if facts.role == "worker"]
        ids = {facts.id for facts in able}
        cuts = frozenset(pair for pair in view.cuts if pair[0] in ids and pair[1] in ids)
        free = tuple(d.free_bytes for facts in able for d in facts.devices)
        return _Signature((tuple(concerns(f) for f in able), cuts), frozenset(self.holds.held(now)), free)

    def _running(self, view: View) -> Propose | None:
        """What could go on as it is: ours, unless only another one serves."""
        mine = self._following.propose if self._following.is_intact(view) else None
        other = self._claims.running(view, None if mine is not None else self._following.layout)
        if mine is None or (other is not None and self._claims.is_served(other) and self._following.api_key is None):
            return other or mine
        return mine

    def _ask(self, view: View, signature: _Signature, excluded: dict[NodeId, str], now: float) -> NeedPlan:
        self._agenda.clear()
        self._requests += 1
        cause, self._cause = self._cause, ""
        self._request = _Request(self._requests, now, signature, excluded, cause)
        running = self._running(view)
        current = running.layout if running is not None else None
        return NeedPlan(self._requests, view.facts, current, excluded, view.cuts)

    def planned(self, answer: Planned, view: View, now: float) -> NeedPlan | Propose | None:
        """What follows from a layout: something to propose or to adopt, another question, or nothing to do."""
        request = self._request
        if request is None or request.id != answer.request_id:
            return None
        self._request = None
        if answer.layout is None and request.excluded:
            # Better a machine that failed before than no layout at all; the back-off still applies.
            self._cause = request.cause
            return self._ask(view, request.signature, {}, now)
        layout = answer.layout
        if layout is not None and any(share.id not in view for share in layout.ring):
            self._cause = request.cause
            self._agenda.soon(now)  # somebody went while we planned
            return None
        self._considered = request.signature
        self._agenda.clear()
        self.excluded = {**answer.excluded, **request.excluded}
        reason = "; ".join(part for part in (request.cause, answer.reason) if part)[:1024]
        keep = self._running(view)
        if keep is not None and (keep.layout is None or (layout is not None and layout.shape() == keep.layout.shape())):
            return self._keep(keep)
        if keep is not None and layout is None and not is_leaving(view, keep.layout):
            return self._keep(keep)
        if layout is not None and self.backoff.is_exhausted(layout.shape()):
            reason = f"FAILED: {self.backoff.story(layout.shape())}"[:1024]
            layout = None
        mine = self._following
        if layout is None and mine.layout is None and mine.propose.reason == reason and self.seen == mine.epoch:
            return None
        drain_s = mine.time_to_drain(self._timing.drain, view, now)
        return Propose(self._next_epoch(), layout, reason, self.excluded, drain_s=drain_s)

    def _keep(self, keep: Propose) -> Propose | None:
        mine = self._following.propose
        if keep.epoch == mine.epoch and self.seen <= mine.epoch:
            return None
        if keep.epoch > mine.epoch and keep.epoch >= self.seen:
            return keep
        # Whoever ran another one until now may finish what that has begun.
        drain_s = self._timing.drain
        return Propose(self._next_epoch(), keep.layout, keep.reason, self.excluded, lifts=keep.epoch, drain_s=drain_s)

    def _next_epoch(self) -> Epoch:
        return Epoch(max(self.seen, self._following.epoch).number + 1, self._me)
