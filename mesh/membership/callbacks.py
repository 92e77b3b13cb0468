"""What the owner of the links is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesh.membership.requests import Request
from mesh.transport.lane import Connection, Stream
from mesh.wire.facts import NodeFacts, NodeId
from mesh.wire.messages import Control, Open, Refused


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the owner of the links is told. None of these may block; each is called in the event loop.

    Attributes:
        on_up: a member is connected: its id, its facts, its connection.
        on_down: it no longer is, and why. Comes before a second ``on_up`` of the same member.
        on_message: a control message, in the order sent. What is about links and admission is dealt with before.
        on_bulk: a member opened a stream; the handler answers ``Opened`` or ``OpenFailed`` itself.
        on_roster_changed: grants, revocations or addresses changed: save them.
        on_expelled: this node was revoked, or never was a member for the one who says so.
        on_asked: a machine without a token asks to be let in.
        on_seen: a member says where it sees this node; its word ends with its link.
    """

    on_up: Callable[[NodeId, NodeFacts, Connection], None]
    on_down: Callable[[NodeId, str], None]
    on_message: Callable[[NodeId, Control], None]
    on_bulk: Callable[[NodeId, Open, Stream], None]
    on_roster_changed: Callable[[], None] = lambda: None
    on_expelled: Callable[[NodeId, Refused], None] = lambda peer, refused: None
    on_asked: Callable[[Request], None] = lambda request: None
    on_seen: Callable[[NodeId, str], None] = lambda peer, address: None
