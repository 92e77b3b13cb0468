"""One node's engine, one epoch at a time. Pure: events and time come in, effects go out.

    IDLE -> WORKER_STARTING -> WORKING                                     this node is a worker of the layout
    IDLE -> GATHERING -> OPENING -> LAUNCHING -> LOADING -> SERVING        this node is its host
    SERVING or WORKING -> DRAINING -> STOPPING                             a newer layout that was planned: who uses
                                                                           the engine may finish, for a time
    any of these -> STOPPING -> the next epoch, or IDLE                    a newer layout, or a failure
    any -> CLOSING -> CLOSED                                               the node goes

Everything of an older epoch is gone before anything of a newer one starts: the memory must be free. Events carry the
epoch they belong to, so what arrives late from an engine that was replaced is dropped before the table is asked.

A drain needs no word between nodes. A host sees every request that its llama-server answers, and stops it after the
last one; a worker sees its host's connection end, for that reason or because the host died, and stops after it. Either
has the time it was given, on its own clock. Whatever fails meanwhile ends the drain, and is no failure of the next
epoch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mesh.supervise.events import (
    Adopt,
    AnnounceServing,
    Answered,
    AwaitDrain,
    Drained,
    Effect,
    EngineFailed,
    Event,
    HostConnected,
    LoadSeen,
    MemberLoading,
    MemberReady,
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
from mesh.supervise.reasons import ProcessKind, clipped, exit_reason
from mesh.wire.facts import NO_EPOCH, Epoch, Layout, NodeId
from mesh.wire.messages import WorkerReady


class State(Enum):
    IDLE = "idle"
    WORKER_STARTING = "worker starting"
    WORKING = "working"
    GATHERING = "waiting for workers"
    OPENING = "opening tunnels"
    LAUNCHING = "starting llama-server"
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "finishing requests"
    STOPPING = "stopping"
    CLOSING = "closing"
    CLOSED = "closed"


RUNNING = frozenset(State) - {State.IDLE, State.DRAINING, State.STOPPING, State.CLOSING, State.CLOSED}
"""States in which something of the current epoch is alive or being made."""
HOSTING = frozenset({State.GATHERING, State.OPENING, State.LAUNCHING, State.LOADING, State.SERVING})


class IllegalEventError(RuntimeError):
    """An event that cannot happen in this state: a bug, not bad luck."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds each step may take before the layout is given up.

    ``load_stall_s`` runs anew with every sign of progress; the rest are whole steps.
    """

    rpc_start_s: float = 60.0
    gather_s: float = 90.0
    tunnels_s: float = 20.0
    launch_s: float = 60.0
    load_stall_s: float = 300.0
    stop_s: float = 15.0
    ready_again_s: float = 2.0
    """A worker repeats that it is ready until the host has come: a link may have been down when it first said so."""
    progress_every_s: float = 0.25


class EngineCore:
    """Decides what runs on this node.

    Args:
        me: this node.
    """

    def __init__(self, me: NodeId, deadlines: Deadlines | None = None) -> None:
        self._me = me
        self._limits = deadlines or Deadlines()
        self._state = State.IDLE
        self._epoch = NO_EPOCH
        self._layout: Layout | None = None
        self._next: Adopt | None = None
        """What starts once everything older is gone."""
        self._endpoints: tuple[str, ...] = ()
        self._ready: dict[NodeId, Epoch] = {}
        self._deadline: float | None = None
        self._ready_again: float | None = None
        self._progress_shown = float("-inf")

    @property
    def state(self) -> State:
        return self._state

    @property
    def epoch(self) -> Epoch:
        """The epoch whose engine runs, is being made, or was last here; not yet the one that waits for a stop."""
        return self._epoch

    @property
    def layout(self) -> Layout | None:
        return self._layout

    def next_timer(self) -> float | None:
        """When to send :class:`Tick`, on the same clock as ``now``."""
        return min((t for t in (self._deadline, self._ready_again) if t is not None), default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Raises:
        IllegalEventError: the event cannot happen in this state.
        """
        epoch = None if isinstance(event, Adopt | MemberReady | MemberLoading) else getattr(event, "epoch", None)
        if epoch is not None and epoch != self._epoch:
            return []
        transition = TRANSITIONS.get((self._state, type(event)))
        if transition is None:
            raise IllegalEventError(f"{type(event).__name__} while {self._state.value}")
        return transition(self, event, now)

    # each method below is a cell (or a column) of TRANSITIONS

    def _ignore(self, event: Event, now: float) -> list[Effect]:
        return []

    def _begin(self, event: Adopt, now: float) -> list[Effect]:
        if event.epoch <= self._epoch:
            return []
        self._epoch, self._layout, self._endpoints = event.epoch, event.layout, ()
        self._enter(State.IDLE)
        layout = event.layout
        if layout is None:
            return []
        workers = tuple(member.id for member in layout.workers)
        if layout.host == self._me:
            if not workers:
                return self._launch((), now)
            self._enter(State.GATHERING, now + self._limits.gather_s)
            return self._gather(now)
        if self._me in workers:
            self._enter(State.WORKER_STARTING, now + self._limits.rpc_start_s)
            return [StartRpcServer(event.epoch, layout)]
        return []

    def _let_finish(self, event: Adopt, now: float) -> list[Effect]:
        if event.epoch <= self._epoch or event.drain_s <= 0:
            return self._replace(event, now)
        hosting = self._state is State.SERVING
        self._next = event
        self._enter(State.DRAINING, now + event.drain_s)
        return [AwaitDrain(self._epoch, hosting)]

    def _let_finish_still(self, event: Adopt, now: float) -> list[Effect]:
        assert self._next is not None and self._deadline is not None
        if event.epoch <= self._next.epoch:
            return []
        self._next = event
        if event.drain_s <= 0:
            return self._end_drain(event, now)
        self._deadline = min(self._deadline, now + event.drain_s)
        return []

    def _end_drain(self, event: Event, now: float) -> list[Effect]:
        self._enter(State.STOPPING, now + self._limits.stop_s)
        return [StopEngine()]

    def _replace(self, event: Adopt, now: float) -> list[Effect]:
        if event.epoch <= self._epoch:
            return []
        self._next = event
        self._enter(State.STOPPING, now + self._limits.stop_s)
        return [StopEngine()]

    def _supersede(self, event: Adopt, now: float) -> list[Effect]:
        if event.epoch > (self._next.epoch if self._next else self._epoch):
            self._next = event
        return []

    def _gone(self, event: Stopped, now: float) -> list[Effect]:
        following, self._next = self._next, None
        self._enter(State.IDLE)
        return [] if following is None else self._begin(following, now)

    def _note_ready(self, event: MemberReady, now: float) -> list[Effect]:
        # One entry per node, its latest: a peer cannot make us remember more than that.
        self._ready[event.node] = event.epoch
        return []

    def _count_ready(self, event: MemberReady, now: float) -> list[Effect]:
        self._note_ready(event, now)
        return self._gather(now)

    def _gather(self, now: float) -> list[Effect]:
        if self._missing():
            return []
        assert self._layout is not None
        self._enter(State.OPENING, now + self._limits.tunnels_s)
        return [OpenTunnels(self._epoch, tuple(member.id for member in self._layout.workers))]

    def _opened(self, event: TunnelsOpen, now: float) -> list[Effect]:
        return self._launch(event.endpoints, now)

    def _launch(self, endpoints: tuple[str, ...], now: float) -> list[Effect]:
        assert self._layout is not None
        self._endpoints = endpoints
        self._enter(State.LAUNCHING, now + self._limits.launch_s)
        return [StartLlamaServer(self._epoch, self._layout, endpoints)]

    def _worker_listens(self, event: ProcessStarted, now: float) -> list[Effect]:
        self._enter(State.WORKING)
        return self._say_ready(now)

    def _say_ready(self, now: float) -> list[Effect]:
        assert self._layout is not None
        self._ready_again = now + self._limits.ready_again_s
        return [TellHost(self._layout.host, WorkerReady(self._epoch))]

    def _host_came(self, event: HostConnected, now: float) -> list[Effect]:
        self._ready_again = None
        return []

    def _server_listens(self, event: ProcessStarted, now: float) -> list[Effect]:
        self._enter(State.LOADING, now + self._limits.load_stall_s)
        return [ProbeToken(self._epoch)]

    def _answered(self, event: Answered, now: float) -> list[Effect]:
        self._enter(State.SERVING)
        return [AnnounceServing(self._epoch)]

    def _progressed(self, event: LoadSeen, now: float) -> list[Effect]:
        if self._state is State.LOADING:
            self._deadline = now + self._limits.load_stall_s
        if event.done < event.total and now - self._progress_shown < self._limits.progress_every_s:
            return []
        self._progress_shown = now
        return [ReportProgress(self._epoch, event.done, event.total)]

    def _member_progressed(self, event: MemberLoading, now: float) -> list[Effect]:
        if event.epoch == self._epoch:
            self._deadline = now + self._limits.load_stall_s
        return []

    def _exited(self, event: ProcessExited, now: float) -> list[Effect]:
        reason = exit_reason(event.kind, event.code, event.tail)
        if event.kind is ProcessKind.SERVER and self._layout is not None:
            # The engine knows workers by their tunnels, people by their names.
            for endpoint, worker in zip(self._endpoints, self._layout.workers, strict=False):
                reason = re.sub(rf"{re.escape(endpoint)}\b", worker.name.replace("\\", "/"), reason)
        return self._fail(reason, now)

    def _failed(self, event: EngineFailed, now: float) -> list[Effect]:
        return self._fail(event.reason, now)

    def _tunnel_failed(self, event: TunnelFailed, now: float) -> list[Effect]:
        return self._fail(f"the tunnel to {self._name(event.worker)} failed: {event.reason}", now)

    def _fail(self, reason: str, now: float) -> list[Effect]:
        self._enter(State.STOPPING, now + self._limits.stop_s)
        return [StopEngine(), ReportDown(self._epoch, clipped(reason))]

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        if self._deadline is not None and now >= self._deadline:
            return self._overdue(now)
        if self._ready_again is not None and now >= self._ready_again:
            return self._say_ready(now)
        return []

    def _overdue(self, now: float) -> list[Effect]:
        match self._state:
            case State.WORKER_STARTING:
                return self._fail(f"rpc-server did not listen within {self._limits.rpc_start_s:.0f} s", now)
            case State.GATHERING:
                names = ", ".join(self._name(node) for node in self._missing())
                return self._fail(f"no word within {self._limits.gather_s:.0f} s that {names} is ready", now)
            case State.OPENING:
                return self._fail(f"the tunnels did not open within {self._limits.tunnels_s:.0f} s", now)
            case State.LAUNCHING:
                return self._fail(f"llama-server did not listen within {self._limits.launch_s:.0f} s", now)
            case State.DRAINING:
                return self._end_drain(Tick(), now)
            case State.LOADING:
                return self._fail(f"no token and no progress for {self._limits.load_stall_s:.0f} s", now)
            case _:
                # Stopping or closing: a process in the kernel's hands cannot be hurried. Ask again, and say once
                # that the epoch behind it cannot start, so that somebody plans without this node.
                self._deadline = now + self._limits.stop_s
                stuck: list[Effect] = [StopEngine()]
                if self._next is not None and self._next.layout is not None:
                    reason = f"the previous engine has not ended after {self._limits.stop_s:.0f} s"
                    stuck.append(ReportDown(self._next.epoch, reason))
                    self._next = Adopt(self._next.epoch, None)
                return stuck

    def _close(self, event: Shutdown, now: float) -> list[Effect]:
        self._next = None
        was = self._state
        self._enter(State.CLOSING, now + self._limits.stop_s)
        return [] if was is State.STOPPING else [StopEngine()]

    def _closed(self, event: Stopped, now: float) -> list[Effect]:
        self._enter(State.CLOSED)
        return []

    def _enter(self, state: State, deadline: float | None = None) -> None:
        self._state = state
        self._deadline = deadline
        self._ready_again = None

    def _missing(self) -> list[NodeId]:
        assert self._layout is not None
        return [member.id for member in self._layout.workers if self._ready.get(member.id) != self._epoch]

    def _name(self, node: NodeId) -> str:
        ring = self._layout.ring if self._layout is not None else ()
        return next((member.name for member in ring if member.id == node), node)


Transition = Callable[[EngineCore, Any, float], list[Effect]]


def _table() -> dict[tuple[State, type[Any]], Transition]:
    """Every legal (state, event). What is not here raises."""
    core = EngineCore
    table: dict[tuple[State, type[Any]], Transition] = {}

    def on(states: frozenset[State] | set[State], event: type[Any], transition: Transition) -> None:
        for state in states:
            table[state, event] = transition

    every = frozenset(State)
    resting = every - RUNNING - {State.DRAINING}
    # Whatever an engine still says while it is taken down, or has been, changes nothing.
    late = (
        ProcessStarted, ProcessExited, EngineFailed, TunnelsOpen, TunnelFailed, HostConnected, Answered, Drained,
        LoadSeen,
    )  # fmt: skip
    for event in late:
        on(resting, event, core._ignore)

    on({State.IDLE}, Adopt, core._begin)
    on(RUNNING, Adopt, core._replace)
    on({State.SERVING, State.WORKING}, Adopt, core._let_finish)
    on({State.DRAINING}, Adopt, core._let_finish_still)
    for event in (Drained, ProcessExited, EngineFailed, TunnelFailed):
        on({State.DRAINING}, event, core._end_drain)
    for event in (HostConnected, LoadSeen):
        on({State.DRAINING}, event, core._ignore)
    on({State.STOPPING}, Adopt, core._supersede)
    on({State.CLOSING, State.CLOSED}, Adopt, core._ignore)
    on(every, MemberReady, core._note_ready)
    on({State.GATHERING}, MemberReady, core._count_ready)
    on(every, MemberLoading, core._ignore)
    on({State.LOADING}, MemberLoading, core._member_progressed)

    on({State.WORKER_STARTING}, ProcessStarted, core._worker_listens)
    on({State.LAUNCHING}, ProcessStarted, core._server_listens)
    on({State.OPENING}, TunnelsOpen, core._opened)
    on({State.LOADING}, Answered, core._answered)
    on({State.WORKING}, HostConnected, core._host_came)
    on({State.WORKER_STARTING, State.WORKING, State.LAUNCHING, State.LOADING, State.SERVING}, LoadSeen,
       core._progressed)  # fmt: skip

    on(RUNNING, ProcessExited, core._exited)
    on(RUNNING, EngineFailed, core._failed)
    on(HOSTING, TunnelFailed, core._tunnel_failed)

    on({State.STOPPING}, Stopped, core._gone)
    on({State.CLOSING}, Stopped, core._closed)
    on(every, Tick, core._tick)
    on(every, Shutdown, core._close)
    on({State.CLOSING, State.CLOSED}, Shutdown, core._ignore)
    return table


TRANSITIONS = _table()
