"""From settings to a running node and back to nothing: sockets, mesh, node, API, in this order, undone in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from pathlib import Path

import psutil

from mesh.clock import Clock, SystemClock
from mesh.config import Settings
from mesh.discovery.addresses import own_addresses
from mesh.engine.cache import Engine
from mesh.errors import StateError, UsageError
from mesh.identity.invite import Invite
from mesh.identity.key import NodeKey
from mesh.membership.join import join
from mesh.node.control import Control
from mesh.node.node import Node
from mesh.node.prepare import LocalModel
from mesh.node.record import Record, forget_record, found, from_join, load_record, save_record
from mesh.node.statedir import Running, write_running
from mesh.notice import Notice, View
from mesh.proxy.http import create_app
from mesh.proxy.server import ApiServer
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Connection


async def run(
    settings: Settings, engine: Engine | None, model: LocalModel | None, view: View, stop: asyncio.Event
) -> None:
    """Be a member until ``stop`` is set, or a command says so.

    Raises:
        MeshError: a port is taken, the invite is no good, the mesh threw this node out.
    """
    clock = SystemClock()
    key = NodeKey.load_or_create(settings.state_dir / "node.key")
    async with contextlib.AsyncExitStack() as stack:
        door: list[Node] = []
        endpoint = Endpoint(key, clock, on_connection=lambda connection: _let_in(door, connection))
        bound = await endpoint.start([(host, settings.bind_port) for host in settings.bind_host])
        stack.push_async_callback(endpoint.close)
        record = await _enter(settings, key, endpoint, view, clock)
        addresses = tuple(own_addresses(bound, settings.advertise))
        node = Node(settings, key, record, endpoint, addresses, engine, model, view, clock)
        ending = _Ending(stop)
        node.on_expelled = ending.expelled
        control = Control(node, clock, ending.told)
        token = secrets.token_urlsafe(32)
        app = create_app(
            node.proxy,
            node.status,
            control,
            control_token=token,
            api_keys=(*_api_keys(settings.api_key_file), *([token] if settings.api_key_file else ())),
        )
        server = ApiServer(app, _api_hosts(settings.api_host), settings.api_port)
        api = (await server.start())[0]
        stack.push_async_callback(server.stop)
        node.narrate(f"http://localhost:{server.port}", control.invite if settings.role == "worker" else None)
        door.append(node)
        stack.push_async_callback(node.stop, "stopped by its owner")
        await node.start()
        write_running(
            settings.state_dir,
            Running(os.getpid(), psutil.Process().create_time(), f"http://{api}", token),
        )
        await stop.wait()
    ending.finish(settings.state_dir)


def _let_in(door: list[Node], connection: Connection) -> None:
    if door:
        door[0].accept(connection)
    else:
        connection.close(0, "still starting")


class _Ending:
    """Why the node ends."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._leaves = False
        self._expelled: str | None = None

    def told(self, leave: bool) -> None:
        self._leaves = leave
        self._stop.set()

    def expelled(self, reason: str) -> None:
        self._expelled = reason
        self._stop.set()

    def finish(self, state_dir: Path) -> None:
        """Raises:
        StateError: the mesh does not want this node any more.
        """
        if self._leaves:
            forget_record(state_dir)
        if self._expelled is not None:
            raise StateError(
                f"this machine is not a member any more: {self._expelled}",
                remedy="ask for a new invite, then: mesh leave   and   mesh up --join TOKEN",
            )


async def _enter(settings: Settings, key: NodeKey, endpoint: Endpoint, view: View, clock: Clock) -> Record:
    """The mesh this node belongs to: as it was, by a token, or a new one."""
    record = load_record(settings.state_dir)
    if settings.join:
        return await _join(settings, key, endpoint, view, clock, record)
    if record is not None:
        view.show(Notice("mesh", f'back in "{record.name}"', {"mesh": record.mesh}))
        return record
    if settings.role == "client":
        raise UsageError(
            "a lite client needs a mesh to use", remedy="on a member: mesh invite --role client   then: --join TOKEN"
        )
    record = found(key, settings.name, clock.wall())
    save_record(settings.state_dir, record)
    view.show(Notice("mesh", f'founded "{record.name}"', {"mesh": record.mesh}))
    return record


async def _join(
    settings: Settings, key: NodeKey, endpoint: Endpoint, view: View, clock: Clock, record: Record | None
) -> Record:
    invites = [Invite.decode(token) for token in settings.join]
    if len({invite.mesh for invite in invites}) > 1:
        raise UsageError("these tokens are for different meshes", remedy="a machine is in one mesh per --state-dir")
    if record is not None and record.mesh == invites[0].mesh:
        view.show(Notice("mesh", f'already in "{record.name}": the token was not used', {"mesh": record.mesh}))
        return record
    if record is not None:
        raise StateError(
            f'this machine is in another mesh, "{record.name}"',
            remedy=f"leave that one (mesh leave), or keep both apart: --state-dir DIR; it is in {settings.state_dir}",
        )
    joined = await join(endpoint, invites[0], name=settings.name, public=key.public, wall=clock.wall())
    record = from_join(joined)
    save_record(settings.state_dir, record)
    through = next((member.name for member in joined.members if member.id == joined.inviter), joined.address)
    view.show(Notice("mesh", f'joined "{record.name}" through {through}', {"mesh": record.mesh}))
    return record


def _api_hosts(host: str) -> tuple[str, ...]:
    # "localhost" may mean either; a machine without IPv6 does without it.
    return ("127.0.0.1", "::1") if host == "127.0.0.1" else (host,)


def _api_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text().splitlines() if line.strip() and line[0] != "#")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the API keys in {path}: {error}") from error
    if not keys:
        raise UsageError(f"{path} holds no API key", remedy="write one per line, or leave --api-key-file out")
    return keys
