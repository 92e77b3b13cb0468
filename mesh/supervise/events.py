"""What the engine's core is told, and what it asks for. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.supervise.reasons import ProcessKind
from mesh.wire.facts import Epoch, Layout, NodeId
from mesh.wire.messages import WorkerReady

# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adopt:
    """The election agreed on ``layout``; None: nothing is to run."""

    epoch: Epoch
    layout: Layout | None
    drain_s: float = 0.0
    """What runs until now may finish its requests first, for so many seconds."""


@dataclass(frozen=True, slots=True)
class MemberReady:
    """``node`` says that its rpc-server of ``epoch`` listens. May come before we adopt that epoch ourselves."""

    node: NodeId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class MemberLoading:
    """``node`` loads weights for ``epoch``: slow, but not stuck."""

    node: NodeId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class ProcessStarted:
    """The process runs and listens on loopback ``port``."""

    epoch: Epoch
    kind: ProcessKind
    port: int


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """The process ended unasked. ``code`` < 0: killed by that signal. ``tail``: its last lines."""

    epoch: Epoch
    kind: ProcessKind
    code: int
    tail: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """A step could not be carried out (no program, no free port, a wrong answer to the probe)."""

    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True)
class TunnelsOpen:
    """One loopback ``host:port`` per worker, in ring order."""

    epoch: Epoch
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TunnelFailed:
    """The tunnel to ``worker`` was refused, or broke under the engine."""

    epoch: Epoch
    worker: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class HostConnected:
    """The host reached our rpc-server: it knows that we are ready."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Answered:
    """llama-server is healthy and one real token came out: it went through every member of the ring."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Drained:
    """Nobody uses the engine any more: no request is under way on a host, no host is connected to a worker."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class LoadSeen:
    """Bytes of weights this node's engine has read, of all it will."""

    epoch: Epoch
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """No process, tunnel or port of ours is left."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A timer asked for through ``next_timer`` is due."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The node goes; nothing starts any more."""


Event = (
    Adopt | MemberReady | MemberLoading | ProcessStarted | ProcessExited | EngineFailed | TunnelsOpen | TunnelFailed
    | HostConnected | Answered | Drained | LoadSeen | Stopped | Tick | Shutdown
)  # fmt: skip

# -- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StopEngine:
    """End every process and tunnel, cancel every step under way, then say :class:`Stopped`."""


@dataclass(frozen=True, slots=True)
class AwaitDrain:
    """Say :class:`Drained` once nobody uses the engine of ``epoch``; nothing new is let in any more."""

    epoch: Epoch
    hosting: bool


@dataclass(frozen=True, slots=True)
class StartRpcServer:
    epoch: Epoch
    layout: Layout


@dataclass(frozen=True, slots=True)
class OpenTunnels:
    epoch: Epoch
    workers: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class StartLlamaServer:
    epoch: Epoch
    layout: Layout
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProbeToken:
    """Wait for health, then for one real token."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class TellHost:
    host: NodeId
    message: WorkerReady


@dataclass(frozen=True, slots=True)
class AnnounceServing:
    """The ring of ``epoch`` answers: members may have the key to it."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class ReportDown:
    """This node's part of ``epoch`` cannot be, in plain words: the coordinator must plan again."""

    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True)
class ReportProgress:
    epoch: Epoch
    done: int
    total: int


Effect = (
    StopEngine | AwaitDrain | StartRpcServer | OpenTunnels | StartLlamaServer | ProbeToken
    | TellHost | AnnounceServing | ReportDown | ReportProgress
)  # fmt: skip
