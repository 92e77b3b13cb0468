"""The newcomer's side of pairing: ask one member, and wait until a person types our code there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh.errors import AdmissionError, TransportError, WireError
from mesh.identity.pairing import Attempt, Member, Newcomer
from mesh.membership.door import refusal
from mesh.membership.join import JoinResult, accept, reach
from mesh.transport.lane import Connection, Lane, Stream
from mesh.wire.codec import control_decoder, encode, read_frame
from mesh.wire.messages import PROTOCOL, Ask, Asked, Mistyped, OpenControl, Prove, Proven, Refused, Still

REACH_WITHIN_S = 5.0
SAY_EVERY_S = 10.0
"""That we still wait: a connection that nobody uses is closed."""
SILENCE_S = 25.0
ASKED_WITHIN_S = 5.0
"""Until a member says that it knows our request."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the waiting is told of. ``on_asked``: the request is known there; ``on_mistyped``: a wrong code was typed
    there, or somebody guesses; False: enough of that."""

    on_asked: Callable[[], None]
    on_mistyped: Callable[[], bool]


async def ask(
    lane: Lane,
    addresses: Sequence[str],
    prefix: str,
    code: str,
    newcomer: Newcomer,
    told: Told,
    wall: Callable[[], float],
) -> JoinResult:
    """Ask the member at ``addresses`` to be let in, by whoever knows ``code``. Lasts until it says how that ended.

    Args:
        prefix: how the member's id begins, as announced. Whether it is to be trusted, its proof says.
        code: as :func:`mesh.identity.pairing.read_code` gives it.
        newcomer: this machine; ``lane`` proves its key.
        wall: seconds since 1970.

    Raises:
        TransportError: it cannot be reached, or is no longer.
        AdmissionError: it refuses: ``expired``, ``dropped``, ``too-many``, ...; or it proved nothing (``guessed``).
        WireError: it speaks nonsense.
    """
    connection, failures = await reach(lane, addresses, expect=None, timeout=REACH_WITHIN_S)
    if connection is None:
        raise failures[0][1] if failures else TransportError("it announces no address", code="unreachable")
    saying: asyncio.Task[None] | None = None
    try:
        if not connection.peer.startswith(prefix):
            raise AdmissionError(f"another node answered at {connection.address}", code="wrong-key")
        attempt = Attempt(code, newcomer, secrets.token_bytes)
        stream = await connection.open_stream()
        words = _Words(stream)
        await words.say(OpenControl(), Ask(PROTOCOL, newcomer.name, newcomer.role, attempt.element))
        saying = asyncio.get_running_loop().create_task(_keep_saying(words))
        return await _wait(connection, words, attempt, code, newcomer, told, wall)
    except (TimeoutError, EOFError) as error:
        raise TransportError(f"{connection.address} is silent", code="no-answer") from error
    finally:
        if saying is not None:
            saying.cancel()
        connection.close(0, "no more questions")


async def _wait(
    connection: Connection,
    words: _Words,
    attempt: Attempt,
    code: str,
    newcomer: Newcomer,
    told: Told,
    wall: Callable[[], float],
) -> JoinResult:
    patience = ASKED_WITHIN_S
    while True:
        heard = await words.hear(patience)
        patience = SILENCE_S
        match heard:
            case Asked():
                told.on_asked()
            case Prove(mesh, element, proof):
                ours = attempt.answer(Member(connection.peer_key, mesh), element, proof)
                if ours is not None:
                    await words.say(Proven(ours))
                    return accept(await words.hear(SILENCE_S), mesh, connection, newcomer.public, wall())
                if not told.on_mistyped():
                    raise AdmissionError(f"{connection.address} proved nothing, too often", code="guessed")
                attempt = Attempt(code, newcomer, secrets.token_bytes)
                await words.say(Mistyped(attempt.element))
            case Refused() as refused:
                raise refusal(refused)
            case other:
                # Joined among them: nobody lets us into a mesh without having been told the code.
                raise WireError(f"a member answered a request with {type(other).__name__}")


class _Words:
    """A stream on which two tasks speak."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._speaking = asyncio.Lock()

    async def say(self, *messages: object) -> None:
        async with self._speaking:
            await self._stream.write(b"".join(encode(message) for message in messages))

    async def hear(self, within: float) -> object:
        async with asyncio.timeout(within):
            return await read_frame(self._stream, control_decoder)


async def _keep_saying(words: _Words) -> None:
    while True:
        await asyncio.sleep(SAY_EVERY_S)
        await words.say(Still())
