"""What is said on a fresh connection until it is a link: both sides of the door, over real streams.

The dialer opens the control stream and says :class:`Hello` (or :class:`Join`, or :class:`Ask`) at once; the listener
answers with its own Hello, :class:`Joined` or :class:`Refused`; who asks may wait at the desk. Nothing else is
understood before both Hellos, and whoever says nothing is shown out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mesh.clock import Clock
from mesh.errors import MeshError, StateError, TransportError, WireError
from mesh.identity.grants import Roster
from mesh.identity.invite import InviteBook
from mesh.identity.key import NodeKey
from mesh.membership.desk import Desk
from mesh.membership.door import Admitted, Choice, JoinGate, answer_join, refusal, weigh_hello
from mesh.membership.link import Link
from mesh.transport.address import split_address
from mesh.transport.lane import Connection, Stream
from mesh.transport.strangers import Room, neighbourhood
from mesh.wire.codec import MAX_OPEN_FRAME, control_decoder, encode, open_decoder, read_frame
from mesh.wire.facts import NodeFacts, NodeId
from mesh.wire.messages import PROTOCOL, Ask, Hello, Join, Joined, MemberAddress, Move, OpenControl, Refused

log = logging.getLogger(__name__)

GREET_WITHIN_S = 5.0
"""From the end of the handshake to Hello or Join."""
WAIT_FOR_OURS_S = 2.0
"""How long a peer's dial waits for ours to the same peer, which has precedence."""
MAX_STRANGERS = 256
MAX_STRANGERS_EACH = 32
"""Of them from one address."""
MAX_MEMBERS = 256
MAX_MEMBERS_EACH = 16
"""Connections of one member that were not greeted yet: however many strangers come, members have room of their own."""


@dataclass(frozen=True, slots=True)
class Guest:
    """Somebody at the door, the room it waits in, and as whom it counts there."""

    first: asyncio.Future[Stream]
    room: Room
    source: str


class House(Protocol):
    """What lies behind the door."""

    def choice(self, peer: NodeId) -> Choice: ...
    async def outcome_of_our_dial(self, peer: NodeId, timeout: float) -> None: ...
    def admit(self, connection: Connection, control: Stream, facts: NodeFacts, verdict: Admitted) -> Link: ...
    def is_linked(self, peer: NodeId) -> bool: ...
    def may_move(self, onto: Connection) -> bool: ...
    def move(self, onto: Connection) -> None: ...
    def unlink(self, peer: NodeId, reason: str) -> None: ...
    def joined(self, answer: Joined) -> None: ...
    def address_list(self) -> Iterable[MemberAddress]: ...


class Greeter:
    """Says and hears the first words.

    Args:
        invites: None when this node lets nobody in.
        desk: likewise.
    """

    def __init__(
        self,
        house: House,
        key: NodeKey,
        roster: Roster,
        clock: Clock,
        *,
        facts: Callable[[], NodeFacts],
        mesh_name: str,
        invites: InviteBook | None,
        desk: Desk | None,
    ) -> None:
        self._house = house
        self._key = key
        self._roster = roster
        self._clock = clock
        self._facts = facts
        self._mesh_name = mesh_name
        self._invites = invites
        self._desk = desk
        self._gate = JoinGate()
        self._strangers = Room(MAX_STRANGERS, MAX_STRANGERS_EACH)
        self._members = Room(MAX_MEMBERS, MAX_MEMBERS_EACH)

    # -- listening ---------------------------------------------------------------------------------------------------

    def receive(self, connection: Connection) -> Guest | None:
        """Somebody connected. Returns it with its first stream to come, for :meth:`greet`; None: it was sent away."""
        room, source = self._room_for(connection)
        if not room.enter(source):
            connection.close(0, "busy")
            return None
        first: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

        def opened(stream: Stream) -> None:
            if first.done():
                stream.abort()  # nothing but one control stream before admission
            else:
                first.set_result(stream)

        def closed(reason: str) -> None:
            if not first.done():
                first.set_exception(TransportError(reason))
                first.exception()  # seen: nobody may be waiting any more

        connection.on_stream = opened
        connection.on_close = closed
        return Guest(first, room, source)

    def _room_for(self, connection: Connection) -> tuple[Room, str]:
        if self._is_member(connection):
            return self._members, connection.peer
        return self._strangers, neighbourhood(_host_of(connection.address))

    def _is_member(self, connection: Connection) -> bool:
        return self._roster.role_of(connection.peer_key, self._clock.wall()) is not None

    async def greet(self, connection: Connection, guest: Guest) -> None:
        """From a proven key to a link, or to the way out. Never raises for what the peer does."""
        source = neighbourhood(_host_of(connection.address))
        silent = True
        try:
            async with asyncio.timeout(GREET_WITHIN_S):
                stream = await guest.first
                opening = await read_frame(stream, open_decoder, MAX_OPEN_FRAME)
                if not isinstance(opening, OpenControl):
                    raise WireError("the first stream must be the control stream")
                message = await read_frame(stream, control_decoder)
            silent = False
            await self._answer(connection, stream, message, source)
        except WireError as error:
            self._gate.failed(source, self._clock.now())
            log.info("%s at %s: %s", connection.peer, connection.address, error.message)
            connection.close(1, "malformed greeting")
        except (TimeoutError, EOFError, MeshError) as error:
            if silent and isinstance(error, TimeoutError) and not self._is_member(connection):
                self._gate.failed(source, self._clock.now())  # those who keep the door open by saying nothing
            log.info("%s at %s was not greeted: %s", connection.peer, connection.address, error or "it said nothing")
            connection.close(1, "no greeting")
        except asyncio.CancelledError:
            connection.close(0, "shutting down")
            raise
        finally:
            guest.room.leave(guest.source)

    async def _answer(self, connection: Connection, stream: Stream, message: object, source: str) -> None:
        known = self._is_member(connection)
        if not known and not self._gate.is_open(source, self._clock.now()):
            await self._refuse(connection, stream, Refused("too-many", "too many failed attempts from your address"))
        elif isinstance(message, Join):
            await self._answer_join(connection, stream, message, source)
        elif isinstance(message, Ask) and self._desk is not None:
            last_words = await self._desk.serve(connection, stream, message, source)
            if last_words is None:
                raise TransportError("it does not wait any more")
            await _linger(connection, last_words)
        elif isinstance(message, Ask):
            await self._refuse(connection, stream, Refused("unknown", "this node does not invite"))
        elif isinstance(message, Hello):
            await self._answer_hello(connection, stream, message, source)
        elif isinstance(message, Move) and known:
            await self._answer_move(connection, stream)
        else:
            raise WireError(f"a stranger said {type(message).__name__}")

    async def _answer_join(self, connection: Connection, stream: Stream, join: Join, source: str) -> None:
        try:
            answer = answer_join(
                join,
                connection.peer_key,
                key=self._key,
                roster=self._roster,
                book=self._invites,
                mesh_name=self._mesh_name,
                members=self._house.address_list(),
                wall=self._clock.wall(),
            )
        except StateError as error:
            log.warning("%s", error.message)
            text = "the inviting machine cannot write to its disk, and lets nobody in until it can"
            await self._refuse(connection, stream, Refused("disk", text))
            return
        if isinstance(answer, Refused):
            self._gate.failed(source, self._clock.now())
            await self._refuse(connection, stream, answer)
            return
        self._house.joined(answer)
        await stream.write(encode(answer))
        await _linger(connection, "joined")

    async def _answer_hello(self, connection: Connection, stream: Stream, hello: Hello, source: str) -> None:
        verdict = weigh_hello(hello, connection.peer_key, self._roster, self._clock.wall())
        if isinstance(verdict, Refused):
            self._gate.failed(source, self._clock.now())
            await self._refuse(connection, stream, verdict)
            return
        if self._house.choice(connection.peer) == "wait":
            await self._house.outcome_of_our_dial(connection.peer, WAIT_FOR_OURS_S)
        if connection.closed:
            return
        if self._house.choice(connection.peer) == "refuse":
            await self._refuse(connection, stream, Refused("duplicate", "we are connected already"))
            return
        await stream.write(encode(self.hello()))
        if self._roster.role_of(connection.peer_key, self._clock.wall()) != verdict.role:
            connection.close(0, "revoked")  # while it waited at the door
            return
        self._house.admit(connection, stream, hello.facts, verdict)

    async def _answer_move(self, connection: Connection, stream: Stream) -> None:
        if not self._house.is_linked(connection.peer):
            await self._refuse(connection, stream, Refused("not-linked", "there is no link to move"))
            return
        self._house.move(connection)
        await stream.write(encode(Move()))
        await _linger(connection, "moved")

    async def _refuse(self, connection: Connection, stream: Stream, refused: Refused) -> None:
        if refused.code != "duplicate":
            log.info("refused %s at %s: %s", connection.peer, connection.address, refused.message)
        await stream.write(encode(refused))
        await _linger(connection, refused.code)

    # -- dialing -----------------------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """What this node says of itself."""
        chain = self._roster.chain(self._key.public, self._clock.wall())
        return Hello(PROTOCOL, self._roster.mesh, chain, self._roster.revocations, self._facts())

    async def introduce(self, connection: Connection) -> Link | None:
        """Say Hello on a connection we dialed, and hear the peer's. None: there is a link already.

        Raises:
            AdmissionError: the peer refused us, or is no member itself.
            TransportError: no answer.
            WireError: nonsense instead.
        """
        if self._house.may_move(connection):
            await self._ask_to_move(connection)
            return None
        if self._house.is_linked(connection.peer):
            connection.close(0, "we are connected already")  # a Hello would replace the link there is
            return None
        early: list[Stream] = []
        connection.on_stream = early.append  # the peer may open streams before its Hello reaches us
        connection.on_close = lambda reason: None
        link: Link | None = None
        try:
            async with asyncio.timeout(GREET_WITHIN_S + WAIT_FOR_OURS_S):
                stream = await connection.open_stream()
                await stream.write(encode(OpenControl()) + encode(self.hello()))
                answer = await read_frame(stream, control_decoder)
            if isinstance(answer, Refused):
                raise refusal(answer)
            if not isinstance(answer, Hello):
                raise WireError(f"the peer answered Hello with {type(answer).__name__}")
            verdict = weigh_hello(answer, connection.peer_key, self._roster, self._clock.wall())
            if isinstance(verdict, Refused):
                raise refusal(verdict)
            if connection.closed or self._house.is_linked(connection.peer):
                return None
            link = self._house.admit(connection, stream, answer.facts, verdict)
        except (TimeoutError, EOFError) as error:
            raise TransportError(f"{connection.address} did not answer Hello: {error}", code="no-answer") from error
        finally:
            if link is None:
                connection.close(0, "no link")
        for one in early:
            connection.on_stream(one)
        return link

    async def _ask_to_move(self, connection: Connection) -> None:
        """The link there is goes on over this connection's path, with all its streams; this one was only to find it."""
        try:
            async with asyncio.timeout(GREET_WITHIN_S):
                stream = await connection.open_stream()
                await stream.write(encode(OpenControl()) + encode(Move()))
                answer = await read_frame(stream, control_decoder)
            if isinstance(answer, Move) and self._house.may_move(connection):
                self._house.move(connection)
            elif isinstance(answer, Refused) and answer.code == "not-linked":
                self._house.unlink(connection.peer, "the other side has lost it")
        except (TimeoutError, EOFError) as error:
            raise TransportError(f"{connection.address} did not answer Move: {error}", code="no-answer") from error
        finally:
            connection.close(0, "it has shown the way")


async def _linger(connection: Connection, reason: str) -> None:
    """Let the last answer arrive: a close overtakes what is still on its way. The peer closes when it has read it."""
    gone = asyncio.Event()
    connection.on_close = lambda reason: gone.set()
    try:
        async with asyncio.timeout(GREET_WITHIN_S):
            await gone.wait()
    except TimeoutError:
        pass
    finally:
        connection.close(0, reason)


def _host_of(address: str) -> str:
    try:
        return split_address(address)[0]
    except MeshError:
        return address
