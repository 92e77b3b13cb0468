"""How a peer stands with us, as a table, and what we remember of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from mesh.wire.facts import NodeFacts, NodeId

NEVER = float("-inf")


class Standing(Enum):
    STRANGER = "stranger"
    """Told of, never met."""
    ALIVE = "alive"
    SUSPECT = "suspect"
    """Silent, or known by hearsay only; a member until the verdict."""
    CUT = "cut"
    """We have not heard it for as long as it takes to call it dead, but others do: a member we cannot reach."""
    GONE = "gone"
    """Held dead. Being heard again brings it back."""
    PARTED = "parted"
    """Went on purpose, or was thrown out. Only a new link brings it back: what is heard is an echo."""


class Sign(Enum):
    LINKED = "a link opened"
    HEARD = "a packet came"
    SILENT = "an answer is overdue, or the link broke"
    VOUCHED = "another member hears it"
    CUT_OFF = "the verdict is due, but others hear it"
    EXPIRED = "the verdict is due, and nobody hears it"
    PARTED = "it said farewell, or was expelled"


_S, _E = Standing, Sign
TRANSITIONS: dict[tuple[Standing, Sign], Standing] = {
    (_S.STRANGER, _E.LINKED): _S.ALIVE,
    (_S.STRANGER, _E.HEARD): _S.STRANGER,
    (_S.STRANGER, _E.VOUCHED): _S.SUSPECT,
    (_S.STRANGER, _E.PARTED): _S.PARTED,
    (_S.ALIVE, _E.LINKED): _S.ALIVE,
    (_S.ALIVE, _E.HEARD): _S.ALIVE,
    (_S.ALIVE, _E.VOUCHED): _S.ALIVE,
    (_S.ALIVE, _E.SILENT): _S.SUSPECT,
    (_S.ALIVE, _E.PARTED): _S.PARTED,
    (_S.SUSPECT, _E.LINKED): _S.ALIVE,
    (_S.SUSPECT, _E.HEARD): _S.ALIVE,
    (_S.SUSPECT, _E.VOUCHED): _S.SUSPECT,
    (_S.SUSPECT, _E.CUT_OFF): _S.CUT,
    (_S.SUSPECT, _E.EXPIRED): _S.GONE,
    (_S.SUSPECT, _E.PARTED): _S.PARTED,
    (_S.CUT, _E.LINKED): _S.ALIVE,
    (_S.CUT, _E.HEARD): _S.ALIVE,
    (_S.CUT, _E.VOUCHED): _S.CUT,
    (_S.CUT, _E.EXPIRED): _S.GONE,
    (_S.CUT, _E.PARTED): _S.PARTED,
    (_S.GONE, _E.LINKED): _S.ALIVE,
    (_S.GONE, _E.HEARD): _S.ALIVE,
    (_S.GONE, _E.VOUCHED): _S.SUSPECT,
    (_S.GONE, _E.PARTED): _S.PARTED,
    (_S.PARTED, _E.LINKED): _S.ALIVE,
    (_S.PARTED, _E.HEARD): _S.PARTED,
    (_S.PARTED, _E.VOUCHED): _S.PARTED,
    (_S.PARTED, _E.PARTED): _S.PARTED,
}
"""What is not in the table is a bug and raises ``KeyError``."""

MEMBERS = (Standing.ALIVE, Standing.SUSPECT, Standing.CUT)


@dataclass(slots=True)
class Peer:
    """What we hold of one other node. Times are those of the core's clock."""

    facts: NodeFacts
    standing: Standing = Standing.STRANGER
    reason: str = ""
    """Why it went, once GONE or PARTED."""
    linked: bool = False
    incarnation: int = 0
    heard_at: float = NEVER
    vouched_at: float = NEVER
    pinged_at: float = NEVER
    asked_at: float = NEVER
    hurry_at: float | None = None
    """A verdict without vouchers may fall this early: the other side closed the link."""
    ping: tuple[int, float] | None = None
    """Sequence number and time of the ping we await the answer of."""
    rtt: float | None = None
    """Smoothed, seconds."""
    boot: int = 0
    """Which run of its process told us its incarnation; 0: not told since it came in."""

    id: NodeId = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.facts.id

    @property
    def is_member(self) -> bool:
        return self.standing in MEMBERS

    def answered(self, now: float) -> None:
        """Learn the round trip from the answer to the awaited ping (smoothing as in RFC 6298)."""
        if self.ping is not None:
            sample = now - self.ping[1]
            self.rtt = sample if self.rtt is None else self.rtt + (sample - self.rtt) / 8
            self.ping = None

    def forgive(self, late: float, now: float) -> None:
        """Do not hold ``late`` seconds against the peer, in which it was us who slept."""
        self.heard_at = min(now, self.heard_at + late)
        self.vouched_at = min(now, self.vouched_at + late)
        if self.hurry_at is not None:
            self.hurry_at += late
        self.ping = None
