"""Where every member was last seen. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.errors import MeshError
from mesh.transport.address import split_address
from mesh.wire.facts import NodeId
from mesh.wire.messages import MemberAddress

MAX_ADDRESSES = 16
MAX_MEMBERS = 256


class AddressBook:
    """Members and the addresses to try for each, the likeliest first."""

    def __init__(self, members: Iterable[MemberAddress] = ()) -> None:
        self._members: dict[NodeId, MemberAddress] = {}
        self._hosts: frozenset[str] | None = None
        for member in members:
            self.hear(member)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._members

    @property
    def members(self) -> tuple[MemberAddress, ...]:
        return tuple(self._members.values())

    def addresses(self, node: NodeId) -> tuple[str, ...]:
        known = self._members.get(node)
        return () if known is None else known.addresses

    def is_home(self, host: str) -> bool:
        """Is ``host``, a literal address, that of a member?"""
        if self._hosts is None:  # asked for every stranger that knocks; addresses change far less often
            self._hosts = frozenset(_hosts_of(self._members.values()))
        return host in self._hosts

    def hear(self, member: MemberAddress) -> bool:
        """Somebody says where ``member`` is: add what is new to the end. Returns whether anything was."""
        known = self._members.get(member.id)
        if known is None:
            return self.meet(member)
        merged = tuple(dict.fromkeys((*known.addresses, *member.addresses)))[:MAX_ADDRESSES]
        if merged == known.addresses:
            return False
        self._members[member.id] = MemberAddress(member.id, known.name, merged)
        self._hosts = None
        return True

    def meet(self, member: MemberAddress) -> bool:
        """``member`` itself says where it is: that replaces all hearsay. Returns whether anything changed."""
        fresh = MemberAddress(member.id, member.name, tuple(dict.fromkeys(member.addresses))[:MAX_ADDRESSES])
        if self._members.get(member.id) == fresh or (
            member.id not in self._members and len(self._members) >= MAX_MEMBERS
        ):
            return False
        self._members[member.id] = fresh
        self._hosts = None
        return True

    def forget(self, node: NodeId) -> None:
        self._members.pop(node, None)
        self._hosts = None


def _hosts_of(members: Iterable[MemberAddress]) -> Iterable[str]:
    for member in members:
        for address in member.addresses:
            try:
                yield split_address(address)[0]
            except MeshError:  # what a member says need not be an address
                continue
