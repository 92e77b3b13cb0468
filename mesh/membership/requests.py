"""Machines that ask to be let in without a token, and the codes that people type for them. Pure.

A request is held while its connection stands, and answered when a code is typed: every open request is challenged with
it, and the one whose machine shows that code proves so. A stranger who asks gets one guess for each code that a person
types, out of 35 bits; asking costs this node no computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mesh.errors import WireError
from mesh.identity.pairing import Challenge, Member, Newcomer, challenge
from mesh.wire.facts import Role
from mesh.wire.messages import Asked, Prove, Refused

LIFE_S = 300.0
"""How long a request waits for its code."""
SILENCE_S = 30.0
"""An asking machine says every ten seconds that it still waits."""
ANSWER_S = 5.0
"""For the answer to a challenge: a round trip and two multiplications."""
MAX_TRIES = 3
MAX_REQUESTS = 8
MAX_OF_ONE_HOST = 4
MAX_TICKETS = 8
"""Typed codes that are being tried at once."""
_REMEMBERED = 16

RequestId = int
Ticket = int


@dataclass(frozen=True, slots=True)
class Came:
    """A machine asks. ``request`` is a new number, ``host`` where it asks from."""

    request: RequestId
    newcomer: Newcomer
    node: str
    host: str
    element: bytes


@dataclass(frozen=True, slots=True)
class Heard:
    """It still waits."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Answered:
    """It says that the code is its own: ``proof``; or that it is not, and gives an ``element`` for one more."""

    request: RequestId
    proof: bytes = b""
    element: bytes = b""


@dataclass(frozen=True, slots=True)
class Gone:
    """Its connection is over."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Typed:
    """A person typed ``code`` (as :func:`mesh.identity.pairing.read_code` gives it); ``ticket`` is a new number."""

    ticket: Ticket
    code: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A timer is due."""


Event = Came | Heard | Answered | Gone | Typed | Tick


@dataclass(frozen=True, slots=True)
class Say:
    request: RequestId
    message: Asked | Prove


@dataclass(frozen=True, slots=True)
class SendAway:
    """The request is over: say so and close its connection."""

    request: RequestId
    refused: Refused


@dataclass(frozen=True, slots=True)
class Show:
    """People should know that a machine asks."""

    request: Request


@dataclass(frozen=True, slots=True)
class Admit:
    """The person behind ``ticket`` read the code on this very machine."""

    ticket: Ticket
    request: Request


@dataclass(frozen=True, slots=True)
class Failed:
    """What was typed let nobody in. ``code``: ``no-request``, ``wrong-code``, ``expired``, ``dropped`` or ``busy``."""

    ticket: Ticket
    code: str
    message: str


Effect = Say | SendAway | Show | Admit | Failed


@dataclass(frozen=True, slots=True)
class Request:
    """What people are shown of one."""

    id: RequestId
    newcomer: Newcomer
    node: str
    host: str
    expires: float

    @property
    def name(self) -> str:
        return self.newcomer.name

    @property
    def role(self) -> Role:
        return self.newcomer.role


@dataclass(slots=True)
class _Trial:
    ticket: Ticket
    challenge: Challenge
    until: float


@dataclass(slots=True)
class _Open:
    request: Request
    element: bytes
    heard: float
    tries: int = 0
    trial: _Trial | None = None
    queue: deque[Typed] = field(default_factory=deque)
    """Codes typed while another is being tried."""


class Requests:
    """``handle`` takes events, ``next_timer`` says when to tick.

    Args:
        us: the member that challenges: this node.
        randomness: so many secret random bytes.
    """

    def __init__(self, us: Member, randomness: Callable[[int], bytes]) -> None:
        self._us = us
        self._randomness = randomness
        self._open: dict[RequestId, _Open] = {}
        self._tickets: dict[Ticket, set[RequestId]] = {}
        """Whose answers each typed code still waits for."""
        self._worst: dict[Ticket, str] = {}
        self._ended: deque[tuple[str, str, float]] = deque(maxlen=_REMEMBERED)
        """``(name, how, when)`` of requests that are over, so that a person who comes late is told why."""

    def open(self) -> tuple[Request, ...]:
        """Who asks now, longest first."""
        return tuple(entry.request for entry in self._open.values())

    def next_timer(self) -> float | None:
        due = [min(entry.request.expires, entry.heard + SILENCE_S) for entry in self._open.values()]
        due += [entry.trial.until for entry in self._open.values() if entry.trial is not None]
        return min(due, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Came():
                return list(self._came(event, now))
            case Heard(request):
                return list(self._heard(request, now))
            case Answered(request, proof, element):
                return list(self._answered(request, proof, element, now))
            case Gone(request):
                return list(self._end(request, "gone", now))
            case Typed(ticket, code):
                return list(self._typed(ticket, code, now))
            case Tick():
                return list(self._overdue(now))

    def _came(self, came: Came, now: float) -> Iterator[Effect]:
        again = [id for id, entry in self._open.items() if entry.request.node == came.node]
        for id in again:  # a machine that lost its connection and asks anew
            yield from self._end(id, "gone", now, Refused("replaced", "this machine asks on another connection"))
        of_host = sum(entry.request.host == came.host for entry in self._open.values())
        request = Request(came.request, came.newcomer, came.node, came.host, now + LIFE_S)
        if len(self._open) >= MAX_REQUESTS or of_host >= MAX_OF_ONE_HOST:
            yield SendAway(came.request, Refused("too-many", "too many machines ask to be let in right now"))
            return
        self._open[came.request] = _Open(request, came.element, now)
        yield Say(came.request, Asked(LIFE_S))
        yield Show(request)

    def _heard(self, id: RequestId, now: float) -> Iterator[Effect]:
        entry = self._open.get(id)
        if entry is not None:
            entry.heard = now
            yield Say(id, Asked(max(0.0, entry.request.expires - now)))

    # -- a code ------------------------------------------------------------------------------------------------------

    def _typed(self, ticket: Ticket, code: str, now: float) -> Iterator[Effect]:
        if not self._open:
            yield self._nobody(ticket, now)
            return
        if len(self._tickets) >= MAX_TICKETS:
            yield Failed(ticket, "busy", "other codes are being tried")
            return
        self._tickets[ticket] = set(self._open)
        for id in list(self._open):
            entry = self._open.get(id)
            if entry is None:
                continue
            if entry.trial is None:
                yield from self._challenge(entry, Typed(ticket, code), now)
            else:
                entry.queue.append(Typed(ticket, code))

    def _challenge(self, entry: _Open, typed: Typed, now: float) -> Iterator[Effect]:
        id = entry.request.id
        try:
            made = challenge(typed.code, entry.request.newcomer, self._us, entry.element, self._randomness)
        except WireError:
            yield from self._end(id, "lied", now, Refused("malformed", "that is no pairing element"))
            return
        entry.trial = _Trial(typed.ticket, made, now + ANSWER_S)
        entry.heard = max(entry.heard, now)
        yield Say(id, Prove(self._us.mesh, made.element, made.proof))

    def _answered(self, id: RequestId, proof: bytes, element: bytes, now: float) -> Iterator[Effect]:
        entry = self._open.get(id)
        if entry is None:
            return
        trial, entry.trial, entry.heard = entry.trial, None, now
        if trial is None:
            yield from self._end(id, "lied", now, Refused("malformed", "nobody asked for that"))
        elif proof and trial.challenge.is_met_by(proof):
            del self._open[id]
            won = self._tickets.pop(trial.ticket, None) is not None
            self._worst.pop(trial.ticket, None)
            if won:
                yield Admit(trial.ticket, entry.request)
            else:
                yield SendAway(id, Refused("wrong-code", "another machine was let in with that code"))
            for typed in entry.queue:
                yield from self._missed(typed.ticket, id, "no-request")
        elif proof:
            yield from self._end(id, "lied", now, Refused("wrong-code", "that proves nothing"), trial.ticket)
        else:
            yield from self._mistyped(entry, trial, element, now)

    def _mistyped(self, entry: _Open, trial: _Trial, element: bytes, now: float) -> Iterator[Effect]:
        entry.tries += 1
        id = entry.request.id
        if entry.tries >= MAX_TRIES:
            refused = Refused("dropped", f"{MAX_TRIES} wrong codes were typed")
            yield from self._end(id, "dropped", now, refused, trial.ticket)
            return
        entry.element = element
        yield from self._missed(trial.ticket, id, "wrong-code")
        if entry.queue:
            yield from self._challenge(entry, entry.queue.popleft(), now)

    def _missed(self, ticket: Ticket, id: RequestId, how: str) -> Iterator[Effect]:
        """The code of ``ticket`` was not that of request ``id``. The last one to say so ends the matter."""
        waiting = self._tickets.get(ticket)
        if waiting is None:
            return
        waiting.discard(id)
        if how != "no-request" or ticket not in self._worst:
            self._worst[ticket] = how
        if not waiting:
            del self._tickets[ticket]
            yield self._failed(ticket, self._worst.pop(ticket))

    # -- ends --------------------------------------------------------------------------------------------------------

    def _end(
        self, id: RequestId, how: str, now: float, refused: Refused | None = None, ticket: Ticket | None = None
    ) -> Iterator[Effect]:
        entry = self._open.pop(id, None)
        if entry is None:
            return
        self._ended.append((entry.request.name, how, now))
        if refused is not None:
            yield SendAway(id, refused)
        tickets = [typed.ticket for typed in entry.queue]
        tickets += [entry.trial.ticket] if entry.trial is not None else []
        tickets += [] if ticket is None else [ticket]
        verdict = {"dropped": "dropped", "expired": "expired", "lied": "wrong-code"}.get(how, "no-request")
        for one in tickets:
            yield from self._missed(one, id, verdict)

    def _overdue(self, now: float) -> Iterator[Effect]:
        for id, entry in list(self._open.items()):
            if now >= entry.request.expires:
                refused = Refused("expired", f"nobody typed the code within {LIFE_S / 60:.0f} minutes")
                yield from self._end(id, "expired", now, refused)
            elif now >= entry.heard + SILENCE_S or (entry.trial is not None and now >= entry.trial.until):
                yield from self._end(id, "gone", now, Refused("no-answer", "this machine did not answer"))

    def _nobody(self, ticket: Ticket, now: float) -> Failed:
        recent = [(name, how) for name, how, at in self._ended if now - at < 2 * LIFE_S]
        name, how = recent[-1] if recent else ("", "")
        if how in ("expired", "dropped"):
            return self._failed(ticket, how, name)
        return self._failed(ticket, "no-request")

    def _failed(self, ticket: Ticket, how: str, name: str = "") -> Failed:
        whose = f"the request of {name!r}" if name else "the request"
        left = max((MAX_TRIES - entry.tries for entry in self._open.values()), default=0)
        words = {
            "no-request": "no machine asks to be let in",
            "wrong-code": "no machine that asks to be let in shows that code"
            + (f"; {left} more {'try' if left == 1 else 'tries'}" if left else ""),
            "expired": f"{whose} has expired: nobody typed its code within {LIFE_S / 60:.0f} minutes",
            "dropped": f"{MAX_TRIES} wrong codes were typed, so {whose} was dropped",
        }
        return Failed(ticket, how, words[how])
