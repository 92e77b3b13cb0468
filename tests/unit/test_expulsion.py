"""How word of a revocation gets around, and what it does to those whom the revoked had let in."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mesh.identity.grants import Roster, found_mesh, sign_grant, sign_revocation
from mesh.identity.invite import InviteBook
from mesh.identity.key import NodeKey
from mesh.membership.callbacks import Callbacks
from mesh.membership.door import MAX_MEMBERS, answer_join, let_in, weigh_hello
from mesh.membership.expulsion import Expulsion
from mesh.wire.facts import NodeId
from mesh.wire.messages import PROTOCOL, Control, Grant, Hello, Join, Joined, Refused, Revocation, Revoke
from tests.sim.fakes import facts_of

FOUNDER, CARL, DORA, ME = (NodeKey.from_seed(bytes([n]) * 32) for n in range(1, 5))
MESH = FOUNDER.id
WALL = 1_800_000_000.0


def granted(subject: NodeKey, by: NodeKey = FOUNDER, wall: float = WALL - 100) -> Grant:
    return sign_grant(by, mesh=MESH, subject=subject.public, role="worker", wall=wall)


def roster(*grants: Grant) -> Roster:
    return Roster(MESH, FOUNDER.public, [found_mesh(FOUNDER, WALL - 1000), *grants])


class House:
    """Linked to some; what it is asked to do is written down. Its clock stands still."""

    def __init__(self, me: NodeKey, known: Roster, *linked: NodeKey, wall: float = WALL) -> None:
        self.linked = linked
        self.at = wall
        self.said: list[tuple[Control, NodeId | None]] = []
        self.forgotten: list[NodeId] = []
        self.shown_out: list[tuple[NodeId, str]] = []
        self.expelled: list[Refused] = []
        nothing: Any = lambda *args: None  # noqa: E731
        tell = Callbacks(
            nothing, nothing, nothing, nothing, on_expelled=lambda teller, refused: self.expelled.append(refused)
        )
        self.expulsion = Expulsion(self, me, known, self, tell)  # type: ignore[arg-type]

    def wall(self) -> float:
        return self.at

    def peers(self) -> Mapping[NodeId, Any]:
        return {
            key.id: SimpleNamespace(peer=key.id, role="worker", connection=SimpleNamespace(peer_key=key.public))
            for key in self.linked
        }

    def broadcast(self, message: Control, *, but: NodeId | None = None) -> None:
        self.said.append((message, but))

    def forget(self, node: NodeId) -> None:
        self.forgotten.append(node)

    def show_out(self, link: Any, reason: str) -> None:
        self.shown_out.append((link.peer, reason))


def revoked(subject: NodeKey, wall: float = WALL) -> Revocation:
    return sign_revocation(FOUNDER, mesh=MESH, subject=subject.public, wall=wall)


def test_a_revocation_that_came_with_a_greeting_ends_the_link_that_stands() -> None:
    """It was taken into the roster, and whoever had been linked before stayed so for as long as the link did."""
    known = roster(granted(CARL), granted(DORA), granted(ME))
    house = House(ME, known, CARL, DORA)
    hello = Hello(PROTOCOL, MESH, known.chain(DORA.public, WALL), (revoked(CARL),), facts_of(0, id=DORA.id))
    weigh_hello(hello, DORA.public, known, WALL)
    house.expulsion.review(DORA.id)
    assert house.shown_out == [(CARL.id, "revoked")]
    assert set(house.forgotten) == {CARL.id}
    assert house.said == [(Revoke(revoked(CARL)), DORA.id)], "and those who greet nobody hear of it"
    house.expulsion.review(DORA.id)
    assert len(house.said) == 1, "once"


def test_an_old_revocation_does_not_expel_who_was_let_in_again_since() -> None:
    """Passed on late, it reached the one it had been about, who took it for news and went."""
    known = roster(granted(ME), granted(ME, wall=WALL + 50))
    house = House(ME, known, DORA)
    house.expulsion.take(revoked(ME), DORA.id)
    assert not house.expelled
    other = House(DORA, roster(granted(DORA), granted(CARL), granted(CARL, wall=WALL + 50)), CARL)
    other.expulsion.take(revoked(CARL), FOUNDER.id)
    assert not other.forgotten
    assert not other.shown_out


def test_a_revocation_by_a_slow_clock_leaves_in_whom_its_subject_had_invited() -> None:
    """It was dated before their grant, which then looked as if it had been made afterwards."""
    known = roster(granted(CARL), granted(DORA, by=CARL, wall=WALL + 3))
    house = House(FOUNDER, known, CARL, DORA, wall=WALL)
    house.expulsion.revoke(CARL.id)
    assert known.role_of(CARL.public, WALL) is None
    assert known.role_of(DORA.public, WALL) == "worker"
    assert house.shown_out == [(CARL.id, "revoked")]


def test_a_mesh_that_is_full_says_so_and_burns_no_invite() -> None:
    crowd = [NodeKey.from_seed(n.to_bytes(32, "big")) for n in range(1000, 1000 + MAX_MEMBERS - 2)]
    known = roster(granted(ME), *(granted(key) for key in crowd))
    assert len(known.members(WALL)) == MAX_MEMBERS
    book = InviteBook(None)
    book.issue(b"s" * 16, role="worker", uses=1, expires_at=0, wall=WALL)

    def joins(who: NodeKey) -> Joined | Refused:
        join = Join(PROTOCOL, b"s" * 16, "one more")
        return answer_join(join, who.public, key=ME, roster=known, book=book, mesh_name="home", members=(), wall=WALL)

    answer = joins(CARL)
    assert isinstance(answer, Refused)
    assert answer.code == "full"
    assert f"{MAX_MEMBERS} members" in answer.message
    assert isinstance(joins(crowd[0]), Joined), "who is in is told so"
    known.revoke([revoked(crowd[1])], WALL)
    assert isinstance(joins(CARL), Joined), "the use was not burned"
    assert isinstance(
        let_in(DORA.public, "worker", key=ME, roster=known, mesh_name="home", members=(), wall=WALL), Refused
    )
