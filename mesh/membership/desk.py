"""Where machines without a token wait until a person types the code they show: a member's side of pairing."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import Protocol

import mesh.membership.requests as core
from mesh.clock import Clock
from mesh.errors import MeshError, WireError
from mesh.identity.grants import Roster
from mesh.identity.key import NodeKey, node_id
from mesh.identity.pairing import Member, Newcomer
from mesh.membership.door import JoinGate, let_in
from mesh.pump import Pump
from mesh.transport.lane import Connection, Stream
from mesh.wire.codec import MAX_OPEN_FRAME, control_decoder, encode, read_frame
from mesh.wire.messages import (
    PROTOCOL,
    Approved,
    Ask,
    Asked,
    Joined,
    MemberAddress,
    Mistyped,
    Prove,
    Proven,
    Refused,
    Still,
)

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 4 * core.ANSWER_S
"""For what becomes of a typed code."""
_MAX_UNSENT = 16


class House(Protocol):
    """What lies behind the desk."""

    def joined(self, answer: Joined) -> None: ...
    def address_list(self) -> Iterable[MemberAddress]: ...


class Desk:
    """Holds the requests of one member.

    Args:
        on_asked: a machine asks; show it to people.
    """

    def __init__(
        self,
        house: House,
        key: NodeKey,
        roster: Roster,
        clock: Clock,
        *,
        mesh_name: str,
        on_asked: Callable[[core.Request], None],
    ) -> None:
        self._house = house
        self._key = key
        self._roster = roster
        self._clock = clock
        self._mesh_name = mesh_name
        self._on_asked = on_asked
        self._requests = core.Requests(Member(key.public, roster.mesh), secrets.token_bytes)
        self._pump = Pump(self._requests, self._carry_out, core.Tick, clock)
        self._gate = JoinGate(per_source=10, overall=60)
        self._numbers = itertools.count(1)
        self._unsent: dict[core.RequestId, asyncio.Queue[Asked | Prove | Joined | Refused | None]] = {}
        self._typed: dict[core.Ticket, asyncio.Future[Approved]] = {}

    def open(self) -> tuple[core.Request, ...]:
        """Who asks now."""
        return self._requests.open()

    def close(self) -> None:
        self._pump.stop()

    # -- the machine that asks ---------------------------------------------------------------------------------------

    async def serve(self, connection: Connection, stream: Stream, ask: Ask, host: str) -> str | None:
        """Hold a request until it comes to something. Returns what our last words were about; None: there were none.

        Raises:
            TransportError: the connection is lost.
        """
        refused = self._weigh(ask, host)
        if refused is not None:
            await stream.write(encode(refused))
            return refused.code
        number = next(self._numbers)
        unsent = self._unsent[number] = asyncio.Queue()
        newcomer = Newcomer(connection.peer_key, ask.role, ask.name)
        reading = asyncio.get_running_loop().create_task(self._read(number, stream))
        try:
            self._pump.feed(core.Came(number, newcomer, node_id(connection.peer_key), host, ask.element))
            while (message := await unsent.get()) is not None:
                await stream.write(encode(message))
                if isinstance(message, Joined | Refused):
                    return message.code if isinstance(message, Refused) else "joined"
            return None
        finally:
            reading.cancel()
            del self._unsent[number]
            self._pump.feed(core.Gone(number))

    def _weigh(self, ask: Ask, host: str) -> Refused | None:
        if ask.protocol != PROTOCOL:
            return Refused("protocol", f"this node speaks protocol {PROTOCOL}, yours {ask.protocol}")
        if self._roster.role_of(self._key.public, self._clock.wall()) != "worker":
            return Refused("unknown", "this node does not invite")
        if not self._gate.is_open(host, self._clock.now()):
            return Refused("too-many", "too many requests from your address")
        self._gate.failed(host, self._clock.now())
        return None

    async def _read(self, number: core.RequestId, stream: Stream) -> None:
        try:
            while True:
                match await read_frame(stream, control_decoder, MAX_OPEN_FRAME):
                    case Still():
                        self._pump.feed(core.Heard(number))
                    case Proven(proof):
                        self._pump.feed(core.Answered(number, proof=proof))
                    case Mistyped(element):
                        self._pump.feed(core.Answered(number, element=element))
                    case other:
                        raise WireError(f"a machine that asks to be let in said {type(other).__name__}")
        except (EOFError, MeshError) as error:
            log.info("request %d is over: %s", number, error or "it hung up")
        finally:
            self._send(number, None)

    def _send(self, number: core.RequestId, message: Asked | Prove | Joined | Refused | None) -> None:
        unsent = self._unsent.get(number)
        if unsent is not None:
            # Whoever asks much and reads nothing gets nothing more.
            unsent.put_nowait(message if unsent.qsize() < _MAX_UNSENT else None)

    # -- the person who types ----------------------------------------------------------------------------------------

    async def approve(self, code: str) -> Approved:
        """Let in the machine that shows ``code``; the answer says which, or why not. ``seq`` is not used."""
        ticket = next(self._numbers)
        future: asyncio.Future[Approved] = asyncio.get_running_loop().create_future()
        self._typed[ticket] = future
        self._pump.feed(core.Typed(ticket, code))
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await future
        except TimeoutError:
            return Approved(0, "wrong-code", "no machine that asks to be let in has answered")
        finally:
            del self._typed[ticket]

    def _carry_out(self, effect: core.Effect) -> None:
        match effect:
            case core.Say(number, message):
                self._send(number, message)
            case core.SendAway(number, refused):
                self._send(number, refused)
            case core.Show(request):
                log.info("%s at %s asks to be let in as a %s", request.node, request.host, request.role)
                self._on_asked(request)
            case core.Admit(ticket, request):
                self._admit(ticket, request)
            case core.Failed(ticket, code, message):
                self._settle(ticket, Approved(0, code, message))

    def _admit(self, ticket: core.Ticket, request: core.Request) -> None:
        try:
            answer = let_in(
                request.newcomer.public,
                request.role,
                key=self._key,
                roster=self._roster,
                mesh_name=self._mesh_name,
                members=self._house.address_list(),
                wall=self._clock.wall(),
            )
            if isinstance(answer, Joined):
                self._house.joined(answer)
        except MeshError as error:
            answer = Refused(error.code, error.message[:1024])
        self._send(request.id, answer)
        if isinstance(answer, Refused):
            self._settle(ticket, Approved(0, answer.code, answer.message))
        else:
            self._settle(ticket, Approved(0, "", "", request.node, request.name, request.role))

    def _settle(self, ticket: core.Ticket, result: Approved) -> None:
        future = self._typed.get(ticket)
        if future is not None and not future.done():
            future.set_result(result)
