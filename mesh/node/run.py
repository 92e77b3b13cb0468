"""From settings to a running node and back to nothing: sockets, mesh, node, API, in this order, undone in reverse."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from mesh.clock import SystemClock
from mesh.config import Settings
from mesh.engine.cache import Engine
from mesh.errors import StateError, TransportError
from mesh.identity.key import NodeKey
from mesh.node.control import Control
from mesh.node.departure import Stop, hand_over
from mesh.node.neighbours import Neighbours
from mesh.node.node import Node
from mesh.node.prepare import LocalModel
from mesh.node.record import Record, forget_record, found, load_record, save_record
from mesh.node.statedir import this_process, write_running
from mesh.notice import Notice, View
from mesh.proxy.http import create_app
from mesh.proxy.keys import read_api_keys
from mesh.proxy.server import ApiServer
from mesh.transport.address import split_address
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Connection
from mesh.transport.tcp import TcpLane


async def run(
    settings: Settings,
    record: Record | None,
    engine: Engine | None,
    model: LocalModel | None,
    view: View,
    stop: Stop,
) -> None:
    """Be a member until ``stop`` is set, or a command says so.

    Args:
        record: the mesh, from :func:`mesh.node.enter.enter`; None: found one.

    Raises:
        MeshError: a port is taken, the mesh threw this node out.
    """
    clock = SystemClock()
    key = NodeKey.load_or_create(settings.state_dir / "node.key")
    async with contextlib.AsyncExitStack() as stack:
        door: list[Node] = []
        endpoint = Endpoint(key, clock, on_connection=lambda connection: _let_in(door, connection))
        bound = await endpoint.start([(host, settings.bind_port) for host in settings.bind_host])
        stack.push_async_callback(endpoint.close)
        tcp = TcpLane(key)
        stack.push_async_callback(tcp.close)
        await listen_over_tcp(tcp, bound, view)
        if record is None:
            record = found(key, settings.name, clock.wall())
            save_record(settings.state_dir, record)
            view.show(Notice("mesh", f'founded "{record.name}"', {"mesh": record.mesh}))
        node = Node(settings, key, record, endpoint, tcp, bound, engine, model, view, clock)
        ending = _Ending(stop)
        node.on_expelled = ending.expelled
        control = Control(node, clock, ending.told)
        token = secrets.token_urlsafe(32)
        keys = read_api_keys(settings.api_key_file, settings.api_keys)
        app = create_app(
            node.proxy,
            node.status,
            control,
            control_token=token,
            api_keys=(*keys, token) if keys else (),  # this machine's commands have no other key
            allowed_hosts=() if settings.api_is_local else own_names(settings.name),
        )
        server = ApiServer(app, api_hosts(settings.api_host), settings.api_port)
        api = (await server.start())[0]
        stack.push_async_callback(server.stop)
        node.narrate(f"http://localhost:{server.port}", control.invite if settings.role == "worker" else None)
        door.append(node)
        alone = record.is_only(key)
        neighbours = Neighbours(settings, key.id, record, view, clock, on_hint=node.links.hint, tell_meshes=alone)
        stack.push_async_callback(neighbours.close)
        stack.push_async_callback(node.stop, "stopped by its owner")
        await node.start()
        if not settings.no_discovery:
            await neighbours.start(bound)
        write_running(settings.state_dir, this_process(f"http://{api}", token))
        await stop.wait()
        await hand_over(node, stop, view)
    ending.finish(settings.state_dir)


async def listen_over_tcp(tcp: TcpLane, bound: Sequence[str], view: View) -> None:
    """On the port number that QUIC has. Without it everything works, and a LAN is slower: that deserves a line."""
    try:
        await tcp.start([split_address(address) for address in bound])
    except TransportError as error:
        text = f"{error.message}: others reach this node over UDP only, which is slower on a LAN"
        view.show(Notice("warning", text, {"remedy": error.remedy}))


def _let_in(door: list[Node], connection: Connection) -> None:
    if door:
        door[0].accept(connection)
    else:
        connection.close(0, "still starting")


class _Ending:
    """Why the node ends."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._leaves = False
        self._expelled: str | None = None

    def told(self, leave: bool) -> None:
        self._leaves |= leave
        self._stop.ask()

    def expelled(self, reason: str) -> None:
        self._expelled = reason
        self._stop.at_once.set()
        self._stop.set()

    def finish(self, state_dir: Path) -> None:
        """Raises:
        StateError: the mesh does not want this node any more.
        """
        if self._leaves:
            forget_record(state_dir)
        if self._expelled is not None:
            record = load_record(state_dir)
            if record is not None:
                save_record(state_dir, record.without_us())
            raise StateError(
                f"this machine is not a member any more: {self._expelled}",
                remedy="ask for a new invite, then: mesh up --join TOKEN",
            )


def own_names(name: str) -> tuple[str, ...]:
    """What machines of the same network may call this one."""
    names = (name, socket.gethostname(), socket.gethostname().split(".")[0])
    return tuple(dict.fromkeys((*names, *(f"{own}.local" for own in names))))


def api_hosts(host: str) -> tuple[str, ...]:
    """The addresses the API listens on for ``host``."""
    # "localhost" may mean either; a machine without IPv6 does without it.
    return ("127.0.0.1", "::1") if host == "127.0.0.1" else (host,)
