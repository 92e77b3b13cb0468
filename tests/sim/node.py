"""One simulated machine: the real cores, wired as :mod:`mesh.node.node` wires them, over a network and an engine that
are not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from mesh.election import events as el
from mesh.election.core import ELECTION, Election
from mesh.membership import events as mb
from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.membership.door import Admitted
from mesh.membership.lapse import OUT
from mesh.proxy.core import Limits
from mesh.supervise import events as sv
from mesh.wire.facts import NO_EPOCH, Epoch, NodeFacts, NodeId
from mesh.wire.messages import Control, Join, LoadProgress, WorkerReady
from tests.sim.admission import WALL, Disk, House, let_in
from tests.sim.engine import Engine, Process
from tests.sim.fakes import plan
from tests.sim.ingress import Answer, Ingress, Question
from tests.sim.network import DiedError
from tests.sim.pump import SimPump

if TYPE_CHECKING:
    from tests.sim.world import World


class Node:
    """``deliver``, ``link_up`` and ``link_down`` are the network's; ``crash``, ``stall`` and so on the world's.

    Args:
        rate, offset: of its clock; no two clocks of a mesh agree.
    """

    membership: Membership
    election: Election
    members: SimPump
    electing: SimPump
    engine: Engine
    ingress: Ingress

    def __init__(self, world: World, facts: NodeFacts, disk: Disk, *, rate: float = 1.0, offset: float = 0.0) -> None:
        self.world = world
        self.facts = facts
        self.disk = disk
        self.disk.wrote = self._wrote
        self.rate, self.offset = rate, offset
        self.wall_offset = 0.0
        self.boots = 0
        self.is_running = False
        self.is_member = False
        """Its cores run; else it asks to be let in, or is down."""
        self.has_left = False
        self.was_expelled = False
        self.stalled_until = 0.0
        self.fuse: int | None = None
        """Effects and writes until it dies in the middle of things."""
        self.house: House | None = None
        self._launched = NO_EPOCH
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._floor = float("-inf")

    @property
    def id(self) -> NodeId:
        return self.facts.id

    @property
    def is_awake(self) -> bool:
        return self.is_running and self.world.clock.now >= self.stalled_until

    @property
    def wanted(self) -> tuple[NodeId, ...]:
        return () if self.house is None else self.house.wanted

    # -- its clocks ----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Monotonic, and off by some percent."""
        return max(self._floor, self.offset + self.rate * self.world.clock.now)

    def true_time(self, now: float) -> float:
        return (now - self.offset) / self.rate

    def not_before(self, now: float) -> None:
        """Rounding must not make a timer ring too early."""
        self._floor = max(self._floor, now)

    def wall(self) -> float:
        """Seconds since 1970, as this machine has it; may jump."""
        return WALL + self.world.clock.now + self.wall_offset

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.boots += 1
        self.is_running, self.is_member, self.stalled_until, self._inbox = True, False, 0.0, []
        self.has_left = self.was_expelled = False
        self.fuse = None
        self.world.note(f"{self.id[0]} starts")
        record = self.disk.record
        if record is None or record.expelled:
            self._seek(self.boots)
        else:
            self.do(self.boots, self._begin)

    def _begin(self) -> None:
        world, parts, record = self.world, self.world.parts, self.disk.record
        assert record is not None
        self.is_member = True
        self.facts = replace(self.facts, version=self.facts.version + 1, draining=False)
        self._floor = float("-inf")
        self._launched = NO_EPOCH
        self.disk.record = record.started(self.wall())
        self.membership = parts.membership(self.facts, self.disk.record.boot << BOOT_SHIFT)
        self.election = parts.election(self.id, seen=record.epoch, jitter=world.rng.random())
        self._view_is_old = False
        self.members = SimPump(
            self.membership, self.carrier(self._membership_effect), mb.Tick, self, after=self._tell_view
        )
        self.electing = SimPump(self.election, self.carrier(self._election_effect), el.Tick, self)
        self.house = House(self, record)
        self.ingress = Ingress(self, Limits(hold_s=world.hold_s))
        self.engine = Engine(self)
        world.started(self)
        self.members.feed(mb.FactsChanged(self.facts))
        self.electing.feed(el.ViewChanged(self.membership.view()))
        self.later(0.0, 0.5, self._housekeep)

    def _seek(self, boot: int) -> None:
        """No member: ask the owner of a token, again and again."""
        if boot != self.boots or not self.is_running or self.is_member:
            return
        token = self.world.token_for(self)
        inviter = None if token is None else self.world.nodes.get(token.inviter)
        network = self.world.network
        if token is not None and inviter is not None and self.is_awake and network.is_open(self.id, inviter.id):
            join = Join(1, token.secret, self.facts.name)

            def answered(answer: object) -> None:
                if boot == self.boots and self.is_awake and not self.is_member and network.is_open(self.id, inviter.id):
                    why = let_in(self.disk, answer, token.mesh, self.wall())
                    if why:
                        self.world.note(f"{self.id[0]} is refused: {why}")
                        self.world.forget_token(self)
                    else:
                        self.do(boot, self._begin)

            self.world.clock.after(3 * network.latency(), self.world.knock, token, join, self.disk.key, answered)
        if token is not None:
            token.tries += 1
            if token.tries > 3:
                self.world.forget_token(self)  # its owner asks somebody else
        self.world.clock.after(0.5 + 0.5 * self.world.rng.random(), self._seek, boot)

    def crash(self, boot: int | None = None) -> None:
        """SIGKILL: not a word to anybody."""
        if self.is_running and boot in (None, self.boots):
            was_member, self.is_running, self.fuse = self.is_member, False, None
            if was_member:
                for pump in (self.members, self.electing, self.ingress.pump):
                    pump.stop()
                self.engine.vanish()
                self.world.gone(self)
            self.world.network.vanish(self.id)
            self.is_member = False

    def leave(self) -> None:
        """As ``mesh down`` does."""
        if self.is_awake and self.is_member and not self.has_left:
            self.has_left = True
            self.members.feed(mb.Leave("asked to"))
            self.electing.feed(el.Shutdown())
            self.electing.stop()
            self.members.stop()
            self.ingress.stop()
            self.engine.post(sv.Shutdown())
            self.later(0.3, 0.0, self.crash)

    def expelled(self, why: str) -> None:
        """The mesh does not want us any more: the process ends, and its record says so."""
        self.world.note(f"{self.id[0]} is expelled: {why}")
        self.was_expelled = True
        self.world.forget_token(self)
        if self.disk.record is not None:
            self.disk.record = self.disk.record.without_us()
        self.later(0.0, 0.0, self.leave)
        self.later(0.4, 0.0, self.crash)
        self.world.clock.after(1.0, self.world.asks_again, self)

    def drain(self) -> None:
        if self.is_awake and self.is_member:
            self.facts = replace(self.facts, version=self.facts.version + 1, draining=True)
            self.members.feed(mb.FactsChanged(self.facts))

    def stall(self, seconds: float) -> None:
        """SIGSTOP and, later, SIGCONT."""
        if self.is_awake:
            self.stalled_until = self.world.clock.now + seconds
            self.world.clock.at(self.stalled_until, self.resume, self.boots)

    def resume(self, boot: int) -> None:
        if boot != self.boots or not self.is_awake:
            return
        # What the kernel kept for us comes first or last, as it happens.
        pumps = (self.members, self.electing, self.engine.pump, self.ingress.pump) if self.is_member else ()
        inbox, self._inbox = self._inbox, []
        try:
            if self.world.rng.random() < 0.5:
                for pump in pumps:
                    pump.ring_if_due()
            for do, args in inbox:
                if boot == self.boots and self.is_running:
                    do(*args)
            for pump in pumps:
                pump.ring_if_due()
        except DiedError as died:
            died.end()

    def defer(self, do: Callable[..., None], *args: Any) -> None:
        """Asleep: later."""
        self._inbox.append((do, args))

    def do(self, boot: int, do: Callable[..., None], *args: Any) -> None:
        """In this run of the process, when it is awake; dying is the end of it, and of nothing else."""
        if boot != self.boots or not self.is_running:
            return
        if not self.is_awake:
            self.defer(do, *args)
            return
        try:
            do(*args)
        except DiedError as died:
            died.end()

    def later(self, least: float, more: float, do: Callable[..., None], *args: Any) -> None:
        self.world.clock.after(least + more * self.world.rng.random(), self.do, self.boots, do, *args)

    def carrier(self, carry_out: Callable[[Any], None]) -> Callable[[Any], None]:
        """Carries out effects while this run of the process lives."""
        boot = self.boots

        def carry(effect: Any) -> None:
            if self.boots != boot or not self.is_running:
                raise DiedError(lambda: None)
            if self.fuse is not None:
                self._burn()
            carry_out(effect)

        return carry

    def _burn(self) -> None:
        assert self.fuse is not None
        self.fuse -= 1
        if self.fuse < 0:
            boot = self.boots
            self.world.died_midway(self)
            raise DiedError(lambda: self.crash(boot))

    def _wrote(self) -> None:
        if self.fuse is not None and self.is_member:
            self._burn()

    def _housekeep(self) -> None:
        self.world.network.housekeeping(self.id)
        self.later(0.5, 0.0, self._housekeep)

    def has_heard_of_revoking(self, key: bytes) -> bool:
        """Does it know, or its disk, that ``key`` was revoked once?"""
        known = self.house.roster if self.house is not None else self.disk.record
        return known is not None and any(revocation.subject == key for revocation in known.revocations)

    # -- from the network ----------------------------------------------------------------------------------------------

    def greets(self, other: Node) -> Admitted | None:
        """Does our door let ``other`` in, by what its Hello says? Whoever is refused for good learns it."""
        if self.house is None or other.house is None or not self.is_member or not other.is_member or self.has_left:
            return None
        verdict = self.house.greets(other.house.hello(), other.disk.key.public)
        if isinstance(verdict, Admitted):
            return verdict
        if verdict.code in ("revoked", "not-a-member"):
            self.world.shut_out(self, other, verdict.code)
            other.later(0.0, 0.01, other.expelled, verdict.message)
        return None

    def link_up(self, other: Node, verdict: Admitted) -> None:
        assert self.house is not None
        self.world.admitted_link(self, other)
        self.house.admit(other.id, verdict)
        self.members.feed(mb.LinkUp(other.id, other.facts))
        self.electing.feed(el.LinkUp(other.id))
        self.house.admitted(other.id, verdict)

    def link_down(self, peer: NodeId, reason: str) -> None:
        self.do(self.boots, self._link_down, peer, reason)

    def _link_down(self, peer: NodeId, reason: str) -> None:
        if not self.is_member:
            return
        if reason in OUT:
            self.members.feed(mb.Expelled(peer))
        cause = mb.Down.LOCAL if reason in OUT or reason == "local" else mb.Down(reason)
        self.members.feed(mb.LinkDown(peer, cause))
        self.engine.lost(peer)
        self.ingress.lost(peer)

    def deliver(self, sender: NodeId, message: Any, link: Any) -> None:
        if not self.is_running:
            return
        if not self.is_awake:
            self.defer(self.deliver, sender, message, link)
            return
        if self.id not in link.ends or not self.is_member:
            return  # the link broke while we slept
        try:
            self._deliver(sender, message)
        except DiedError as died:
            died.end()

    def _deliver(self, sender: NodeId, message: Any) -> None:
        assert self.house is not None
        if isinstance(message, Question):
            self.ingress.take(message)
        elif isinstance(message, Answer):
            self.ingress.hear(message)
        elif self.house.received(sender, message):
            self.members.feed(mb.Received(sender, message))
            if isinstance(message, ELECTION):  # others are none of its business
                self.electing.feed(el.Received(sender, message))
            elif isinstance(message, LoadProgress) and message.node != self.id:
                self.engine.post(sv.MemberLoading(message.node, self.engine_epoch(message.epoch)))

    def show_out(self, peer: NodeId, reason: str, boot: int) -> None:
        if boot == self.boots and self.is_awake:
            self.world.network.close(self.id, peer, reason)

    def accept_tunnel(self, host: Process) -> None:
        epoch = self.engine_epoch(host.epoch)
        self.engine.accept(host, self.election.may_carry(host.node.id, host.epoch), epoch)

    def send(self, peer: NodeId, message: Control) -> None:
        self.world.network.send(self.id, peer, message)

    def broadcast(self, message: Control, *, but: NodeId | None = None) -> None:
        for peer in self.world.nodes:  # to whom there is no link, nothing is sent
            if peer != but:
                self.world.network.send(self.id, peer, message)

    # -- links -> membership -> election -------------------------------------------------------------------------------

    def _membership_effect(self, effect: mb.Effect) -> None:
        match effect:
            case mb.Send(peer, message):
                self.world.network.send(self.id, peer, message)
            case mb.Broadcast(message):
                self.broadcast(message)
            case _:
                if isinstance(effect, mb.MemberLost):
                    self.world.lost(self, effect.node, effect.reason)
                    if effect.reason != "restarted":  # that one's link is the new process's
                        self.world.network.close(self.id, effect.node, "local")
                self._view_is_old = True

    def _tell_view(self) -> None:
        """After all effects of a batch."""
        is_dying = not self.is_running or (self.fuse is not None and self.fuse < 0)
        if self._view_is_old and not is_dying:
            self._view_is_old = False
            self.electing.feed(el.ViewChanged(self.membership.view()))

    # -- election -> engine and proxy ----------------------------------------------------------------------------------

    def _election_effect(self, effect: el.Effect) -> None:
        match effect:
            case mb.Send(peer, message):
                self.world.network.send(self.id, peer, message)
            case mb.Broadcast(message):
                self.broadcast(message)
            case el.NeedPlan():
                self.later(0.0, 0.05, self._plan, effect)
            case el.Remember(number):
                self._remember(number)
            case el.Adopt():
                self.world.adopted(self, effect)
                self._adopt(effect)
            case el.WorkersReady(epoch):
                layout = self.election.status().layout
                for share in () if layout is None else layout.workers:
                    self.engine.post(sv.MemberReady(share.id, self.engine_epoch(epoch)))
            case el.Served():
                self.world.routed(self, effect)
                self.ingress.serve(self._launched, effect.host)
            case el.Unserved(reason, drain_s):
                self.world.routed(self, effect)
                self.ingress.unserve(reason, drain_s)

    def _remember(self, number: int) -> None:
        """Write it down; on a slow disk the whole process waits, and may die while it does."""
        assert self.disk.record is not None
        after = self.disk.record.at(number)
        wait = self.world.slow_write(self)
        if wait:
            clock, boot = self.world.clock, self.boots
            self.world.note(f"{self.id[0]} waits {wait:.2f} s for its disk")
            if self.world.rng.random() < 0.5:
                self.disk.record = after  # it is there, though nobody knows yet
            self.stalled_until = float("inf")  # nothing else is done here until this step is
            clock.run(clock.now + wait)
            if self.boots != boot or not self.is_running:
                raise DiedError(lambda: None)
            self.stalled_until = clock.now
            clock.after(0.0, self.resume, boot)
        self.disk.record = after
        self._wrote()

    def _adopt(self, adopt: el.Adopt) -> None:
        if adopt.lifts != NO_EPOCH:
            return  # the same layout under a new number: what runs goes on
        self._launched = adopt.epoch
        self.ingress.unserve(adopt.reason or "the engine is starting", adopt.drain_s)
        self.engine.post(sv.Adopt(adopt.epoch, adopt.layout, adopt.drain_s))

    def engine_epoch(self, epoch: Epoch) -> Epoch:
        return self._launched if self.election.covers(epoch) else epoch

    def _plan(self, asked: el.NeedPlan) -> None:
        layout, reason = plan(asked.members, asked.current, asked.excluded, asked.cuts)
        self.electing.feed(el.Planned(asked.request_id, layout, reason))

    # -- engine -> election --------------------------------------------------------------------------------------------

    def rpc_server_listens(self, host: NodeId, message: WorkerReady) -> None:
        self.electing.feed(el.EngineListening(message.epoch))

    def engine_serves(self, epoch: Epoch) -> None:
        self.electing.feed(el.EngineServing(epoch, f"key-{self.id[0]}{epoch.number}"))

    def engine_failed(self, epoch: Epoch, reason: str) -> None:
        self.electing.feed(el.EngineFailed(epoch, reason))

    def loading(self, message: LoadProgress) -> None:
        self.broadcast(message)
