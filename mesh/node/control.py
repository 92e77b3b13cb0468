"""What the commands on this machine may ask of the running node."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from mesh.clock import Clock
from mesh.errors import AdmissionError, PlanError, UsageError
from mesh.identity.invite import create_invite
from mesh.identity.pairing import read_code
from mesh.node.checkup import checkup
from mesh.node.node import Node
from mesh.node.planning import Trial
from mesh.node.status import describe_device
from mesh.wire.facts import Role

DEFAULT_EXPIRY_S = 3600.0

_ASK = "on the new machine:  mesh up   (or mesh client), and type the code that it shows"
APPROVE_REMEDIES = {
    "no-request": f"{_ASK}; is it on the same network? With a token it need not be:  mesh invite",
    "wrong-code": "look at the new machine again; it shows a new code every few minutes",
    "dropped": "the new machine asks again in a moment: look at the code that it shows now",
    "expired": "look at the code that the new machine shows now",
}
"""What to do about each way in which a code lets nobody in."""


class _InviteArguments(msgspec.Struct, forbid_unknown_fields=True):
    uses: int = 1
    expires_s: float = DEFAULT_EXPIRY_S
    role: Role = "worker"


class Control:
    """Answers ``POST /mesh/control/NAME``. See :class:`mesh.proxy.control.ControlApi`.

    Args:
        stop: ends the node; told whether the membership is to be given up too.
    """

    def __init__(self, node: Node, clock: Clock, stop: Callable[[bool], None]) -> None:
        self._node = node
        self._clock = clock
        self._stop = stop
        self._calls: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "invite": self._invite,
            "requests": self._requests,
            "revoke": self._revoke,
            "plan": self._plan,
            "devices": lambda _: {"devices": [describe_device(device) for device in node.facts.devices]},
            "down": lambda _: self._end(leave=False),
            "leave": lambda _: self._end(leave=True),
        }

    async def call(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """Carry out one call.

        Raises:
            UsageError: there is no such call, or its arguments are wrong.
            MeshError: it cannot be done.
        """
        if name == "checkup":
            return await checkup(self._node)
        if name == "approve":
            return await self._approve(str(args.get("code", "")))
        function = self._calls.get(name)
        if function is None:
            raise UsageError(f"a node knows no call {name!r}", remedy=f"it knows approve, {', '.join(self._calls)}")
        return function(args)

    def invite(self, *, uses: int = 1, expires_s: float = DEFAULT_EXPIRY_S, role: Role = "worker") -> dict[str, Any]:
        """A new token, as ``mesh invite --json`` shows it.

        Raises:
            AdmissionError: this node may not invite.
        """
        node = self._node
        if node.settings.role != "worker":
            raise AdmissionError("a lite client lets nobody in", remedy="run `mesh invite` on a worker")
        made = create_invite(
            node.invites,
            mesh=node.record.mesh,
            inviter=node.key.public,
            addresses=node.facts.addresses,
            randomness=secrets.token_bytes,
            wall=self._clock.wall(),
            lifetime_s=expires_s,
            uses=uses,
            role=role,
        )
        return {"token": made.encode(), "expires_at": made.expires_at, "uses": uses, "role": role}

    def _invite(self, args: dict[str, Any]) -> dict[str, Any]:
        try:
            wanted = msgspec.convert(args, _InviteArguments)
        except msgspec.ValidationError as error:
            raise UsageError(f"invite: {error}") from error
        if not 1 <= wanted.uses <= 1000 or not 1 <= wanted.expires_s <= 366 * 86400:
            raise UsageError("an invite is for 1 to 1000 uses, and for a second to a year")
        return self.invite(uses=wanted.uses, expires_s=wanted.expires_s, role=wanted.role)

    async def _approve(self, code: str) -> dict[str, Any]:
        if self._node.settings.role != "worker":
            raise AdmissionError("a lite client lets nobody in", remedy="run `mesh approve` on a worker")
        result = await self._node.links.approve(read_code(code))
        if result.code:
            raise AdmissionError(result.message, remedy=APPROVE_REMEDIES.get(result.code), code=result.code)
        return {"id": result.node, "name": result.name, "role": result.role}

    def _requests(self, _: dict[str, Any]) -> dict[str, Any]:
        now = self._clock.now()
        return {
            "requests": [
                {
                    "id": request.node,
                    "name": request.name,
                    "role": request.role,
                    "host": request.host,
                    "left_s": round(max(0.0, request.expires - now)),
                }
                for request in self._node.links.requests()
            ]
        }

    def _revoke(self, args: dict[str, Any]) -> dict[str, Any]:
        wanted = str(args.get("node", ""))
        facts = self._node.find_member(wanted)
        if facts is None:
            raise UsageError(
                f'no member, or more than one, is called "{wanted}"', remedy="see names and ids: mesh status"
            )
        if facts.id == self._node.key.id:
            raise UsageError("a node does not revoke itself", remedy="to leave: mesh leave")
        self._node.links.revoke(facts.id)
        return {"id": facts.id, "name": facts.name}

    def _plan(self, args: dict[str, Any]) -> dict[str, Any]:
        try:
            trial = msgspec.convert(args, Trial)
        except msgspec.ValidationError as error:
            raise UsageError(f"plan: {error}") from error
        answer = self._node.plan_now(trial)
        if answer["layout"] is None and not answer["reason"]:
            raise PlanError("there is no model to plan for", remedy="mesh up --model FILE")
        return answer

    def _end(self, *, leave: bool) -> dict[str, Any]:
        # After the answer is on its way: the server that carries it stops too.
        asyncio.get_running_loop().call_later(0.1, self._stop, leave)
        return {"stopping": True, "drain_s": self._node.drain_s}
