"""Settles which mesh a node belongs to, before anything slow begins: the one it was in, or one that a token opens."""

from __future__ import annotations

from mesh.clock import Clock, SystemClock
from mesh.config import Settings
from mesh.errors import StateError, UsageError
from mesh.identity.invite import Invite
from mesh.identity.key import NodeKey
from mesh.membership.join import join
from mesh.node.newcomer import may_seek, nothing_to_use
from mesh.node.record import Record, from_join, load_record, save_record
from mesh.notice import Notice, View
from mesh.transport.endpoint import Endpoint


async def enter(settings: Settings, view: View) -> Record | None:
    """The mesh of this node; None: none yet, and it is to look for one (:func:`may_seek`) or to found one.

    Raises:
        UsageError: a token is no token, or a lite client has no mesh to use.
        StateError: this machine is in another mesh.
        TransportError, AdmissionError: the inviter is not reached, or says no. The record stays as it was.
    """
    record = load_record(settings.state_dir)
    invites = [Invite.decode(token) for token in settings.join]
    if not invites:
        if record is not None:
            view.show(Notice("mesh", f'back in "{record.name}"', {"mesh": record.mesh}))
        elif settings.role == "client" and not may_seek(settings):
            raise nothing_to_use()
        return record
    if len({invite.mesh for invite in invites}) > 1:
        raise UsageError("these tokens are for different meshes", remedy="a machine is in one mesh per --state-dir")
    key = NodeKey.load_or_create(settings.state_dir / "node.key")
    if record is not None and record.mesh == invites[0].mesh and not record.expelled:
        view.show(Notice("mesh", f'already in "{record.name}": the token was not used', {"mesh": record.mesh}))
        return record
    if record is not None and record.mesh != invites[0].mesh and not record.is_only(key):
        raise StateError(
            f'this machine is in another mesh, "{record.name}"',
            remedy=f"leave that one (mesh leave), or keep both apart: --state-dir DIR; it is in {settings.state_dir}",
        )
    return await _join(settings, key, invites[0], record, view, SystemClock())


async def _join(
    settings: Settings, key: NodeKey, invite: Invite, left: Record | None, view: View, clock: Clock
) -> Record:
    endpoint = Endpoint(key, clock, on_connection=lambda connection: connection.close(0, "still joining"))
    try:
        await endpoint.start([(host, settings.bind_port) for host in settings.bind_host])
        joined = await join(endpoint, invite, name=settings.name, public=key.public, wall=clock.wall())
    finally:
        await endpoint.close()
    record = from_join(joined, left)
    save_record(settings.state_dir, record)
    if left is not None and left.mesh != record.mesh:
        view.show(Notice("mesh", f'left "{left.name}", where this machine was alone', {"mesh": left.mesh}))
    through = next((member.name for member in joined.members if member.id == joined.inviter), joined.address)
    view.show(Notice("mesh", f'joined "{record.name}" through {through}', {"mesh": record.mesh}))
    return record
