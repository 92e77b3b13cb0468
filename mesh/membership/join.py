"""The joiner's side of the door."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.errors import AdmissionError, MeshError, TransportError
from mesh.identity.grants import Roster
from mesh.identity.invite import Invite
from mesh.identity.key import node_id
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
    if not invite.addresses:
        raise TransportError("this token names no address", remedy="mesh up --advertise HOST:PORT on the inviter")
    connection, failures = await reach(lane, invite.addresses, expect=invite.inviter_id, timeout=timeout)
    if connection is None:
        raise _unreachable(invite, failures, wall)
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
    return accept(answer, invite.mesh, connection, public, wall)


def accept(answer: object, mesh: MeshId, connection: Connection, public: bytes, wall: float) -> JoinResult:
    """What a member of ``mesh`` said at last to the holder of ``public``, if it lets us in.

    Raises:
        AdmissionError: it does not, or its grants prove nothing.
    """
    if isinstance(answer, Refused):
        raise refusal(answer)
    if not isinstance(answer, Joined):
        raise AdmissionError(f"{connection.address} answered with a {type(answer).__name__}", code="protocol")
    trusted = answer.mesh == mesh and node_id(answer.founder) == mesh
    if not trusted or Roster(mesh, answer.founder, answer.grants).role_of(public, wall) is None:
        raise AdmissionError(
            f"{connection.address} let us in, but its grants do not lead to the founder of mesh {mesh}",
            remedy="is the clock of this machine right? Otherwise ask for a new invite",
            code="wrong-mesh",
        )
    return JoinResult(
        answer.mesh,
        answer.mesh_name,
        answer.founder,
        answer.grants,
        answer.members,
        connection.peer,
        connection.address,
    )


async def reach(
    lane: Lane, addresses: Sequence[str], *, expect: NodeId | None, timeout: float
) -> tuple[Connection | None, list[tuple[str, MeshError]]]:
    """Try every address at once; the first that answers, with the right key if one is expected, wins.

    Returns:
        The connection, if any; and the addresses that failed, each with its error.
    """
    dials = {
        asyncio.ensure_future(lane.dial(address, expect=expect, timeout=timeout)): address for address in addresses
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
    return winner, failures


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
