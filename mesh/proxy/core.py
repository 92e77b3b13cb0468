"""What becomes of each request while layouts come and go. Pure: events and the time come in, effects go out.

    HELD ----Served----> ASKED ----Began----> STREAMING ----Completed----> (done)
     ^  \\                | |  \\__Completed___________________________________^
     |   deadline: Fail  | |Refused: Fail, or    |
     |                   | |from the start       |
     |___________________|Lost: replay           |Lost
     |___________________________________________|  resume, when the transcript can be continued; else Fail

A request leaves when it is completed, failed, or its client departed. The ingress holds what it needs to ask again: the
request's body, and the transcript of the answer so far. Only an engine with the very same model goes on with an answer.
A stream that began has no other way; an answer that comes whole, of which its client has nothing, may begin anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from mesh.proxy import failure
from mesh.proxy.events import (
    Abandon,
    Advanced,
    Arrived,
    Began,
    Closing,
    Comfort,
    Completed,
    Departed,
    Dispatch,
    Effect,
    Event,
    Fail,
    Loss,
    Lost,
    Refused,
    RequestEvent,
    RequestId,
    Served,
    Spoiled,
    Stopped,
    Tick,
    Unserved,
)
from mesh.proxy.failure import Failure
from mesh.proxy.naming import means
from mesh.wire.facts import Epoch


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much an ingress bears with.

    Args:
        hold_s: how long a request waits for a layout, anew after each answer that was cut short.
        max_held: waiting requests; one more is refused.
        comfort_after_s, comfort_every_s: when a waiting stream first hears of it, and then how often.
        max_losses: engines one request may outlive without progress. One that kills every engine it meets must end some
            day.
        retry_delays_s: pauses between tries on one and the same layout; the last repeats.
        retry_after_s: told to clients that were refused.
    """

    hold_s: float = 30.0
    max_held: int = 256
    comfort_after_s: float = 2.0
    comfort_every_s: float = 5.0
    max_losses: int = 5
    retry_delays_s: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1.0)
    retry_after_s: int = 5


@dataclass(frozen=True, slots=True)
class Counters:
    """The ``requests`` object of status.

    ``completed``: answers delivered whole. ``resumed``: those of them that outlived an engine. ``failed``: requests the
    mesh could not answer. A client that went away by itself counts nowhere.
    """

    active: int = 0
    held: int = 0
    completed: int = 0
    resumed: int = 0
    failed: int = 0


class Phase(Enum):
    HELD = "held"
    ASKED = "asked"
    STREAMING = "streaming"


@dataclass(slots=True)
class _Request:
    id: RequestId
    streams: bool
    model: str | None
    patience_s: float
    deadline: float
    """While held: when it fails."""
    comfort_at: float
    retry_at: float = 0.0
    phase: Phase = Phase.HELD
    attempt: int = 0
    epoch: Epoch | None = None
    tries: int = 0
    """On the layout of ``epoch``."""
    losses: int = 0
    fruitless: int = 0
    """Losses since there was last more of the answer."""
    asked_of: _Route | None = None
    """The layout of the newest attempt; of a begun stream, one with the model it began with."""
    begun: bool = False
    promised: bool = False
    """The head of an event stream has gone out."""
    resumable: bool = False
    """The transcript can be continued."""
    anew: bool = False
    """An engine would not continue it: where that is possible, it begins from the start each time."""
    reason: str = ""


@dataclass(slots=True)
class _Route:
    epoch: Epoch
    model_name: str
    fingerprint: str

    def has_model_of(self, other: _Route) -> bool:
        return (self.model_name, self.fingerprint) == (other.model_name, other.fingerprint)


@dataclass(slots=True)
class Core:
    """Owns the fate of every request of one ingress."""

    limits: Limits = field(default_factory=Limits)
    _route: _Route | None = None
    _reason: str = "the mesh is starting"
    _drain_until: float | None = None
    _stopping: str | None = None
    """Why nobody is let in any more."""
    _requests: dict[RequestId, _Request] = field(default_factory=dict)
    """In order of arrival, which is the order of service."""
    _counters: Counters = field(default_factory=Counters)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What to do about ``event``, in order. Events of forgotten requests and attempts are late, and ignored."""
        match event:
            case Served():
                return self._serve(event, now)
            case Unserved():
                return self._unserve(event, now)
            case Arrived():
                return self._arrive(event, now)
            case Closing():
                self._stopping = event.reason
                return []
            case Stopped():
                return self._stop(event, now)
            case Tick():
                return self._tick(now)
            case _:
                return self._advance(event, now)

    def next_timer(self) -> float | None:
        """When :class:`Tick` is due."""
        times = [time for request in self._requests.values() for time in self._timers(request)]
        if self._drain_until is not None:
            times.append(self._drain_until)
        return min(times, default=None)

    @property
    def counters(self) -> Counters:
        held = sum(request.phase is Phase.HELD for request in self._requests.values())
        return replace(self._counters, held=held, active=len(self._requests) - held)

    # -- layouts -----------------------------------------------------------------------------------------------------

    def _serve(self, event: Served, now: float) -> list[Effect]:
        self._route = _Route(event.epoch, event.model_name, event.fingerprint)
        effects: list[Effect] = []
        if self._drain_until is None:  # else what the last layout has begun keeps its time
            effects += self._take_back_all("the layout changed", now)
        for request in self._held():
            request.tries = 0
            effects += self._dispatch(request, now)
        return effects

    def _unserve(self, event: Unserved, now: float) -> list[Effect]:
        self._route = None
        self._reason = event.reason
        if event.drain_s > 0:
            self._drain_until = now + event.drain_s
            return []
        return self._take_back_all(event.reason, now)

    def _stop(self, event: Stopped, now: float) -> list[Effect]:
        self._stopping = event.reason
        self._route = None
        self._drain_until = None
        effects: list[Effect] = []
        for request in list(self._requests.values()):
            if request.phase is not Phase.HELD:
                effects.append(Abandon(request.id, request.attempt))
            effects += self._fail(request, failure.stopping(event.reason))
        return effects

    def _take_back_all(self, reason: str, now: float) -> list[Effect]:
        """Whatever is under way, but for what the layout served now was asked."""
        planned = self._drain_until is not None
        self._drain_until = None
        current = None if self._route is None else self._route.epoch
        lost = [request for request in self._under_way() if request.epoch != current]
        return [effect for request in lost for effect in self._take_back(request, reason, planned, now)]

    def _take_back(self, request: _Request, reason: str, planned: bool, now: float) -> list[Effect]:
        return [Abandon(request.id, request.attempt), *self._lose(request, Loss.BROKEN, reason, planned, now)]

    # -- requests ----------------------------------------------------------------------------------------------------

    def _arrive(self, event: Arrived, now: float) -> list[Effect]:
        assert event.request not in self._requests, "a request arrives once"
        patience_s = self.limits.hold_s if event.holds else 0.0
        request = _Request(
            id=event.request,
            streams=event.streams,
            model=event.model,
            patience_s=patience_s,
            deadline=now + patience_s,
            comfort_at=now + self.limits.comfort_after_s,
        )
        waiting = len(self._held())
        self._requests[event.request] = request
        if self._stopping is not None:
            return self._fail(request, failure.stopping(self._stopping))
        if self._route is not None:
            return self._dispatch(request, now)
        if not event.holds:
            return self._fail(request, failure.not_serving(self._reason, 0.0, self.limits.retry_after_s))
        if waiting >= self.limits.max_held:
            return self._fail(request, failure.queue_full(waiting, self.limits.retry_after_s))
        return []

    def _advance(self, event: RequestEvent, now: float) -> list[Effect]:
        request = self._requests.get(event.request)
        if request is None:
            return []
        if not isinstance(event, Departed) and (event.attempt != request.attempt or request.phase is Phase.HELD):
            return []
        return _TRANSITIONS[request.phase, type(event)](self, request, event, now)

    def _depart(self, request: _Request, event: RequestEvent, now: float) -> list[Effect]:
        del self._requests[request.id]
        return [] if request.phase is Phase.HELD else [Abandon(request.id, request.attempt)]

    def _begin(self, request: _Request, event: RequestEvent, now: float) -> list[Effect]:
        assert isinstance(event, Began)
        request.phase = Phase.STREAMING
        request.begun = request.promised = True
        request.resumable = event.resumable
        request.fruitless = 0
        return []

    def _record(self, request: _Request, event: RequestEvent, now: float) -> list[Effect]:
        request.fruitless = 0
        request.resumable = not request.anew
        return []

    def _spoil(self, request: _Request, event: RequestEvent, now: float) -> list[Effect]:
        request.resumable = False
        return []

    def _refuse(self, request: _Request, event: RequestEvent, now: float) -> list[Effect]:
        assert isinstance(event, Refused)
        if request.begun:
            return self._fail(request, failure.cannot_resume(event.reason))
        request.anew = True
        request.resumable = False
        request.deadline = now + request.patience_s
        return self._lose(request, Loss.UNREACHED, event.reason, planned=False, now=now)

    def _complete(self, request: _Request, event: RequestEvent, now: float) -> list[Effect]:
        del self._requests[request.id]
        counters = self._counters
        self._counters = replace(
            counters, completed=counters.completed + 1, resumed=counters.resumed + (request.losses > 0)
        )
        return []

    def _lost(self, request: _Request, event: RequestEvent, now: float) -> list[Effect]:
        assert isinstance(event, Lost)
        return self._lose(request, event.loss, event.reason, self._drain_until is not None, now)

    def _lose(self, request: _Request, loss: Loss, reason: str, planned: bool, now: float) -> list[Effect]:
        request.reason = reason
        if loss is Loss.BROKEN:
            request.losses += 1
            # A long answer may outlast the drains of many machines that come and go: none of them died of it.
            request.fruitless += not planned
            # The engine had taken the request: the next wait is a new one.
            request.deadline = now + request.patience_s
        if request.begun and not request.resumable:
            return self._fail(request, failure.stream_interrupted(reason))
        if request.fruitless > self.limits.max_losses:
            return self._fail(request, failure.engine_lost(request.losses, reason))
        delays = self.limits.retry_delays_s
        request.phase = Phase.HELD
        request.retry_at = now + delays[min(request.tries, len(delays) - 1)]
        request.tries += 1
        request.comfort_at = now + self.limits.comfort_after_s
        if self._route is not None and self._route.epoch != request.epoch:
            request.tries = 0
            request.retry_at = now
        return self._expire(request, now) if now >= request.deadline else []

    def _dispatch(self, request: _Request, now: float) -> list[Effect]:
        assert self._route is not None
        if not means(request.model, self._route.model_name):
            return self._fail(request, failure.model_not_found(request.model or "", self._route.model_name))
        if request.asked_of is not None and not self._route.has_model_of(request.asked_of):
            if request.begun:
                return self._fail(request, failure.cannot_resume(f'the mesh serves "{self._route.model_name}" now'))
            request.resumable = False
        request.asked_of = self._route
        request.phase = Phase.ASKED
        request.attempt += 1
        request.epoch = self._route.epoch
        return [Dispatch(request.id, request.attempt, self._route.epoch, resume=request.resumable)]

    def _fail(self, request: _Request, why: Failure) -> list[Effect]:
        del self._requests[request.id]
        self._counters = replace(self._counters, failed=self._counters.failed + 1)
        return [Fail(request.id, why)]

    # -- time --------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._drain_until is not None and now >= self._drain_until:
            effects += self._take_back_all(self._reason, now)
        for request in self._held():
            if now >= request.deadline:
                effects += self._expire(request, now)
            elif self._route is not None and now >= request.retry_at:
                effects += self._dispatch(request, now)
            else:
                effects += self._comfort(request, now)
        for request in self._requests.values():
            if request.phase is Phase.ASKED and request.promised:
                effects += self._comfort(request, now)
        return effects

    def _comfort(self, request: _Request, now: float) -> list[Effect]:
        if not request.streams or now < request.comfort_at:
            return []
        request.comfort_at = now + self.limits.comfort_every_s
        request.promised = True
        return [Comfort(request.id)]

    def _expire(self, request: _Request, now: float) -> list[Effect]:
        reason = self._reason if self._route is None else f"the engine does not answer: {request.reason}"
        waited_s = now - (request.deadline - request.patience_s)
        return self._fail(request, failure.not_serving(reason, waited_s, self.limits.retry_after_s))

    def _timers(self, request: _Request) -> list[float]:
        if request.phase is not Phase.HELD:
            # An engine that goes on with an answer computes it again first, in silence.
            comforted = request.phase is Phase.ASKED and request.promised and request.streams
            return [request.comfort_at] if comforted else []
        times = [request.deadline]
        if request.streams:
            times.append(request.comfort_at)
        if self._route is not None:
            times.append(request.retry_at)
        return times

    def _held(self) -> list[_Request]:
        return [request for request in self._requests.values() if request.phase is Phase.HELD]

    def _under_way(self) -> list[_Request]:
        return [request for request in self._requests.values() if request.phase is not Phase.HELD]


_Step = Callable[[Core, _Request, RequestEvent, float], list[Effect]]
_TRANSITIONS: dict[tuple[Phase, type], _Step] = {
    (Phase.HELD, Departed): Core._depart,
    (Phase.ASKED, Departed): Core._depart,
    (Phase.ASKED, Began): Core._begin,
    (Phase.ASKED, Advanced): Core._record,
    (Phase.ASKED, Spoiled): Core._spoil,
    (Phase.ASKED, Completed): Core._complete,
    (Phase.ASKED, Lost): Core._lost,
    (Phase.ASKED, Refused): Core._refuse,
    (Phase.STREAMING, Departed): Core._depart,
    (Phase.STREAMING, Completed): Core._complete,
    (Phase.STREAMING, Lost): Core._lost,
    (Phase.STREAMING, Spoiled): Core._spoil,
}
"""What is not here is a bug, and raises."""
