"""The joiner's side of the door."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.errors import AdmissionError, MeshError, TransportError
from mesh.identity.grants import Roster
from mesh.identity.invite import Invite
from mesh.membership.door import refusal
from mesh.transport.lane import Connection, Lane
from mesh.wire.codec import control_decoder, encode, read_frame
from mesh.wire.facts import MeshId, NodeId
from mesh.wire.messages import PROTOCOL, Grant, Join, Joined, MemberAddress, OpenControl, Refused

ANSWER_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class JoinResult:
    """Everything a new member needs to keep."""

    mesh: MeshId
    mesh_name: str
    founder: bytes
    grants: tuple[Grant, ...]
    members: tuple[MemberAddress, ...]
    inviter: NodeId
    address: str
    """Where the inviter answered."""


async def join(
    lane: Lane, invite: Invite, *, name: str, public: bytes, wall: float, timeout: float = 5.0
) -> JoinResult:
    """Ask the inviter to be let in.

    The secret leaves this machine only after the inviter's key was seen to be the token's.

    Args:
        name: what to call this machine.
        public: our own raw public key; ``lane`` proves that we hold it.
        wall: seconds since 1970.
        timeout: for reaching the inviter.

    Raises:
        TransportError: ``unreachable``; the message lists the addresses tried.
        AdmissionError: ``wrong-key``, ``expired``, ``spent``, ``unknown``, ``too-many``, ``protocol``.
    """
    connection = await _reach(lane, invite, wall, timeout)
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            stream = await connection.open_stream()
            await stream.write(encode(OpenControl()) + encode(Join(PROTOCOL, invite.secret, name)))
            answer = await read_frame(stream, control_decoder)
    except (TimeoutError, EOFError, TransportError) as error:
        raise TransportError(
            f"{connection.address} answered the call but not the question to be let in: {error or 'too slow'}",
            remedy="try again; the token is still good unless told otherwise",
            code="no-answer",
        ) from error
    finally:
        connection.close(0, "joined" if not connection.closed else "")
    if isinstance(answer, Refused):
        raise refusal(answer)
    if not isinstance(answer, Joined):
        raise AdmissionError(f"{connection.address} answered with a {type(answer).__name__}", code="protocol")
    roster = Roster(answer.mesh, answer.founder, answer.grants)
    if answer.mesh != invite.mesh or roster.role_of(public, wall) is None:
        raise AdmissionError(
            f"{connection.address} let us in, but its grants do not lead to the founder of mesh {invite.mesh}",
            remedy="is the clock of this machine right? Otherwise ask for a new invite",
            code="wrong-mesh",
        )
    return JoinResult(
        answer.mesh,
        answer.mesh_name,
        answer.founder,
        answer.grants,
        answer.members,
        invite.inviter_id,
        connection.address,
    )


async def _reach(lane: Lane, invite: Invite, wall: float, timeout: float) -> Connection:
    """Try every address of the token at once; the first with the right key wins."""
    if not invite.addresses:
        raise TransportError("this token names no address", remedy="mesh up --advertise HOST:PORT on the inviter")
    dials = {
        asyncio.ensure_future(lane.dial(address, expect=invite.inviter_id, timeout=timeout)): address
        for address in invite.addresses
    }
    failures: list[tuple[str, MeshError]] = []
    winner: Connection | None = None
    try:
        pending = set(dials)
        while pending and winner is None:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for dial in done:
                error = dial.exception()
                if error is None:
                    winner = dial.result()
                elif isinstance(error, MeshError):
                    failures.append((dials[dial], error))
                else:
                    raise error
    finally:
        for dial in dials:
            if not dial.done():
                dial.cancel()
        for result in await asyncio.gather(*dials, return_exceptions=True):
            if not isinstance(result, BaseException) and result is not winner:
                result.close(0, "another address was faster")
    if winner is None:
        raise _unreachable(invite, failures, wall)
    return winner


def _unreachable(invite: Invite, failures: Sequence[tuple[str, MeshError]], wall: float) -> MeshError:
    wrong = next((error for _, error in failures if error.code == "wrong-key"), None)
    if wrong is not None:
        return wrong
    tried = "\n".join(f"         {address}: {error.message}" for address, error in failures)
    expired = " (it has also expired)" if invite.expires_at and invite.expires_at <= wall else ""
    return TransportError(
        f"the machine that made this token cannot be reached{expired}; tried\n{tried}",
        remedy="is `mesh up` running there, and does its firewall let its UDP port through? "
        "From another network:  mesh up --advertise HOST:PORT  there, and a new token",
        code="unreachable",
    )
