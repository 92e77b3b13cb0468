"""What the core of the proxy is told, and what it answers: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mesh.proxy.failure import Failure
from mesh.wire.facts import Epoch

RequestId = int


class Loss(Enum):
    """How far an attempt had come when its upstream was lost."""

    UNREACHED = "unreached"
    """No engine saw the request."""
    LOADING = "loading"
    """The engine is there, its model is not."""
    BROKEN = "broken"
    """The engine, or the way to it, was lost with the request inside."""


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """A token has come through the ring of ``epoch``: requests may go there, and nowhere else."""

    epoch: Epoch
    model_name: str
    fingerprint: str = ""
    """Of the model: a stream is continued by the very same one."""


@dataclass(frozen=True, slots=True)
class Unserved:
    """Nothing is served any more. Answers under way may finish for ``drain_s`` seconds; 0: they are lost already."""

    reason: str
    drain_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrived:
    """A client's request, whole.

    Args:
        streams: the client asked for events, so it can be told to wait.
        model: what its ``model`` field says, if anything.
        holds: whether it makes sense for it to wait for a layout.
    """

    request: RequestId
    streams: bool = False
    model: str | None = None
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Departed:
    """The client is gone."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Began:
    """Bytes of the answer, or of its continuation, go to the client now: asking again from the start would be seen."""

    request: RequestId
    attempt: int
    resumable: bool = False
    """The transcript can be continued by another engine, faithfully."""


@dataclass(frozen=True, slots=True)
class Advanced:
    """More tokens of an answer that will come whole are on record; its client has nothing yet."""

    request: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class Spoiled:
    """What the client has got is not recorded any more: the answer cannot be continued after a loss."""

    request: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine will not continue this answer, and says why."""

    request: RequestId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Completed:
    """The upstream's answer is whole."""

    request: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class Lost:
    """The upstream of this attempt will say no more."""

    request: RequestId
    attempt: int
    loss: Loss
    reason: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """This node is on its way out: nobody waits, nobody is let in."""

    reason: str


@dataclass(frozen=True, slots=True)
class Closing:
    """This node is about to go: nobody is let in any more, and whoever is here is still answered."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of :meth:`Core.next_timer` has come."""


RequestEvent = Departed | Began | Advanced | Spoiled | Refused | Completed | Lost
Event = Served | Unserved | Arrived | RequestEvent | Closing | Stopped | Tick


# -- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Ask the engine of ``epoch``. With ``resume``: from where the transcript ends, else from the start."""

    request: RequestId
    attempt: int
    epoch: Epoch
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Abandon:
    """Drop the upstream of this attempt; whatever it still says is not wanted."""

    request: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class Comfort:
    """Tell the waiting client, by a comment in its stream, that it is not forgotten."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends here: an error response, or in a begun stream one error event and no end mark."""

    request: RequestId
    failure: Failure


Effect = Dispatch | Abandon | Comfort | Fail
