"""Announces this node on the local network and hears others, over zeroconf. What it means is `lan.py`'s."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from mesh.discovery.interfaces import Ground, look
from mesh.discovery.lan import Announcement, Event, Moved, Seen, Vanished
from mesh.errors import TransportError

log = logging.getLogger(__name__)

SERVICE = "_mesh-llm._udp.local."
LOOK_EVERY_S = 3.0
"""How often the interfaces of this machine are looked at: networks come and go, and no system tells of it alike."""
RESOLVE_MS = 3000
MAX_RESOLVING = 16
"""Services whose records are being asked for; others wait until they are announced again."""
CLOSE_WITHIN_S = 1.0


class Mdns:
    """One node's part in the discovery of its network.

    Args:
        bound: the hosts that this node's sockets are bound to: only their networks are used.
        port: UDP port of the node.
        announce: None to listen only.
        tell: where events go, in the event loop.
    """

    def __init__(
        self, bound: Sequence[str], port: int, announce: Announcement | None, tell: Callable[[Event], None]
    ) -> None:
        self._bound = tuple(bound)
        self._port = port
        self._announce = announce
        self._tell = tell
        self._ground = Ground((), (), ())
        self._zeroconf: Any = None
        self._browser: Any = None
        self._registered: Any = None
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the sockets, announce and listen.

        Raises:
            TransportError: ``no-discovery``: the port of mDNS cannot be used. Nothing is left open.
        """
        # What strangers send wrongly is theirs, and no line in our log.
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        try:
            await self._settle(look(self._bound))
        except (OSError, RuntimeError) as error:
            await self.close()
            raise TransportError(
                f"local discovery is off: UDP port 5353 cannot be used ({getattr(error, 'strerror', None) or error})",
                remedy="the mesh works without; machines join with a token:  mesh invite",
                code="no-discovery",
            ) from error
        self._watch = asyncio.get_running_loop().create_task(self._keep_looking())

    async def close(self) -> None:
        """Say good-bye and close the sockets."""
        watch, self._watch = self._watch, None
        tasks = [*self._resolving.values(), *self._tasks, *([watch] if watch is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._resolving.clear()
        await self._fall_silent()

    async def _fall_silent(self) -> None:
        zeroconf, self._zeroconf, self._browser, self._registered = self._zeroconf, None, None, None
        if zeroconf is not None:
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(CLOSE_WITHIN_S):
                    await zeroconf.async_close()

    # -- interfaces --------------------------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                ground = look(self._bound)
                if ground != self._ground:
                    await self._settle(ground)
            except (OSError, RuntimeError) as error:
                log.info("local discovery does not follow the interfaces: %s", error)

    async def _settle(self, ground: Ground) -> None:
        """Announce and listen on ``ground`` from now on. Without any there is nobody to hear: it may come yet."""
        from zeroconf import IPVersion
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        if not ground.sources:
            # An interface that comes back under the same address must be joined anew: nothing of the old one is kept.
            await self._fall_silent()
        else:
            sources = list(ground.sources)
            version = IPVersion.V4Only
            if any(isinstance(source, int) for source in sources):
                version = IPVersion.All if any(isinstance(source, str) for source in sources) else IPVersion.V6Only
            if self._zeroconf is None:
                self._zeroconf = AsyncZeroconf(interfaces=sources, ip_version=version)
            elif ground.sources != self._ground.sources:
                await self._zeroconf.async_update_interfaces(sources, version)
        self._ground = ground
        self._tell(Moved(ground.networks))
        if self._zeroconf is None:
            return
        await self._register(ground)
        if self._browser is None:
            self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[self._changed])

    async def _register(self, ground: Ground) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        if self._announce is None or not ground.announced:
            return
        name = self._announce.prefix
        info = AsyncServiceInfo(
            SERVICE,
            f"{name}.{SERVICE}",
            port=self._port,
            properties=dict(self._announce.fields()),
            server=f"mesh-{name}.local.",
            parsed_addresses=list(ground.announced),
        )
        if self._registered is None:
            # No probing for others with this name: it is part of a key's hash, and whoever else bears it is a liar,
            # who could keep us from ever announcing ourselves.
            done = await self._zeroconf.async_register_service(info, cooperating_responders=True)
        else:
            done = await self._zeroconf.async_update_service(info)
        self._registered = info
        self._spawn(_finish(done))

    # -- others ------------------------------------------------------------------------------------------------------

    def _changed(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        from zeroconf import ServiceStateChange

        if state_change is ServiceStateChange.Removed:
            self._tell(Vanished(name))
        elif name not in self._resolving and len(self._resolving) < MAX_RESOLVING:
            task = asyncio.get_running_loop().create_task(self._resolve(name))
            self._resolving[name] = task
            task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _resolve(self, name: str) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        try:
            info = AsyncServiceInfo(SERVICE, name)
            if not info.load_from_cache(self._zeroconf.zeroconf):
                await info.async_request(self._zeroconf.zeroconf, RESOLVE_MS)
            addresses = tuple(info.parsed_scoped_addresses())[:64]
            fields, port = dict(info.properties), info.port or 0
        except Exception as error:  # its names, types and bytes are a stranger's, and so is what they do to a parser
            log.debug("an announcement could not be read: %s", error)
            return
        self._tell(Seen(name, fields, addresses, port))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _finish(announcing: Any) -> None:
    """See an announcement out; that it was not heard, because the network went, is no matter."""
    with contextlib.suppress(OSError, RuntimeError):
        await announcing
