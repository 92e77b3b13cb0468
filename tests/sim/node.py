"""One simulated machine: the real cores, wired as a node wires them, over a fake engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from mesh.election import events as el
from mesh.election.core import Election
from mesh.membership import events as mb
from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeFacts, NodeId
from tests.sim.fakes import plan

if TYPE_CHECKING:
    from tests.sim.world import World


class Engine:
    """What the supervisor of one node runs for one layout: a worker carries for one host, a host opens its tunnels."""

    def __init__(self, epoch: Epoch, layout: Layout) -> None:
        self.epochs = {epoch}
        """More than one after a lift."""
        self.epoch = epoch
        self.layout = layout
        self.carries: Engine | None = None
        """On a worker: the host's engine whose tunnel is open."""
        self.is_alive = True


class Node:
    """``deliver``, ``link_up`` and ``link_down`` are the network's; ``crash``, ``stall`` and so on the world's."""

    def __init__(self, world: World, facts: NodeFacts) -> None:
        self.world = world
        self.facts = facts
        self.remembered = 0
        """On disk."""
        self.boots = 0
        self.is_running = False
        self.has_left = False
        self.stalled_until = 0.0
        self._inbox: list[tuple[str, tuple[Any, ...]]] = []
        self._wakes: list[float | None] = [None, None]
        self.engine: Engine | None = None

    @property
    def id(self) -> NodeId:
        return self.facts.id

    @property
    def is_awake(self) -> bool:
        return self.is_running and self.world.clock.now >= self.stalled_until

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.boots += 1
        now = self.world.clock.now
        self.is_running, self.stalled_until, self._inbox = True, 0.0, []
        self._wakes = [None, None]
        self.has_left = False
        self.facts = replace(self.facts, version=self.facts.version + 1, draining=False)
        self.membership = Membership(self.facts, (self.boots << BOOT_SHIFT) + 1)
        self.election: Election = self.world.make_election(
            self.id, seen=self.remembered, jitter=self.world.rng.random()
        )
        self.engine = None
        self.world.started(self)
        self._elect(el.ViewChanged(self.membership.view()))
        self.world.clock.at(now + self.world.rng.random() * 0.5, self._housekeep, self.boots)

    def crash(self) -> None:
        """SIGKILL: not a word to anybody."""
        if self.is_running:
            self.is_running = False
            self.stop_engine()
            self.world.network.vanish(self.id)

    def leave(self) -> None:
        """As ``mesh leave`` does, without the drain before."""
        if self.is_awake:
            self._member(mb.Leave("asked to"))
            self._elect(el.Shutdown())
            self.has_left = True
            self.world.later(0.3, self.crash)

    def drain(self) -> None:
        if self.is_awake:
            self.facts = replace(self.facts, version=self.facts.version + 1, draining=True)
            self._member(mb.FactsChanged(self.facts))

    def stall(self, seconds: float) -> None:
        """SIGSTOP and, later, SIGCONT."""
        if self.is_awake:
            self.stalled_until = self.world.clock.now + seconds
            self.world.clock.at(self.stalled_until, self._resume, self.boots)

    def _resume(self, boot: int) -> None:
        if boot != self.boots or not self.is_awake:
            return
        # What the kernel kept for us comes first or last, as it happens.
        timers_first = self.world.rng.random() < 0.5
        if timers_first:
            self._tick(0, boot, None)
        inbox, self._inbox = self._inbox, []
        for name, args in inbox:
            getattr(self, name)(*args)
        self._tick(0, boot, None)
        self._tick(1, boot, None)

    def _defer(self, name: str, *args: Any) -> bool:
        if not self.is_running:
            return True
        if not self.is_awake:
            self._inbox.append((name, args))
            return True
        return False

    def _housekeep(self, boot: int) -> None:
        if boot != self.boots or not self.is_running:
            return
        if self.is_awake:
            self.world.network.housekeeping(self.id)
        self.world.clock.after(0.5, self._housekeep, boot)

    # -- from the network ----------------------------------------------------------------------------------------------

    def deliver(self, sender: NodeId, message: Any, link: Any) -> None:
        if self._defer("deliver", sender, message, link):
            return
        if self.id not in link.ends:
            return  # the link broke while we slept
        self._member(mb.Received(sender, message))
        self._elect(el.Received(sender, message))

    def link_up(self, peer: NodeId) -> None:
        self._member(mb.LinkUp(peer, self.world.nodes[peer].facts))
        self._elect(el.LinkUp(peer))

    def link_down(self, peer: NodeId, reason: str) -> None:
        if not self._defer("link_down", peer, reason):
            self._member(mb.LinkDown(peer, mb.Down(reason)))
            self._check_tunnels(peer)

    # -- cores ---------------------------------------------------------------------------------------------------------

    def _member(self, event: mb.Event) -> None:
        effects = self.membership.handle(event, self.world.clock.now)
        changed = False
        for effect in effects:
            match effect:
                case mb.Send() | mb.Broadcast():
                    self._send(effect)
                case mb.MemberLost(node, reason):
                    self.world.lost(self, node, reason)
                    if reason != "restarted":  # that one's link is the new process's
                        self.world.clock.after(0.0, self._drop, node, self.boots)
                    changed = True
                case _:
                    changed = True
        self._arm(0)
        if changed:
            self._elect(el.ViewChanged(self.membership.view()))

    def _drop(self, peer: NodeId, boot: int) -> None:
        if boot == self.boots and self.is_awake:
            self.world.network.close(self.id, peer, "local")

    def _elect(self, event: el.Event) -> None:
        effects = self.election.handle(event, self.world.clock.now)
        for effect in effects:
            match effect:
                case mb.Send() | mb.Broadcast():
                    self._send(effect)
                case el.NeedPlan():
                    self.world.clock.after(self.world.rng.random() * 0.05, self._plan, effect, self.boots)
                case el.Remember(number):
                    self.remembered = number
                case el.Adopt():
                    self.world.adopted(self, effect)
                    self._adopt(effect)
                case el.WorkersReady(epoch):
                    self._open_tunnels(epoch)
                case el.Served() | el.Unserved():
                    self.world.routed(self, effect)
        self._arm(1)

    def _send(self, effect: mb.Send | mb.Broadcast) -> None:
        if isinstance(effect, mb.Send):
            self.world.network.send(self.id, effect.peer, effect.message)
        else:
            for peer in self.world.nodes:
                self.world.network.send(self.id, peer, effect.message)

    def _arm(self, which: int) -> None:
        due = self.membership.next_timer() if which == 0 else self.election.next_timer()
        wake = self._wakes[which]
        if due is not None and (wake is None or due < wake):
            self._wakes[which] = due
            self.world.clock.at(due, self._tick, which, self.boots, due)

    def _tick(self, which: int, boot: int, due: float | None) -> None:
        if boot != self.boots or not self.is_awake:
            return
        if due is not None and self._wakes[which] != due:
            return
        self._wakes[which] = None
        if which == 0:
            self._member(mb.Tick())
        else:
            self._elect(el.Tick())

    def _plan(self, asked: el.NeedPlan, boot: int) -> None:
        if boot != self.boots or self._defer("_plan", asked, boot):
            return
        layout, reason = plan(asked.members, asked.current, asked.excluded, asked.cuts)
        self._elect(el.Planned(asked.request_id, layout, reason))

    # -- the engine ----------------------------------------------------------------------------------------------------

    def _adopt(self, effect: el.Adopt) -> None:
        engine = self.engine
        if effect.lifts != NO_EPOCH and engine is not None and effect.lifts in engine.epochs:
            engine.epoch = effect.epoch
            engine.epochs.add(effect.epoch)
            return
        self.stop_engine()
        layout = effect.layout
        if layout is None or all(m.id != self.id for m in layout.ring):
            return
        self.engine = Engine(effect.epoch, layout)
        if layout.host != self.id:
            self._after(0.05, 0.3, self._listening, self.engine)

    def _after(self, least: float, more: float, do: Any, engine: Engine) -> None:
        self.world.clock.after(least + more * self.world.rng.random(), do, engine)

    def _listening(self, engine: Engine) -> None:
        if self._defer("_listening", engine) or not engine.is_alive:
            return
        if self.world.engine_fails(self):
            self.fail_engine(engine, "out of luck")
        else:
            self._elect(el.EngineListening(engine.epoch))

    def _open_tunnels(self, epoch: Epoch) -> None:
        engine = self.engine
        assert engine is not None and epoch in engine.epochs, "WorkersReady without an engine to start"
        for share in engine.layout.workers:
            # The real engine opens several connections while it loads.
            for least in (0.02, 0.1, 0.2):
                self._after(least, 5 * least, self.world.nodes[share.id].accept_tunnel, engine)
        self._after(0.3, 1.5, self._loaded, engine)

    def accept_tunnel(self, host: Engine) -> None:
        """On the worker: the host's tunnel arrives."""
        peer = host.layout.host
        if self._defer("accept_tunnel", host) or not host.is_alive or not self.world.network.is_open(peer, self.id):
            return
        if self.election.may_carry(peer, host.epoch):
            self.world.carried(self, host)
            if self.engine is not None and host.epoch in self.engine.epochs:
                self.engine.carries = host

    def _loaded(self, engine: Engine) -> None:
        if self._defer("_loaded", engine) or not engine.is_alive:
            return
        for share in engine.layout.workers:
            worker = self.world.nodes[share.id]
            if worker.engine is None or worker.engine.carries is not engine:
                self.fail_engine(engine, f"no token came back from {share.name}")
                return
            if not worker.is_awake or not self.world.network.is_open(self.id, share.id):
                self._after(0.5, 0.5, self._loaded, engine)  # hangs until it goes on, or the link breaks
                return
        if self.world.engine_fails(self):
            self.fail_engine(engine, "out of luck")
            return
        self.world.serves(self, engine)
        self._elect(el.EngineServing(engine.epoch, f"key-{self.id[0]}{engine.epoch.number}"))

    def fail_engine(self, engine: Engine, reason: str) -> None:
        """The process ended by itself."""
        if self._defer("fail_engine", engine, reason) or not engine.is_alive or self.engine is not engine:
            return
        self.stop_engine()
        self._elect(el.EngineFailed(engine.epoch, reason))

    def stop_engine(self) -> None:
        engine, self.engine = self.engine, None
        if engine is None:
            return
        engine.is_alive = False
        if engine.carries is not None:
            # The host's engine dies of a closed tunnel, once it learns of it.
            host = self.world.nodes[engine.layout.host]
            if self.is_running and self.world.network.is_open(self.id, host.id):
                self._after(0.01, 0.1, self.accept_tunnel, engine.carries)  # it tries once more
                self._after(0.02, 0.1, lambda e: host.fail_engine(e, "tunnel closed"), engine.carries)

    def _check_tunnels(self, peer: NodeId) -> None:
        """A link broke, and the tunnels in it."""
        engine = self.engine
        if engine is None:
            return
        if engine.layout.host == self.id and any(m.id == peer for m in engine.layout.workers):
            worker = self.world.nodes[peer].engine
            if worker is not None and worker.carries is engine:
                worker.carries = None
            self._after(0.0, 0.2, lambda e: self.fail_engine(e, f"lost the tunnel to {peer[0]}"), engine)
