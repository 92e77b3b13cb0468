"""Who hosts: proposals, epochs, fencing. Pure.

One node coordinates: see :func:`mesh.election.coordinate.rightful`. It has a layout planned and proposes it under a
number higher than any it has seen; everyone follows only what is newer than what it follows. That alone keeps two
layouts from mixing. Which of them survives when a parted mesh heals is the coordinator's to decide: a proposal from
anybody else waits while the layout followed is well.

Messages are lost only with the link that carries them, so after every ``LinkUp`` each side says again where it stands.
"""

from __future__ import annotations

from msgspec.structs import replace

from mesh.election.claims import Claims, is_plausible
from mesh.election.coordinate import Coordination, Timing, rightful, workers
from mesh.election.damping import StandIn
from mesh.election.events import (
    Adopt,
    Effect,
    EngineFailed,
    EngineListening,
    EngineServing,
    Event,
    LinkUp,
    NeedPlan,
    Planned,
    Received,
    Remember,
    Shutdown,
    Status,
    Tick,
    ViewChanged,
    WorkersReady,
)
from mesh.election.following import Engine, Following, Phase, departure
from mesh.election.routing import Routing
from mesh.membership.events import Broadcast, Send
from mesh.membership.view import View
from mesh.wire.facts import NO_EPOCH, Epoch, NodeId
from mesh.wire.messages import Accepted, Control, EngineDown, Propose, Rejected, Serving, WorkerReady

FLAPS = frozenset({"crashed", "unreachable", "restarted"})
"""Ways to go that, repeated, earn a hold-off. Who leaves on purpose may come and go."""
ELECTION = (Propose, Accepted, Rejected, Serving, WorkerReady, EngineDown)


class Election:
    """One node's part in the election. ``handle(event, now)`` gives effects, to be carried out in order.

    Args:
        me: this node.
        seen: the number last given to :class:`Remember`, 0 on a new disk. Older epochs are refused from the start.
        jitter: 0 to 1, drawn once per node: spreads back-off.
    """

    def __init__(self, me: NodeId, *, seen: int = 0, jitter: float = 0.5, timing: Timing | None = None) -> None:
        self._me = me
        self._floor = Epoch(seen, "")
        self._timing = timing or Timing()
        self._following = Following(me)
        self._claims = Claims()
        self._coordination = Coordination(me, self._following, self._claims, self._timing, jitter, self._floor)
        self._view: View | None = None
        self._leader: NodeId | None = None
        """Who coordinates, by our view."""
        self._routing = Routing(self._following, self._timing.stable)
        self._stand_in = StandIn(self._timing.patience)
        self._stopped = False
        self._led = False
        self._refresh_at = 0.0
        self._now = 0.0
        self._out: list[Effect] = []

    # -- questions -----------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch:
        return self._following.epoch

    def may_carry(self, peer: NodeId, epoch: Epoch) -> bool:
        """Fencing: whether ``peer`` hosts the epoch this node follows, and means that one."""
        return peer == self._following.host and self._following.covers(epoch)

    def may_push(self, peer: NodeId, epoch: Epoch) -> bool:
        """Fencing: whether ``peer`` comes right before this worker in the ring it follows, and means that one."""
        layout = self._following.layout
        return layout is not None and layout.successor(peer) == self._me and self._following.covers(epoch)

    def covers(self, epoch: Epoch) -> bool:
        """Whether ``epoch`` names what this node follows, be it by an earlier number of the same running layout."""
        return self._following.covers(epoch)

    def status(self) -> Status:
        """What to tell people."""
        following, view = self._following, self._view
        if view is None:
            return Status("electing", following.epoch, "starting", None, {}, None)
        phase = following.phase(view)
        reason = following.propose.reason
        if phase is Phase.ELECTING:
            reason = following.broken(view) or "looking for other machines"
        known = self._coordination.excluded if self._leads() else self._coordination.holds.held(self._now)
        excluded = {**following.propose.excluded, **known}
        return Status(phase.value, following.epoch, reason, following.layout, excluded, self._leader)

    def next_timer(self) -> float | None:
        """When to send :class:`Tick` at the latest."""
        now = self._now
        view = self._view
        if view is None or self._stopped:
            return None
        times: list[float] = []
        if self._leads():
            times += self._coordination.timers(view, now)
        else:
            times += [at + wait for at, wait in [(self._claims.oldest_held(), self._timing.hold)] if at is not None]
            times += [] if self._stand_in.at is None else [self._stand_in.at]
        served, stable_at = self._routing.served, self._routing.stable_at
        if served is not None and served.host == self._me:
            times.append(self._refresh_at)
        if stable_at is not None:
            times.append(stable_at)
        return min(times, default=None)

    # -- events --------------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        if self._stopped or (isinstance(event, Received) and not isinstance(event.message, ELECTION)):
            return []
        self._now = now
        self._out = []
        match event:
            case ViewChanged(view):
                self._view_changed(view, now)
            case LinkUp(peer):
                self._tell(peer)
            case Received(peer, message):
                self._received(peer, message, now)
            case Planned():
                if self._view is not None and self._leads():
                    self._decide(self._coordination.planned(event, self._view, now), now)
            case EngineListening(epoch):
                self._engine_listening(epoch)
            case EngineServing(epoch, api_key):
                self._engine_serving(epoch, api_key, now)
            case EngineFailed(epoch, reason):
                self._engine_failed(epoch, reason, now)
            case Shutdown():
                self._stopped = True
                self._out += self._routing.close("this machine is shutting down")
                return self._out
            case Tick():
                pass
        self._review(now)
        return self._out

    def _view_changed(self, view: View, now: float) -> None:
        old, self._view, self._leader = self._view, view, rightful(view)
        self._following.note_boots(view)
        self._claims.prune(view)
        for facts in view.facts:
            if facts.id != self._me and (old is None or facts.id not in old):
                self._tell(facts.id)  # it came back on a link that never broke, and missed what was said meanwhile
        if old is not None:
            for facts in workers(view):
                if facts.id not in old:
                    self._coordination.note_cause(f"{facts.name} joined")
            for gone in view.departed:
                if gone.facts.id not in old:
                    continue
                if gone.facts.role == "worker":
                    self._coordination.note_cause(departure(view, gone.facts.id))
                if gone.reason in FLAPS:
                    self._coordination.holds.strike(gone.facts.id, f"{gone.facts.name} keeps going away", now)

    def _tell(self, peer: NodeId) -> None:
        """Say where we stand; what an earlier link carried may be lost."""
        following = self._following
        if following.epoch == NO_EPOCH:
            return
        held_off = self._coordination.holds.told(self._now)
        self._out += [Send(peer, replace(following.propose, held_off=held_off)), *self._progress(peer)]

    def _progress(self, peer: NodeId) -> list[Effect]:
        """How far our part of the epoch has come, for ``peer``."""
        following = self._following
        out: list[Effect] = []
        if peer == self._me:
            return out
        if following.api_key is not None and following.host == self._me:
            out.append(Send(peer, Serving(following.epoch, following.api_key)))
        if following.engine is Engine.LISTENING and following.host == peer:
            out.append(Send(peer, WorkerReady(following.epoch)))
        if following.engine is Engine.DOWN:
            out.append(Send(peer, EngineDown(following.epoch, following.downs.get(self._me, "")[:1024])))
        return out

    # -- messages ------------------------------------------------------------------------------------------------------

    def _received(self, sender: NodeId, message: Control, now: float) -> None:
        if self._view is None or sender not in self._view or not isinstance(message, ELECTION):
            return
        if not is_plausible(message, max(self._coordination.seen, self._following.epoch)):
            return
        match message:
            case Propose():
                self._coordination.holds.hear(message.held_off, now)
                self._proposed(sender, replace(message, held_off={}), self._view, now)
            case Accepted(epoch):
                if epoch == self._following.epoch:
                    self._coordination.accepted.add(sender)
                    self._claims.follows.pop(sender, None)
            case Rejected(epoch, newest):
                self._rejected(sender, epoch, newest)
            case Serving():
                self._serving(sender, message)
            case WorkerReady(epoch):
                self._claims.ready[sender] = epoch
                self._check_ready()
            case EngineDown(epoch, reason):
                if self._following.covers(epoch):
                    self._ring_member_down(sender, reason, now)
            case _:
                pass

    def _is_newer(self, epoch: Epoch) -> bool:
        return epoch > self._following.epoch and epoch >= self._floor

    def _proposed(self, sender: NodeId, propose: Propose, view: View, now: float) -> None:
        following = self._following
        self._coordination.seen = max(self._coordination.seen, propose.epoch)
        if propose.epoch == following.epoch:
            self._out.append(Send(sender, Accepted(propose.epoch)))
        elif not self._is_newer(propose.epoch):
            self._out.append(Send(sender, Rejected(propose.epoch, max(following.epoch, self._floor))))
            if following.epoch != NO_EPOCH:
                self._out.append(Send(sender, following.propose))
            self._claims.follows[sender] = propose
            if self._leads() and not following.is_intact(view):
                self._coordination.gather(now)
        elif self._may_follow(sender, propose, view):
            self._follow(sender, propose, now)
        elif self._claims.hold(sender, propose, now):
            # The sender may not know what runs here, and could let it go on under a newer number.
            self._out.append(Send(sender, following.propose))
            if self._leads():
                self._coordination.gather(now)
            elif self._leader is not None and self._leader != sender:
                # The coordinator may not be able to hear the sender.
                self._out.append(Send(self._leader, Rejected(following.epoch, propose.epoch)))

    def _follow(self, sender: NodeId, propose: Propose, now: float) -> None:
        """Adopt what ``sender`` proposed, and see to it that nobody is left with something else, unknowing."""
        self._out.append(Send(sender, Accepted(propose.epoch)))
        self._adopt(propose, now)
        if self._leads():
            self._out.append(Broadcast(propose))  # whoever proposed it may have gone before all were told
            self._coordination.reconsider()
        elif self._leader is not None and self._leader != sender:
            self._out.append(Send(self._leader, propose))

    def _may_follow(self, sender: NodeId, propose: Propose, view: View) -> bool:
        """Whether something newer is followed at once, or the coordinator is to decide first."""
        following, leader = self._following, self._leader
        if not following.is_intact(view):
            return True
        if following.layout is not None and any(share.id == sender for share in following.layout.ring):
            return True  # everyone proposes what it follows: the sender's part in ours is over
        if propose.layout is None and following.api_key is None and leader == sender == propose.epoch.coordinator:
            return True  # it gives up what only starts, and we may have missed why
        if propose.layout is None or following.layout is None:
            return False
        if propose.layout.shape() == following.layout.shape():
            return True
        author = propose.epoch.coordinator
        if leader == self._me:
            # Two who both think they lead: the lower id has its way, whatever each knows of cuts.
            return author < self._me and any(facts.id == author for facts in workers(view))
        return leader in (sender, author)

    def _rejected(self, sender: NodeId, epoch: Epoch, newest: Epoch) -> None:
        coordination = self._coordination
        is_news = newest > coordination.seen
        coordination.seen = max(coordination.seen, newest)
        leader = self._leader
        if is_news and leader is not None and leader not in (self._me, sender):
            self._out.append(Send(leader, Rejected(epoch, newest)))

    def _serving(self, sender: NodeId, message: Serving) -> None:
        self._claims.servings[sender] = message
        following = self._following
        if sender == following.host and following.covers(message.epoch):
            following.downs.pop(sender, None)  # a new process of it took its part up again
        elif message.epoch > following.epoch:
            # We missed something: the answer to an old proposal is the newest.
            self._out.append(Send(sender, following.propose))
        self._check_serving()

    def _check_serving(self) -> None:
        following = self._following
        if following.host is None or following.host == self._me or following.downs:
            return
        serving = self._claims.servings.get(following.host)
        if serving is not None and following.covers(serving.epoch):
            following.api_key = serving.api_key

    def _check_ready(self) -> None:
        following = self._following
        is_mine = following.layout is not None and following.host == self._me
        if not is_mine or following.ready_told or following.engine is Engine.DOWN:
            return
        ready = {node for node, epoch in self._claims.ready.items() if following.covers(epoch)}
        if following.layout is not None and all(share.id in ready for share in following.layout.workers):
            following.ready_told = True
            self._out.append(WorkersReady(following.epoch))

    # -- the local engine ----------------------------------------------------------------------------------------------

    def _engine_listening(self, epoch: Epoch) -> None:
        following = self._following
        if following.covers(epoch) and following.engine is not Engine.DOWN:
            following.engine = Engine.LISTENING  # said again and again until the host has come
            if following.host is not None and following.host != self._me:
                self._out.append(Send(following.host, WorkerReady(following.epoch)))

    def _engine_serving(self, epoch: Epoch, api_key: str, now: float) -> None:
        following = self._following
        if following.covers(epoch) and following.host == self._me and following.engine is not Engine.DOWN:
            following.api_key = api_key
            self._say_serving(now)

    def _say_serving(self, now: float) -> None:
        key = self._following.api_key
        if key is not None and self._following.host == self._me:
            self._refresh_at = now + self._timing.refresh
            self._out.append(Broadcast(Serving(self._following.epoch, key)))

    def _engine_failed(self, epoch: Epoch, reason: str, now: float) -> None:
        following = self._following
        if following.covers(epoch) and following.engine is not Engine.DOWN:
            following.engine = Engine.DOWN
            self._out.append(Broadcast(EngineDown(following.epoch, reason[:1024])))
            self._ring_member_down(self._me, reason, now)

    def _ring_member_down(self, node: NodeId, reason: str, now: float) -> None:
        following = self._following
        if following.layout is None or node in following.downs:
            return
        share = next((share for share in following.layout.ring if share.id == node), None)
        if share is None:
            return
        # The host's engine dies of its workers' deaths: it is to blame only when nobody else is.
        if not following.downs and self._view is not None and not following.lost(self._view):
            self._coordination.holds.strike(node, f"engine on {share.name}: {reason}", now)
        following.downs[node] = f"engine on {share.name}: {reason}"
        following.api_key = None
        self._coordination.failed(following.downs[node], now)

    # -- deciding ------------------------------------------------------------------------------------------------------

    def _decide(self, decision: NeedPlan | Propose | None, now: float) -> None:
        if isinstance(decision, NeedPlan):
            self._out.append(decision)
        elif isinstance(decision, Propose):
            self._adopt(decision, now)
            self._out.append(Broadcast(decision))
            self._coordination.expect_acceptance(now)

    def _adopt(self, propose: Propose, now: float) -> None:
        following, coordination = self._following, self._coordination
        coordination.seen = max(coordination.seen, propose.epoch)
        known = max(following.epoch, self._floor).number
        drain_s = 0.0 if self._view is None else following.time_to_drain(propose.drain_s, self._view, now)
        lifted = following.adopt(propose, now, drain_s)
        if self._view is not None:
            following.note_boots(self._view)
        if propose.epoch.number <= self._floor.number:
            # The others may have missed none of it, and would go on under a number that an engine has died in.
            following.note_own_restart()
        self._claims.settle(propose.epoch)
        self._stand_in.end()
        if propose.epoch.number > known:
            self._out.append(Remember(propose.epoch.number))
        lifts = propose.lifts if lifted else NO_EPOCH
        self._out.append(Adopt(propose.epoch, propose.layout, propose.reason, lifts, 0.0 if lifted else drain_s))
        if lifted:
            # Others may come from elsewhere and know nothing of what went on under the old number.
            for peer in self._view.facts if self._view is not None else ():
                self._out += self._progress(peer.id)
        self._check_serving()
        self._check_ready()

    def _leads(self) -> bool:
        return self._stand_in.is_active or self._leader == self._me

    def _review(self, now: float) -> None:
        """After every event: what follows from where we stand now."""
        view, following, coordination = self._view, self._following, self._coordination
        if view is None:
            return
        leads = self._leads()
        if leads and not self._led and following.epoch != NO_EPOCH and not following.broken(view):
            # The last coordinator may have died half way through telling.
            self._out.append(Broadcast(following.propose))
            coordination.expect_acceptance(now)
        self._led = leads
        if leads:
            self._stand_in.rest()
            self._decide(coordination.review(view, now), now)
        else:
            coordination.stand_down()
            self._follow_for_want_of_better(view, now)
            self._consider_standing_in(view, now)
        self._out += self._routing.update(view, now)
        if self._routing.becomes_stable(now):
            self._stand_in.all_is_well()
            coordination.backoff.forget()
        if self._routing.served is not None and now >= self._refresh_at:
            self._say_serving(now)

    def _follow_for_want_of_better(self, view: View, now: float) -> None:
        oldest = self._claims.oldest_held()
        newest = self._claims.newest_held()
        if oldest is None or newest is None:
            return
        if now >= oldest + self._timing.hold or not self._following.is_intact(view):
            sender, propose = newest
            self._claims.held.clear()
            if self._is_newer(propose.epoch) and (propose.layout is not None or not self._following.is_intact(view)):
                self._follow(sender, propose, now)

    def _consider_standing_in(self, view: View, now: float) -> None:
        able = [facts.id for facts in workers(view)]
        if self._me not in able or self._following.phase(view) is not Phase.ELECTING:
            self._stand_in.rest()
        elif self._stand_in.begins(now):
            self._decide(self._coordination.review(view, now), now)
        else:
            self._stand_in.wait(able.index(self._me), max(now, self._coordination.retry_at))
