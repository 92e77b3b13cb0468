"""The engine of one simulated node: the real supervision core over processes that are not there.

A process takes time to start, to load and to end, fails when the world says so, and dies with its node. A worker's
carries for hosts through tunnels that are opened, fenced and broken as real ones are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesh.supervise import events as ev
from mesh.supervise.core import State
from mesh.supervise.reasons import ProcessKind
from mesh.wire.facts import Epoch, Layout, NodeId
from mesh.wire.messages import LoadProgress
from tests.sim.pump import SimPump

if TYPE_CHECKING:
    from tests.sim.node import Node


class Process:
    """An rpc-server or a llama-server, until it ``is_alive`` no more."""

    def __init__(self, node: Node, kind: ProcessKind, epoch: Epoch, layout: Layout) -> None:
        self.node = node
        self.boot = node.boots
        self.kind = kind
        self.epoch = epoch
        """By which it was started; a lift changes nothing here."""
        self.layout = layout
        self.is_alive = True
        self.carries: Process | None = None
        """Of an rpc-server: the llama-server whose tunnel leads to it."""
        self.answers = False
        """Of a llama-server: a token has come through the ring."""

    def why_broken(self) -> str:
        """Why a llama-server's ring gives no token: whoever lost it, in one letter; empty when it is whole."""
        for share in self.layout.workers:
            worker = self.node.world.nodes.get(share.id)
            process = None if worker is None else worker.engine.process
            if process is None or process.carries is not self:
                return share.id
        return ""

    def is_held_up(self) -> bool:
        """Something on the way round the ring is asleep or cut off."""
        world = self.node.world
        for share in self.layout.workers:
            worker = world.nodes.get(share.id)
            if worker is None or not worker.is_awake or not world.network.is_open(self.node.id, share.id):
                return True
        return False


class Engine:
    """Carries out what the supervision core decides, as :class:`mesh.supervise.runner.EngineRunner` does."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.world = node.world
        self.core = self.world.parts.engine(node.id)
        self.pump = SimPump(self.core, node.carrier(self._carry_out), ev.Tick, node)
        self.process: Process | None = None
        self._stopping = False
        self._steps = 0
        """Counts stops: a step that was begun before one is cancelled by it."""

    # -- what others see -----------------------------------------------------------------------------------------------

    def worker_of(self, epoch: Epoch) -> Process | None:
        """Our rpc-server, if it listens and is that epoch's."""
        ready = self.core.state is State.WORKING and epoch == self.core.epoch
        return self.process if ready or not self.world.parts.fences_engines else None

    def server_of(self, epoch: Epoch) -> Process | None:
        """Our llama-server, if it serves that epoch."""
        ready = self.core.state is State.SERVING and epoch == self.core.epoch
        return self.process if ready else None

    # -- life ----------------------------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        self.pump.feed(event)

    def vanish(self) -> None:
        """The node's process is gone, and every process of its with it."""
        self.pump.stop()
        self._end()

    def kill(self) -> None:
        """The engine's process ends by itself."""
        process = self.process
        if process is not None:
            self._exits(process, -9, "killed")

    def lost(self, peer: NodeId) -> None:
        """A link broke, and the tunnels in it."""
        process = self.process
        if process is None:
            return
        if process.kind is ProcessKind.SERVER and any(m.id == peer for m in process.layout.workers):
            worker = self.world.nodes.get(peer)
            theirs = None if worker is None else worker.engine.process
            if theirs is not None and theirs.carries is process:
                theirs.carries = None
            self._later(0.0, 0.2, self._tunnel_fails, process, peer, "the connection is lost")
        elif process.carries is not None and process.layout.host == peer:
            process.carries = None

    # -- effects -------------------------------------------------------------------------------------------------------

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.StopEngine():
                if not self._stopping:
                    self._stop()
            case ev.AwaitDrain(epoch, hosting):
                self._await_drain(self._steps, epoch, hosting)
            case ev.StartRpcServer(epoch, layout):
                self._later(0.05, 0.25, self._spawn, self._steps, ProcessKind.RPC, epoch, layout)
            case ev.OpenTunnels(epoch, workers):
                endpoints = tuple(f"127.0.0.1:{i}" for i, _ in enumerate(workers))
                self._later(0.005, 0.01, self._step, self._steps, ev.TunnelsOpen(epoch, endpoints))
            case ev.StartLlamaServer(epoch, layout, _):
                self._later(0.05, 0.25, self._spawn, self._steps, ProcessKind.SERVER, epoch, layout)
            case ev.ProbeToken(epoch):
                process = self.process
                if process is not None:
                    self._later(0.1, 0.6, self._half_loaded, process)
                    self._later(0.3, 1.2, self._loaded, process)
            case ev.TellHost(host, message):
                self.world.listens(self.node, message.epoch)
                self.node.rpc_server_listens(host, message)
            case ev.AnnounceServing(epoch):
                self.node.engine_serves(epoch)
            case ev.ReportDown(epoch, reason):
                self.node.engine_failed(epoch, reason)
            case ev.ReportProgress(epoch, done, total):
                self.node.loading(LoadProgress(epoch, self.node.id, done, total))

    def _later(self, least: float, more: float, do: Any, *args: Any) -> None:
        self.world.clock.after(least + more * self.world.rng.random(), self.node.do, self.node.boots, do, *args)

    def _step(self, step: int, event: ev.Event) -> None:
        if step == self._steps:
            self.post(event)

    def _await_drain(self, step: int, epoch: Epoch, hosting: bool) -> None:
        process = self.process
        busy = self.node.ingress.busy(process) if hosting else process is not None and process.carries is not None
        if step == self._steps:
            self._later(0.05, 0.0, self._await_drain, step, epoch, hosting) if busy else self.post(ev.Drained(epoch))

    def _spawn(self, step: int, kind: ProcessKind, epoch: Epoch, layout: Layout) -> None:
        if step != self._steps:
            return
        if self.world.engine_fails(self.node):
            self.post(ev.ProcessExited(epoch, kind, 1, ("out of luck",)))
            return
        if self.process is not None:
            self.world.fail(f"{self.node.id[0]} starts an engine while another is alive")
        process = self.process = Process(self.node, kind, epoch, layout)
        self.post(ev.ProcessStarted(epoch, kind, 1))
        if kind is ProcessKind.SERVER and self.process is process:
            for share in layout.workers:
                for least in (0.02, 0.1, 0.2):  # the real engine opens several connections while it loads
                    self._later(least, 2 * least, self._open_tunnel, process, share.id)

    def _stop(self) -> None:
        self._stopping = True
        self._steps += 1
        slow = self.world.rng.random() < self.world.slow_stops
        # Killed at once, but memory and ports are free only when the kernel is done with it.
        self._later(1.0 if slow else 0.01, 3.0 if slow else 0.2, self._stopped)

    def _stopped(self) -> None:
        self._end()
        self._stopping = False
        self.post(ev.Stopped())

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.is_alive = False
        if process.carries is not None and self.node.is_running:
            # The host's engine sees its tunnel end, if the path is open; else it learns it from the link.
            host = process.carries
            if self.world.network.is_open(self.node.id, host.node.id):
                self._later(
                    0.01, 0.1, host.node.do, host.boot, host.node.engine._tunnel_fails, host, self.node.id, "it ended"
                )
        elif process.kind is ProcessKind.SERVER and self.node.is_running:
            for share in process.layout.workers:
                worker = self.world.nodes.get(share.id)
                if worker is not None and worker.engine is not None and worker.engine.process is not None:
                    theirs = worker.engine.process
                    if theirs.carries is process and self.world.network.is_open(self.node.id, share.id):
                        theirs.carries = None
        if process.kind is ProcessKind.SERVER and self.node.is_running:
            self.node.ingress.ended(process)

    def _exits(self, process: Process, code: int, why: str) -> None:
        if self.process is not process or self._stopping:
            return
        self._end()
        self.post(ev.ProcessExited(process.epoch, process.kind, code, (why,)))

    # -- tunnels and loading -------------------------------------------------------------------------------------------

    def _open_tunnel(self, process: Process, worker: NodeId) -> None:
        if not process.is_alive or self._stopping:
            return
        link = self.world.network.link.get((self.node.id, worker))
        theirs = self.world.nodes.get(worker)
        if link is None or theirs is None:
            self._tunnel_fails(process, worker, "not connected")
            return
        if self.world.network.is_open(self.node.id, worker):  # else it waits, and fails with the link
            self.world.clock.after(self.world.network.latency(), theirs.do, theirs.boots, theirs.accept_tunnel, process)

    def accept(self, host: Process, may_carry: bool, epoch: Epoch) -> None:
        """On the worker: a host asks for our rpc-server."""
        peer = host.node.id
        if not host.is_alive or (self.node.id, peer) not in self.world.network.link:
            return
        worker = self.worker_of(epoch) if may_carry else None
        if worker is None:
            reason = "not-ready" if may_carry else "fenced"
            self.world.turned_away(self.node, host)
            self.world.clock.after(
                self.world.network.latency(),
                host.node.do, host.boot, host.node.engine._tunnel_fails, host, self.node.id, reason,
            )  # fmt: skip
            return
        self.world.carried(self.node, host)
        worker.carries = host
        self.post(ev.HostConnected(epoch))

    def _tunnel_fails(self, process: Process, worker: NodeId, reason: str) -> None:
        if process.is_alive and self.process is process and not self._stopping:
            self.post(ev.TunnelFailed(process.epoch, worker, reason))

    def _half_loaded(self, process: Process) -> None:
        if self.process is process and not self._stopping:
            self.post(ev.LoadSeen(process.epoch, 1, 2))

    def _loaded(self, process: Process) -> None:
        if self.process is not process or self._stopping:
            return
        if process.is_held_up():
            self._later(0.3, 0.3, self._loaded, process)  # hangs until it goes on, or the link breaks
            return
        lost = process.why_broken()
        if lost or self.world.engine_fails(self.node):
            self._exits(process, 1, f"no token came back from {lost[:1]}" if lost else "out of luck")
            return
        self.world.serves(self.node, process)
        process.answers = True
        self.post(ev.Answered(process.epoch))
