"""Where every member was last seen. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mesh.wire.facts import NodeId
from mesh.wire.messages import MemberAddress

MAX_ADDRESSES = 16
MAX_MEMBERS = 256


class AddressBook:
    """Members and the addresses to try for each, the likeliest first."""

    def __init__(self, members: Iterable[MemberAddress] = ()) -> None:
        self._members: dict[NodeId, MemberAddress] = {}
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

    def hear(self, member: MemberAddress) -> bool:
        """Somebody says where ``member`` is: add what is new to the end. Returns whether anything was."""
        known = self._members.get(member.id)
        if known is None:
            return self.meet(member)
        merged = tuple(dict.fromkeys((*known.addresses, *member.addresses)))[:MAX_ADDRESSES]
        if merged == known.addresses:
            return False
        self._members[member.id] = MemberAddress(member.id, known.name, merged)
        return True

    def meet(self, member: MemberAddress) -> bool:
        """``member`` itself says where it is: that replaces all hearsay. Returns whether anything changed."""
        fresh = MemberAddress(member.id, member.name, tuple(dict.fromkeys(member.addresses))[:MAX_ADDRESSES])
        if self._members.get(member.id) == fresh or (
            member.id not in self._members and len(self._members) >= MAX_MEMBERS
        ):
            return False
        self._members[member.id] = fresh
        return True

    def forget(self, node: NodeId) -> None:
        self._members.pop(node, None)
