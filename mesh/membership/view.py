"""What a node holds to be true of the others: a frozen snapshot, for those who plan, elect and show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mesh.wire.facts import NodeFacts, NodeId


@dataclass(frozen=True, slots=True)
class Member:
    """One node of the mesh that is in.

    ``state`` is ``suspect`` while nothing was heard from it for a while and the verdict is open. ``reachable`` is False
    when only others hear it: it takes part, but this node cannot exchange a byte with it. ``boot`` changes when the
    node's process is a new one.
    """

    facts: NodeFacts
    state: Literal["alive", "suspect"] = "alive"
    reachable: bool = True
    boot: int = 0
    rtt_ms: float | None = None

    @property
    def id(self) -> NodeId:
        return self.facts.id


@dataclass(frozen=True, slots=True)
class Departed:
    """A node that was in and is not: ``crashed``, ``left``, ``unreachable``, ``revoked``."""

    facts: NodeFacts
    reason: str


@dataclass(frozen=True, slots=True)
class View:
    """Members sorted by id, this node among them; who went; and which pairs cannot hear each other.

    ``cuts`` holds pairs with the lower id first, as far as anybody told us. A host must not be given a ring member
    it is cut from.
    """

    me: NodeId
    members: tuple[Member, ...]
    departed: tuple[Departed, ...] = ()
    cuts: frozenset[tuple[NodeId, NodeId]] = frozenset()
    _by_id: dict[NodeId, Member] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_id", {m.facts.id: m for m in self.members})

    def find(self, node: NodeId) -> Member | None:
        return self._by_id.get(node)

    def __contains__(self, node: object) -> bool:
        return node in self._by_id

    @property
    def facts(self) -> tuple[NodeFacts, ...]:
        return tuple(m.facts for m in self.members)

    def named(self, name_or_id: str) -> NodeFacts | None:
        """The one that is or was in, by its id, the beginning of it, or its name when only one bears it."""
        known = (*self.facts, *(gone.facts for gone in self.departed))
        found = [facts for facts in known if facts.id == name_or_id or facts.name == name_or_id]
        found = found or [facts for facts in known if len(name_or_id) >= 4 and facts.id.startswith(name_or_id)]
        return found[0] if len(found) == 1 else None

    @property
    def unreachable(self) -> frozenset[NodeId]:
        """Members that take part but that this node cannot reach."""
        return frozenset(m.facts.id for m in self.members if not m.reachable)

    def name(self, node: NodeId) -> str:
        """What a person calls ``node``; its id's beginning when nobody told us."""
        for facts in (*self.facts, *(d.facts for d in self.departed)):
            if facts.id == node:
                return facts.name
        return node[:8]
