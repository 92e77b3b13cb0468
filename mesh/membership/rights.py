"""What a member may say and ask for by its role. Pure.

A lite client takes part in finding out who is there and which layout is in force: without its word for both it could
not send its requests to the right place. It has no part in making a layout or running one.
"""

from __future__ import annotations

from mesh.wire.facts import NodeId, Role
from mesh.wire.messages import (
    Control,
    EngineDown,
    Facts,
    LoadProgress,
    Open,
    OpenPush,
    OpenRpc,
    Propose,
    Serving,
    WorkerReady,
)

_OF_WORKERS = (Propose, Serving, WorkerReady, EngineDown, LoadProgress)
_OPENED_BY_WORKERS = (OpenRpc, OpenPush)


def may_say(role: Role, sender: NodeId, message: Control) -> bool:
    """Is ``message`` to be heard from ``sender``, whose grant makes it ``role``?

    A client passes on what it follows like everyone; that is not heard, for it could be made up.
    """
    if role == "worker":
        return True
    if isinstance(message, Facts):
        return message.facts.id == sender and message.facts.role == "client"
    return not isinstance(message, _OF_WORKERS)


def may_open(role: Role, request: Open) -> bool:
    """May somebody in ``role`` ask for such a stream at all? Whether it gets this one depends on the layout."""
    return role == "worker" or not isinstance(request, _OPENED_BY_WORKERS)
