"""What is announced on the local network, and what follows from it: where members are, which meshes are here. Pure.

Everybody on the network can announce anything, so this is a list of hints. A member is who has its key, whatever was
announced; a mesh is whose member answers, and whoever lets a machine in has to prove that it was told the code.

One announcement per node, as a DNS-SD service with the TXT fields of :class:`Announcement`. The tag lets members know
their mesh; it is a hash of the mesh's id, which strangers need not have.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from base64 import b32encode
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mesh.transport.address import join_address
from mesh.wire.facts import MeshId, NodeId
from mesh.wire.messages import PROTOCOL

PREFIX_LENGTH = 8
"""Characters of a node's id that are announced: enough to know a member by, of 26."""
MAX_SERVICES = 128
"""Announcements kept; those that were heard longest ago go first."""
MAX_ADDRESSES = 8
"""Of one node."""
MAX_MESHES = 4
MAX_DOORS = 8
"""Members of other meshes that a newcomer may try."""
HINT_EVERY_S = 1.0
"""For one member; what is heard in between comes together."""

_TAG = re.compile(r"[a-z2-7]{10}")
_PREFIX = re.compile(r"[a-z2-7]{8}")
_NUMBER = re.compile(r"[0-9]{1,4}")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_LOCAL: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
"""Addresses that are nobody's on the internet: also of networks that announcements are passed on from."""
Fields = Mapping[bytes, bytes | None]


def mesh_tag(mesh: MeshId) -> str:
    """What a mesh is known by on its network: 50 bits."""
    return b32encode(hashlib.sha256(b"mesh tag 1\0" + mesh.encode()).digest())[:10].decode().lower()


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node says of itself. ``prefix`` begins its id; ``name`` is the mesh's; ``pairs``: it takes requests."""

    tag: str
    prefix: str
    name: str
    pairs: bool = True

    def fields(self) -> dict[str, str]:
        """As TXT fields."""
        return {"v": str(PROTOCOL), "t": self.tag, "n": self.prefix, "m": self.name, "p": "1" if self.pairs else "0"}


def announcement(node: NodeId, mesh: MeshId, mesh_name: str) -> Announcement:
    return Announcement(mesh_tag(mesh), node[:PREFIX_LENGTH], mesh_name)


def read_fields(fields: Fields) -> Announcement | None:
    """The announcement in these TXT fields; None when there is none that we could use."""
    number, tag, prefix, name = (_text(fields.get(key)) for key in (b"v", b"t", b"n", b"m"))
    if not _NUMBER.fullmatch(number) or int(number) != PROTOCOL:
        return None
    if not _TAG.fullmatch(tag) or not _PREFIX.fullmatch(prefix):
        return None
    # It is shown to people, some of whom will do what it says: a name, and nothing a terminal obeys.
    if not name.strip() or len(name) > 64 or not name.isprintable():
        return None
    return Announcement(tag, prefix, name.strip(), fields.get(b"p") == b"1")


def _text(value: bytes | None) -> str:
    if value is None or len(value) > 255:
        return ""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return ""


def near(addresses: Iterable[str], networks: Sequence[Network]) -> list[str]:
    """Those of ``addresses`` that may be on a local network: nobody shall make us send to machines far away."""
    kept = []
    for text in addresses:
        try:
            ip = ipaddress.ip_address(text)
        except ValueError:
            continue
        if ip.is_multicast or ip.is_unspecified:
            continue
        plain = ipaddress.ip_address(text.partition("%")[0])
        here = [network for network in networks if plain.version == network.version and plain in network]
        if any(plain == network.broadcast_address for network in here if network.version == 4):
            continue
        if ip.is_link_local:
            # Without its scope it means nothing.
            if ip.version == 4 or "%" in text:
                kept.append(text)
        elif here or any(plain.version == network.version and plain in network for network in _LOCAL):
            kept.append(text)
    return kept


@dataclass(frozen=True, slots=True)
class Door:
    """A member of another mesh: where a newcomer may ask."""

    prefix: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mesh:
    """Another mesh on this network, as it calls itself."""

    tag: str
    name: str
    doors: tuple[Door, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """A service was announced, or changed. ``service`` is its name on the network."""

    service: str
    fields: Fields
    addresses: tuple[str, ...]
    port: int


@dataclass(frozen=True, slots=True)
class Vanished:
    """It said good-bye, or was not heard any more."""

    service: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The networks that this machine is on changed."""

    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """A timer is due."""


Event = Seen | Vanished | Moved | Tick


@dataclass(frozen=True, slots=True)
class Hint:
    """The member whose id begins with ``prefix`` may be at ``addresses``; empty: nobody says so any more."""

    prefix: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Meshes:
    """The other meshes that are here now."""

    meshes: tuple[Mesh, ...]


Effect = Hint | Meshes


@dataclass(frozen=True, slots=True)
class _Service:
    said: Announcement
    addresses: tuple[str, ...]
    """As announced, with the port."""


class Lan:
    """Turns announcements into hints.

    Args:
        tag: of this node's own mesh; None: it has none.
        prefix: of this node's id: its own announcements come back to it.
        networks: those this machine is on.
    """

    def __init__(self, tag: str | None, prefix: str, networks: Sequence[Network]) -> None:
        self._tag = tag
        self._prefix = prefix
        self._networks = tuple(networks)
        self._services: OrderedDict[str, _Service] = OrderedDict()
        self._told: dict[str, tuple[str, ...]] = {}
        self._told_at: dict[str, float] = {}
        self._due: dict[str, float] = {}
        """Members of whom something new was heard, and when to tell it."""
        self._meshes: tuple[Mesh, ...] = ()

    def next_timer(self) -> float | None:
        return min(self._due.values(), default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Seen():
                self._seen(event, now)
            case Vanished(service):
                self._forget(service, now)
            case Moved(networks):
                self._networks = networks
            case Tick():
                pass
        return [*self._hints(now), *self._others()]

    def _seen(self, seen: Seen, now: float) -> None:
        said = read_fields(seen.fields)
        addresses = near(seen.addresses, self._networks)[:MAX_ADDRESSES]
        if said is None or said.prefix == self._prefix or not addresses or not 0 < seen.port < 65536:
            self._forget(seen.service, now)  # what it was before, it is no more
            return
        self._forget(seen.service, now)
        self._services[seen.service] = _Service(said, tuple(join_address(ip, seen.port) for ip in addresses))
        self._touch(said, now)
        while len(self._services) > MAX_SERVICES:
            self._forget(next(iter(self._services)), now)

    def _forget(self, service: str, now: float) -> None:
        gone = self._services.pop(service, None)
        if gone is not None:
            self._touch(gone.said, now)

    def _touch(self, said: Announcement, now: float) -> None:
        if said.tag == self._tag:
            earliest = self._told_at.get(said.prefix, now - HINT_EVERY_S) + HINT_EVERY_S
            self._due.setdefault(said.prefix, max(now, earliest))

    def _hints(self, now: float) -> list[Effect]:
        hints: list[Effect] = []
        for prefix in [prefix for prefix, due in self._due.items() if due <= now]:
            del self._due[prefix]
            # The newest first: an older announcement may be of an address that was left.
            ours = [s for s in reversed(self._services.values()) if s.said.tag == self._tag and s.said.prefix == prefix]
            addresses = tuple(dict.fromkeys(address for s in ours for address in s.addresses))[:MAX_ADDRESSES]
            if addresses != self._told.get(prefix, ()):
                self._told_at[prefix] = now
                self._told[prefix] = addresses
                hints.append(Hint(prefix, addresses))
            if not addresses:
                self._told.pop(prefix, None)
        for prefix in [p for p, at in self._told_at.items() if now - at > HINT_EVERY_S and p not in self._told]:
            del self._told_at[prefix]
        return hints

    def _others(self) -> list[Effect]:
        doors: dict[tuple[str, str], list[Door]] = {}
        for service in self._services.values():
            said = service.said
            if said.tag == self._tag or not said.pairs:
                continue
            key = (said.tag, said.name)
            if key in doors or len(doors) < MAX_MESHES:
                doors.setdefault(key, []).append(Door(said.prefix, service.addresses))
        # Every mesh has the same share: one that fills the network with names keeps nobody from another.
        share = MAX_DOORS // max(1, len(doors))
        found = tuple(Mesh(tag, name, tuple(some[:share])) for (tag, name), some in doors.items())
        if found == self._meshes:
            return []
        self._meshes = found
        return [Meshes(found)]
