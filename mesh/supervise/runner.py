"""Carries out what the core decides: processes, tunnels, timers. The dull part."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mesh.clock import Clock
from mesh.engine.placement import Placement
from mesh.errors import MeshError
from mesh.pump import Pump
from mesh.supervise.core import Deadlines, EngineCore, State
from mesh.supervise.events import (
    AnnounceServing,
    Answered,
    AwaitDrain,
    Drained,
    Effect,
    EngineFailed,
    Event,
    HostConnected,
    LoadSeen,
    OpenTunnels,
    ProbeToken,
    ProcessExited,
    ProcessStarted,
    ReportDown,
    ReportProgress,
    Shutdown,
    StartLlamaServer,
    StartRpcServer,
    StopEngine,
    Stopped,
    TellHost,
    Tick,
    TunnelFailed,
    TunnelsOpen,
)
from mesh.supervise.launch import Child, Command, Launcher, child_environment, system_launcher
from mesh.supervise.output import Output, RotatingLog
from mesh.supervise.ports import EarlyExitError, start_on_free_port
from mesh.supervise.probe import first_token
from mesh.supervise.reasons import ProcessKind
from mesh.supervise.registry import Entry, ProcessRegistry
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeId
from mesh.wire.messages import EngineDown, LoadProgress, Serving, WorkerReady

log = logging.getLogger(__name__)


class Tunnels(Protocol):
    """The host's way to its workers, see :class:`mesh.tunnel.HostTunnels`."""

    on_failure: Callable[[Epoch, NodeId, str], None]

    async def open(self, epoch: Epoch, workers: Sequence[NodeId], secret: bytes) -> tuple[str, ...]: ...
    async def close(self) -> None: ...


class WorkerSide(Protocol):
    """The worker's end of the host's tunnels, see :class:`mesh.tunnel.WorkerTunnel`."""

    on_connected: Callable[[Epoch], None]

    async def idle(self) -> None: ...
    def close(self) -> None: ...


class Pushes(Protocol):
    """A worker's way to the next one, see :class:`mesh.tunnel.PushTunnels`."""

    async def open(self, epoch: Epoch, successor: NodeId, secret: bytes) -> str: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RpcEndpoint:
    """Our own rpc-server: loopback port, and the 32 bytes it wants to hear first."""

    port: int
    secret: bytes


RpcCommand = Callable[[Layout, int, bytes, Mapping[NodeId, str]], Command]
"""``(layout, port, secret, tunnel endpoint of each worker it can push to)`` to what starts this node's rpc-server."""
ServerCommand = Callable[[Layout, int, Sequence[str], bytes, str], Command]
"""``(layout, port, tunnel endpoints in ring order, secret, API key)`` to what starts llama-server."""
Outgoing = WorkerReady | Serving | EngineDown | LoadProgress


async def _at_once() -> None:
    """Nobody asks our llama-server for anything."""


@dataclass(slots=True)
class _Keys:
    """The secrets of one epoch. They never leave memory but for the child's environment."""

    epoch: Epoch
    rpc: bytes
    api: str


class EngineRunner:
    """This node's engine.

    Args:
        me: this node.
        state_dir: where ``engine-processes.json`` and ``logs/`` live.
        rpc_command, server_command: what to start, secrets included (in ``env``, where no process list shows them).
        tunnels: the host's listeners; its ``on_failure`` is set here.
        worker_side: this node's end of a host's tunnels; its ``on_connected`` is set here.
        pushes: the tunnel to the next worker; None: everything goes through the host.
        tell_host: send to the host of the epoch.
        announce: send to all members (:class:`Serving`, :class:`EngineDown`, :class:`LoadProgress`) and handle here
            as if received.
        make_secret: 32 random bytes, anew for each epoch and use.
        on_placed: told where the engine of this node says its weights are, once it can compute.
        unused: returns once no request is under way on our llama-server.
    """

    def __init__(
        self,
        me: NodeId,
        *,
        state_dir: Path,
        rpc_command: RpcCommand,
        server_command: ServerCommand,
        tunnels: Tunnels,
        clock: Clock,
        tell_host: Callable[[NodeId, WorkerReady], None],
        announce: Callable[[Serving | EngineDown | LoadProgress], None],
        worker_side: WorkerSide | None = None,
        pushes: Pushes | None = None,
        launcher: Launcher | None = None,
        deadlines: Deadlines | None = None,
        make_secret: Callable[[], bytes] = lambda: secrets.token_bytes(32),
        probe: Callable[[int, str], Awaitable[None]] = first_token,
        environment: Mapping[str, str] | None = None,
        on_placed: Callable[[Epoch, Placement], None] = lambda epoch, placement: None,
        unused: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        self._me = me
        self._unused = unused
        self._core = EngineCore(me, deadlines)
        self._changed = asyncio.Event()
        self._pump = Pump(self._core, self._carry_out, Tick, clock, after=self._changed.set)
        self._rpc_command = rpc_command
        self._server_command = server_command
        self._tunnels = tunnels
        self._worker_side = worker_side
        self._pushes = pushes
        self._clock = clock
        self._tell_host = tell_host
        self._announce = announce
        self._launcher = launcher
        self._make_secret = make_secret
        self._probe = probe
        self._on_placed = on_placed
        self._placements: dict[ProcessKind, Placement] = {}
        self._environment = os.environ if environment is None else environment
        self._registry = ProcessRegistry(state_dir)
        self._logs = {kind: RotatingLog(state_dir / "logs" / f"{kind.value}.log") for kind in ProcessKind}

        self._steps: set[asyncio.Task[None]] = set()
        self._launches: set[asyncio.Task[Child]] = set()
        self._children: list[Child] = []
        self._stopping: asyncio.Task[None] | None = None
        self._keys = _Keys(NO_EPOCH, b"", "")
        self._ports: dict[ProcessKind, int] = {}

        tunnels.on_failure = lambda epoch, worker, reason: self.post(TunnelFailed(epoch, worker, reason))
        if worker_side is not None:
            worker_side.on_connected = lambda epoch: self.post(HostConnected(epoch))

    # -- what others see ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._core.state

    @property
    def epoch(self) -> Epoch:
        """The epoch whose engine is here, or was last."""
        return self._core.epoch

    @property
    def layout(self) -> Layout | None:
        return self._core.layout

    def rpc_endpoint(self, epoch: Epoch) -> RpcEndpoint | None:
        """Where the host of ``epoch`` is to be connected to; None unless our rpc-server of that epoch listens."""
        port = self._ports.get(ProcessKind.RPC)
        if port is None or epoch != self._core.epoch or self._core.state is not State.WORKING:
            return None
        return RpcEndpoint(port, self._keys.rpc)

    def http_port(self, epoch: Epoch) -> int | None:
        """The port of our llama-server, once it serves ``epoch``."""
        serving = epoch == self._core.epoch and self._core.state is State.SERVING
        return self._ports.get(ProcessKind.SERVER) if serving else None

    @property
    def serving(self) -> Serving | None:
        """What to tell a member that comes while our llama-server serves."""
        if self._core.state is not State.SERVING:
            return None
        return Serving(self._core.epoch, self._keys.api)

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> list[Entry]:
        """End what a crashed run of this state directory left behind; returns what was found. Call from the main
        thread: the kernel ties children to the thread that starts them."""
        self._launcher = self._launcher or system_launcher()
        swept = await asyncio.to_thread(self._registry.sweep)
        for entry in swept:
            log.warning("ended a %s (pid %d) that an earlier run left behind", entry.kind.value, entry.pid)
        return swept

    async def stop(self) -> None:
        """End everything; returns when no process is left, even if cancelled meanwhile (then raises after that)."""
        self.post(Shutdown())
        await _finish(asyncio.ensure_future(self._until(lambda: self._core.state is State.CLOSED)))
        self._pump.stop()
        for file in self._logs.values():
            file.close()

    def post(self, event: Event) -> None:
        """Tell the core. Callable from callbacks it caused itself: events are handled one after another."""
        self._pump.feed(event)

    async def idle(self) -> None:
        """Return once no engine of ours runs, drains or stops."""
        await self._until(lambda: self._core.state in (State.IDLE, State.CLOSED))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case StopEngine():
                if self._stopping is None or self._stopping.done():
                    self._stopping = asyncio.ensure_future(self._stop_engine())
                else:
                    self._kill_children()
            case AwaitDrain(epoch, hosting):
                self._step(epoch, self._await_drain(epoch, hosting))
            case StartRpcServer(epoch, layout):
                self._step(epoch, self._start_rpc_server(epoch, layout))
            case OpenTunnels(epoch, workers):
                self._step(epoch, self._open_tunnels(epoch, workers))
            case StartLlamaServer(epoch, layout, endpoints):
                self._step(epoch, self._start_llama_server(epoch, layout, endpoints))
            case ProbeToken(epoch):
                self._step(epoch, self._probe_token(epoch))
            case TellHost(host, message):
                self._tell_host(host, message)
            case AnnounceServing(epoch):
                self._announce(Serving(epoch, self._keys.api))
            case ReportDown(epoch, reason):
                self._announce(EngineDown(epoch, reason))
            case ReportProgress(epoch, done, total):
                self._announce(LoadProgress(epoch, self._me, done, total))

    # -- steps: each may be cancelled anywhere ---------------------------------------------------------------------

    def _step(self, epoch: Epoch, work: Coroutine[Any, Any, None]) -> None:
        async def carried_out() -> None:
            try:
                await work
            except MeshError as error:
                self.post(EngineFailed(epoch, str(error)))
            except Exception as error:
                log.exception("a step of epoch %d failed", epoch.number)
                self.post(EngineFailed(epoch, f"unexpected {type(error).__name__}: {error}"))

        task = asyncio.ensure_future(carried_out())
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)

    async def _start_rpc_server(self, epoch: Epoch, layout: Layout) -> None:
        secret = self._keys_of(epoch).rpc
        successor = layout.successor(self._me)
        peers = {}
        if self._pushes is not None and successor is not None:
            peers[successor] = await self._pushes.open(epoch, successor, secret)
        await self._run(epoch, ProcessKind.RPC, lambda port: self._rpc_command(layout, port, secret, peers))

    async def _open_tunnels(self, epoch: Epoch, workers: tuple[NodeId, ...]) -> None:
        endpoints = await self._tunnels.open(epoch, workers, self._keys_of(epoch).rpc)
        self.post(TunnelsOpen(epoch, tuple(endpoints)))

    async def _start_llama_server(self, epoch: Epoch, layout: Layout, endpoints: tuple[str, ...]) -> None:
        keys = self._keys_of(epoch)
        await self._run(
            epoch,
            ProcessKind.SERVER,
            lambda port: self._server_command(layout, port, endpoints, keys.rpc, keys.api),
        )

    async def _probe_token(self, epoch: Epoch) -> None:
        await self._probe(self._ports[ProcessKind.SERVER], self._keys_of(epoch).api)
        self._on_placed(epoch, self._placements[ProcessKind.SERVER])
        self.post(Answered(epoch))

    async def _await_drain(self, epoch: Epoch, hosting: bool) -> None:
        if hosting:
            await self._unused()
        elif self._worker_side is not None:
            await self._worker_side.idle()
        self.post(Drained(epoch))

    async def _run(self, epoch: Epoch, kind: ProcessKind, command: Callable[[int], Command]) -> None:
        """Start a process, say that it listens, and stay until it ends."""
        try:
            child, port = await start_on_free_port(lambda port: self._launch(epoch, kind, command(port)))
        except EarlyExitError as early:
            self.post(ProcessExited(epoch, kind, early.code, early.tail))
            return
        self._ports[kind] = port
        self.post(ProcessStarted(epoch, kind, port))
        if kind is ProcessKind.RPC:
            self._on_placed(epoch, self._placements[kind])
        code = await child.wait()
        self.post(ProcessExited(epoch, kind, code, child.tail))

    async def _launch(self, epoch: Epoch, kind: ProcessKind, command: Command) -> Child:
        assert self._launcher is not None, "start() comes first"
        self._logs[kind].write(f"--- epoch {epoch.number} at {self._clock.wall():.0f}\n".encode())
        placement = self._placements[kind] = Placement()
        output = Output(
            self._logs[kind],
            lambda done, total: self.post(LoadSeen(epoch, done, total)),
            self._note_fallback,
            placement.read,
        )
        environment = child_environment(self._environment, command.env)
        # Never half-started: a step that is cancelled here leaves the launch to finish, and the stop that cancelled
        # it waits for that and ends the child.
        launch = asyncio.ensure_future(
            self._launcher.launch(command.argv, environment, output, lambda pid: self._registry.record(pid, kind))
        )
        self._launches.add(launch)
        launch.add_done_callback(self._launched)
        return await asyncio.shield(launch)

    def _note_fallback(self, source: str, destination: str, reason: str) -> None:
        ring = () if self._core.layout is None else self._core.layout.ring
        names = {member.id: member.name for member in ring}
        pair = (names.get(source, source), names.get(destination, destination))
        log.warning("%s reaches %s only through this machine: %s", *pair, reason)

    def _launched(self, launch: asyncio.Task[Child]) -> None:
        self._launches.discard(launch)
        if not launch.cancelled() and launch.exception() is None:
            child = launch.result()
            self._children.append(child)
            asyncio.ensure_future(child.wait()).add_done_callback(lambda _: self._forget(child))

    def _forget(self, child: Child) -> None:
        with contextlib.suppress(ValueError):
            self._children.remove(child)
        self._registry.forget(child.pid)

    def _keys_of(self, epoch: Epoch) -> _Keys:
        if self._keys.epoch != epoch:
            self._keys = _Keys(epoch, rpc=self._make_secret(), api=self._make_secret().hex())
        return self._keys

    # -- the stop: never cancelled -----------------------------------------------------------------------------------

    async def _stop_engine(self) -> None:
        """Ends in order: steps (so that nothing new begins), tunnels and processes together, then everything awaited.

        Processes are killed, not asked: they hold nothing that must be saved, and the memory is wanted now.
        """
        self._ports.clear()
        steps = [*self._steps]
        for step in steps:
            step.cancel()
        self._kill_children()
        if self._worker_side is not None:
            self._worker_side.close()
        closing = [self._tunnels.close()] + ([] if self._pushes is None else [self._pushes.close()])
        await asyncio.gather(*steps, *closing, return_exceptions=True)
        if self._launches:
            await asyncio.wait([*self._launches])
            await asyncio.sleep(0)  # their done callbacks put the children on the list
        self._kill_children()
        await asyncio.gather(*(child.wait() for child in [*self._children]))
        self._keys = _Keys(NO_EPOCH, b"", "")
        self.post(Stopped())

    def _kill_children(self) -> None:
        for child in self._children:
            child.kill()


async def _finish(work: asyncio.Future[None]) -> None:
    """Await ``work`` to its end; a cancellation is kept until then."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            cancelled = True
    work.result()
    if cancelled:
        raise asyncio.CancelledError
