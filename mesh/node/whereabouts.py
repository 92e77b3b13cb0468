"""Keeps an eye on where this node is: its interfaces, what STUN servers see, what members see."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Literal

from mesh.clock import Clock
from mesh.config import Settings
from mesh.discovery import stun
from mesh.discovery.addresses import MAX_ADDRESSES, own_addresses
from mesh.discovery.public import Seen, Witnesses
from mesh.pump import Pump
from mesh.transport.address import join_address, split_address
from mesh.transport.endpoint import Endpoint
from mesh.wire.facts import NodeId

log = logging.getLogger(__name__)

WATCH_S = 5.0
"""Between two looks at the interfaces."""
KEEP_S = 25.0
"""Between two questions to one server while a NAT maps us: mappings live for 30 s at least, mostly."""
LEAST_S = 10.0
"""Between two rounds, however many links are lost."""
ROUND_S = 300.0
"""Between two rounds of all servers when nothing happens."""
TELL_S = 2.0
"""Between two times that the others are told: a member could claim another address for us with every packet."""
RESOLVE_WITHIN_S = 5.0
STUN_PORT = 3478
MAX_PUBLIC = 4


class Whereabouts:
    """The addresses of one node.

    Args:
        bound: ``host:port`` of each socket, as the endpoint reports them.
        on_moved: told all addresses, the likeliest first, whenever they change.

    Raises:
        UsageError: a STUN server or an advertised address is not an address.
    """

    def __init__(
        self,
        settings: Settings,
        endpoint: Endpoint,
        bound: Sequence[str],
        clock: Clock,
        on_moved: Callable[[tuple[str, ...]], None],
    ) -> None:
        self._advertise = settings.advertise
        self._servers = [split_address(server, default_port=STUN_PORT) for server in settings.stun]
        self._endpoint = endpoint
        self._bound = bound
        self._clock = clock
        self._on_moved = on_moved
        self._witnesses = Witnesses()
        self._stun = stun.StunClient(secrets.token_bytes)
        self._client = Pump(self._stun, self._effect, stun.Tick, clock)
        self._own = self._look_around()
        self._seen = Seen()
        self._told = self.addresses
        self._told_at = float("-inf")
        self._telling: asyncio.TimerHandle | None = None
        self._answering: stun.Target | None = None
        self._last_round = self._next_round = self._next_question = 0.0
        self._kick = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        endpoint.on_stun = lambda data, host, port: self._client.feed(stun.Received(data, (host, port)))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others may reach this node: what the owner says, its interfaces, then what is seen from outside."""
        public = (*self._seen.addresses, *self._seen.unconfirmed)[:MAX_PUBLIC]
        own = self._own[: MAX_ADDRESSES - len(public)]
        return tuple(dict.fromkeys((*own, *public)))

    @property
    def seen(self) -> Seen:
        """What is believed of the public side of this node."""
        return self._seen

    @property
    def stun_state(self) -> Literal["off", "silent", "answered"]:
        """Whether any server that may be asked has answered lately."""
        if not self._servers:
            return "off"
        return "silent" if self._answering is None else "answered"

    @property
    def bound(self) -> tuple[str, ...]:
        """``host:port`` of each socket."""
        return tuple(self._bound)

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Look no more."""
        self._client.stop()
        if self._telling is not None:
            self._telling.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def member_sees(self, node: NodeId, address: str) -> None:
        """A linked member says where it sees us."""
        self._witnesses.member(node, address)
        self._conclude()

    def member_gone(self, node: NodeId) -> None:
        """It is linked no more: a NAT may have forgotten us."""
        self._witnesses.forget(node)
        self._conclude()
        self._next_round = min(self._next_round, self._last_round + LEAST_S)
        self._kick.set()

    # -- within ------------------------------------------------------------------------------------------------------

    def _look_around(self) -> tuple[str, ...]:
        return tuple(own_addresses(self._bound, self._advertise))

    async def _watch(self) -> None:
        while True:
            own = self._look_around()
            now = self._clock.now()
            if own != self._own:
                self._own = own
                self._witnesses.only(())
                self._next_round = now
                self._conclude()
            if self._servers and now >= self._next_round:
                self._last_round, self._next_round, self._next_question = now, now + ROUND_S, now + KEEP_S
                targets = await _resolve(self._servers)
                self._witnesses.only({host for host, _ in targets})
                self._client.feed(stun.Look(targets))
            elif self._answering is not None and now >= self._next_question and self._seen.kind != "open":
                self._next_question = now + KEEP_S
                self._client.feed(stun.Look((self._answering,)))
            self._kick.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._kick.wait()

    def _effect(self, effect: stun.Effect) -> None:
        match effect:
            case stun.Query(data, (host, port)):
                self._endpoint.send_stun(data, host, port)
            case stun.Answered(server, address):
                self._answering = server
                self._witnesses.server(server[0], join_address(*address))
                # Half a round may mix what was before a change with what is after it.
                if self._stun.next_timer() is None or self._seen.kind == "unknown":
                    self._conclude()
            case stun.Silent(servers):
                log.info("no answer from STUN servers %s", ", ".join(join_address(*server) for server in servers))
                self._witnesses.silent({host for host, _ in servers})
                self._conclude()
                if self._answering in servers:
                    self._answering = None
                    self._next_round = self._clock.now()

    def _conclude(self) -> None:
        self._seen = self._witnesses.conclude(self._own)
        if self.addresses != self._told and self._telling is None:
            wait = max(0.0, self._told_at + TELL_S - self._clock.now())
            self._telling = asyncio.get_running_loop().call_later(wait, self._tell)

    def _tell(self) -> None:
        self._telling, self._told_at = None, self._clock.now()
        addresses = self.addresses
        if addresses != self._told:
            log.info("this node is at %s (%s)", ", ".join(addresses), self._seen.kind)
            self._told = addresses
            self._on_moved(addresses)


async def _resolve(servers: Sequence[tuple[str, int]]) -> tuple[stun.Target, ...]:
    """One literal address of each family for each server that has one; the names of the others are told to the log."""
    return tuple(
        dict.fromkeys(target for found in await asyncio.gather(*map(_resolve_one, servers)) for target in found)
    )


async def _resolve_one(server: tuple[str, int]) -> list[stun.Target]:
    try:
        async with asyncio.timeout(RESOLVE_WITHIN_S):
            found = await asyncio.get_running_loop().getaddrinfo(*server, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError, TimeoutError) as error:
        log.info("STUN server %s: %s", server[0], error or "its name is not resolved in time")
        return []
    by_family = {family: (str(target[0]), int(target[1])) for family, _, _, _, target in reversed(found)}
    return list(by_family.values())
