"""Says in plain words what happens to the mesh: one line, with the reason, when something does."""

from __future__ import annotations

from collections.abc import Callable

import mesh.election.events as election
import mesh.membership.events as membership
from mesh.config import format_size
from mesh.membership.requests import Request
from mesh.membership.view import View as Members
from mesh.notice import Notice, View
from mesh.wire.facts import NO_EPOCH, Layout, NodeId, RingMember
from mesh.wire.messages import LoadProgress

ASK_AGAIN_S = 900.0
"""A machine that keeps asking is told of again after so long."""
MAX_ASKS = 8
"""Of different machines, in that time."""


class Narrator:
    """Turns what the cores decide into notices. A reason is told once, whichever effect brings it first.

    Args:
        now: the clock, for how long requests had to wait.
    """

    def __init__(
        self, view: View, me: NodeId, mesh_name: str, members: Callable[[], Members], now: Callable[[], float]
    ) -> None:
        self._view = view
        self._me = me
        self._mesh_name = mesh_name
        self._members = members
        self._now = now
        self._known: set[NodeId] = set()
        self._told = ""
        self._stopping = False
        self._waits_since: float | None = None
        self.api_url = ""
        self.invite: Callable[[], str] | None = None
        """Makes the command for the next machine; None when this node lets nobody in, or has said so."""
        self.approve = "mesh approve CODE"
        """How people let in a machine by the code it shows."""
        self._asks: dict[NodeId, float] = {}
        """Who was said to ask, and when."""

    def asked(self, request: Request) -> None:
        """A machine asks to be let in. Anybody on the network can: each is told once in a while, and not many."""
        now = self._now()
        self._asks = {node: at for node, at in self._asks.items() if now - at < ASK_AGAIN_S}
        if request.node in self._asks or len(self._asks) >= MAX_ASKS:
            return
        self._asks[request.node] = now
        what = "to use this mesh" if request.role == "client" else "to join"
        self._say(
            "mesh",
            f'a machine at {request.host} asks {what} as "{request.name}"; if it is yours, type the code that it shows:'
            f"  {self.approve}",
            node=request.node,
            role=request.role,
            host=request.host,
        )

    def swept(self, count: int) -> None:
        """Processes of a crashed run were ended."""
        if count:
            processes = "an engine process" if count == 1 else f"{count} engine processes"
            self._say("change", f"ended {processes} that an earlier run left behind")

    def stopping(self) -> None:
        """What happens from here on is our own doing, and needs no words."""
        self._stopping = True

    def member(self, effect: membership.Effect, seen: Members) -> None:
        """Somebody came, went quiet, or went."""
        match effect:
            case membership.MemberAlive(node, facts) if node not in self._known:
                self._known.add(node)
                kind = "lite client " if facts.role == "client" else ""
                self._say("mesh", f'{kind}{facts.name} is in; "{self._mesh_name}" has {_machines(seen)}', node=node)
            case membership.MemberLost(node, reason):
                self._known.discard(node)
                self._told = f"{seen.name(node)} {'is ' if reason == 'unreachable' else ''}{reason}"
                self._say("change", self._told, node=node, reason=reason)
            case _:
                pass

    def adopted(self, adopt: election.Adopt) -> None:
        """A layout was agreed, or that there can be none."""
        if adopt.lifts != NO_EPOCH:
            return
        layout, number = adopt.layout, adopt.epoch.number
        new = adopt.reason != self._told
        self._told = adopt.reason
        if layout is not None:
            why = f" ({adopt.reason})" if adopt.reason and new else ""
            self._say("plan", f"{self._describe(layout)}{why}", epoch=number, reason=adopt.reason)
            for member in layout.ring:
                self._view.progress(self._loading_on(member.id), 0, 0)
        elif new:
            self._say("plan", f"waiting: {adopt.reason}", epoch=number, reason=adopt.reason)
            self._offer_invite()

    def loading(self, progress: LoadProgress) -> None:
        """A member reads its weights."""
        self._view.progress(self._loading_on(progress.node), progress.done_bytes, max(progress.total_bytes, 1))

    def misplaced(self, share: RingMember, really: str) -> None:
        """The engine computes on something else than was planned: slower by far, and in other memory."""
        self._say(
            "warning",
            f"asked for {share.device}, but the engine put its layers on {really}: this machine is slower than "
            "planned, and takes other memory. See:  mesh logs   mesh doctor",
            asked=share.device,
            device=really,
        )

    def served(self, layout: Layout) -> None:
        """Requests are answered."""
        where = "here" if layout.host == self._me else f"on {self._members().name(layout.host)}"
        text = f"{self.api_url}/v1   {layout.model.name}, hosted {where}"
        waited = None if self._waits_since is None else self._now() - self._waits_since
        self._waits_since = None
        if waited is not None:
            text += f", back in {waited:.1f} s"
        if self.invite is not None and not self._alone():
            self.invite = None
            text += "   (another machine: mesh invite)"
        self._say("ready", text, api=f"{self.api_url}/v1", host=layout.host, model=layout.model.name, waited_s=waited)
        self._offer_invite()

    def unserved(self, reason: str) -> None:
        """Requests wait."""
        self._waits_since = self._now()
        if reason != self._told:
            self._told = reason
            self._say("change", f"{reason}; requests wait", reason=reason)

    def _offer_invite(self) -> None:
        """The command to paste on the next machine, once, and only while there is no other: it holds a secret."""
        if self.invite is not None and self._alone():
            make, self.invite = self.invite, None
            command = make()
            self._say("invite", f"the next machine joins with (once, within the hour):\n{command}", command=command)

    def _alone(self) -> bool:
        return len(self._members().members) <= 1

    def _describe(self, layout: Layout) -> str:
        model = f"{layout.model.name}, {format_size(layout.model.size_bytes)}"
        if layout.mode == "solo":
            return f"{model}: all {layout.model.n_layers} layers on {self._name(layout.host)}"
        shares = [
            f"{self._name(member.id)} {_count(member.layers)}{' + output' if member.id == layout.host else ''}"
            for member in layout.ring
        ]
        return f"{model}: {' > '.join(shares)}, predicted {layout.predicted_ms_per_token:.0f} ms/token"

    def _loading_on(self, node: NodeId) -> str:
        return f"loading on {self._name(node)}"

    def _name(self, node: NodeId) -> str:
        return "this machine" if node == self._me else self._members().name(node)

    def _say(self, kind: str, text: str, **data: object) -> None:
        if not self._stopping:
            self._view.show(Notice(kind, text, data))  # type: ignore[arg-type]  # kinds are literals above


def _count(layers: tuple[int, int] | None) -> str:
    if layers is None:
        return "no layers"
    count = layers[1] - layers[0] + 1
    return f"{count} layer{'' if count == 1 else 's'}"


def _machines(seen: Members) -> str:
    count = len(seen.members)
    return f"{count} machine{'' if count == 1 else 's'}"
