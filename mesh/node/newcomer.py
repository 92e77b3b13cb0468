"""A machine without a mesh and without a token: it looks for meshes on its network, and asks to be let in by a code."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from mesh.clock import Clock, SystemClock
from mesh.config import Settings
from mesh.discovery import lan
from mesh.discovery.mdns import Mdns
from mesh.errors import MeshError, TransportError, UsageError
from mesh.identity.key import NodeKey
from mesh.identity.pairing import Newcomer, make_code, read_code
from mesh.membership import seeking
from mesh.membership.asking import Told, ask
from mesh.membership.join import JoinResult
from mesh.node.record import Record, from_join, save_record
from mesh.notice import Notice, View
from mesh.pump import Pump
from mesh.transport.address import split_address
from mesh.transport.endpoint import Endpoint
from mesh.transport.lane import Lane

LOOK_S = {"worker": 1.5, "client": 3.0}
"""How long to wait for somebody's announcement. A worker founds a mesh after that, and shall not wait long."""
MAX_MISTYPED = 3


def may_seek(settings: Settings) -> bool:
    """Whether a machine without a mesh looks for one: it was told to look, and not to do anything else."""
    return not (settings.no_discovery or settings.join or settings.model or settings.demo)


def nothing_to_use(seen: str = "") -> UsageError:
    """What a lite client is told that knows no mesh."""
    return UsageError(
        f"a lite client needs a mesh to use{seen}",
        remedy="on a member:  mesh invite --role client     then here:  mesh client --join TOKEN",
    )


async def seek(settings: Settings, view: View, stop: asyncio.Event) -> Record | None:
    """Look for meshes, show a code, and wait until a person has typed it on one of their machines, or ``stop`` is set.

    Returns:
        The mesh, already written down; None: stopped, or there is nobody who could let this machine in.

    Raises:
        UsageError: nobody, and this is a lite client.
        TransportError: a port is taken.
    """
    clock = SystemClock()
    key = NodeKey.load_or_create(settings.state_dir / "node.key")
    endpoint = Endpoint(key, clock, on_connection=lambda connection: connection.close(0, "still joining"))
    try:
        bound = await endpoint.start([(host, settings.bind_port) for host in settings.bind_host])
        newcomer = Newcomer(key.public, "client" if settings.role == "client" else "worker", settings.name)
        search = _Search(endpoint, newcomer, view, clock)
        watch = lan.Lan(None, key.id[: lan.PREFIX_LENGTH], ())
        pump = Pump(watch, search.saw, lan.Tick, clock)
        mdns = Mdns([split_address(address)[0] for address in bound], 0, None, pump.feed)
        try:
            await mdns.start()
            joined = await search.run(stop)
        except TransportError as error:
            view.show(Notice("warning", error.message, {"remedy": error.remedy}))
            joined = None
        finally:
            pump.stop()
            await search.close()
            await mdns.close()
    finally:
        await endpoint.close()
    if joined is None:
        if settings.role == "client" and not stop.is_set():
            raise nothing_to_use("; none that could let it in was found on this network")
        return None
    record = from_join(joined)
    save_record(settings.state_dir, record)
    through = next((member.name for member in joined.members if member.id == joined.inviter), joined.address)
    view.show(Notice("mesh", f'joined "{record.name}" through {through}', {"mesh": record.mesh}))
    return record


class _Search:
    """Carries out what :class:`mesh.membership.seeking.Seeking` decides."""

    def __init__(self, lane: Lane, newcomer: Newcomer, view: View, clock: Clock) -> None:
        self._lane = lane
        self._newcomer = newcomer
        self._view = view
        self._clock = clock
        core = seeking.Seeking(LOOK_S[newcomer.role], lambda: make_code(secrets.token_bytes))
        self._pump = Pump(core, self._carry_out, seeking.Tick, clock)
        self._asking: dict[lan.Door, asyncio.Task[None]] = {}
        self._result: asyncio.Future[JoinResult | None] = asyncio.get_running_loop().create_future()

    def saw(self, effect: lan.Effect) -> None:
        """Announcements changed."""
        if isinstance(effect, lan.Meshes):
            self._pump.feed(seeking.Saw(effect.meshes))

    async def run(self, stop: asyncio.Event) -> JoinResult | None:
        """Until somebody lets us in, nobody can, or ``stop`` is set."""
        self._pump.feed(seeking.Begin())
        stopping = asyncio.ensure_future(stop.wait())
        ends: set[asyncio.Future[Any]] = {self._result, stopping}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return self._result.result() if self._result.done() else None

    async def close(self) -> None:
        """Withdraw all requests."""
        self._pump.stop()
        tasks = list(self._asking.values())
        self._asking.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _carry_out(self, effect: seeking.Effect) -> None:
        match effect:
            case seeking.AskAt(door, code):
                self._asking[door] = asyncio.get_running_loop().create_task(self._ask(door, code))
            case seeking.Withdraw(door):
                task = self._asking.pop(door, None)
                if task is not None:
                    task.cancel()
            case seeking.ShowCode(code, meshes):
                self._show_code(code, meshes)
            case seeking.TellMistyped(mesh):
                self._view.show(Notice("warning", f'a wrong code was typed on a machine of "{mesh}"'))
            case seeking.Nobody(silent):
                for name in silent:
                    text = f'mesh "{name}" is on this network, but lets nobody ask: is its UDP port blocked?'
                    self._view.show(Notice("warning", text, {"mesh_name": name}))
                if not self._result.done():
                    self._result.set_result(None)

    def _show_code(self, code: str, meshes: tuple[str, ...]) -> None:
        names = " and ".join(f'"{name}"' for name in meshes)
        command = "mesh up" if self._newcomer.role == "worker" else "mesh client"
        alone = "; to begin a mesh of its own: mesh up --model FILE" if self._newcomer.role == "worker" else ""
        what = f"mesh {names} is here" if len(meshes) == 1 else f"meshes {names} are here"
        self._view.show(
            Notice(
                "mesh", f"{what}: run {command} --join TOKEN, or approve this machine there{alone}", {"meshes": meshes}
            )
        )
        text = f"waiting for a person to type, on a machine of {names}:\nmesh approve {code}"
        self._view.show(Notice("invite", text, {"code": code, "meshes": meshes}))

    async def _ask(self, door: lan.Door, code: str) -> None:
        told = Told(lambda: self._tell(door, seeking.Held(door)), self._mistyped(door))
        try:
            joined = await ask(
                self._lane, door.addresses, door.prefix, read_code(code), self._newcomer, told, self._clock.wall
            )
        except MeshError as error:
            self._tell(door, seeking.Ended(door, error.code, error.message))
            return
        if not self._result.done():
            self._result.set_result(joined)

    def _mistyped(self, door: lan.Door) -> Callable[[], bool]:
        left = MAX_MISTYPED

        def told() -> bool:
            nonlocal left
            left -= 1
            self._tell(door, seeking.Guessed(door))
            return left > 0

        return told

    def _tell(self, door: lan.Door, event: seeking.Event) -> None:
        # Not from a request that was withdrawn meanwhile.
        if self._asking.get(door) is asyncio.current_task():
            self._pump.feed(event)
