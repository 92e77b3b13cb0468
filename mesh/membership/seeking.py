"""How a machine without a mesh looks for one to be let into: whom to ask, with which code, and when to stop. Pure.

A code is good for one round; everybody who is seen in a round is asked with it. Members hold a request a little longer
than a round lasts, so what a person reads is always good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesh.discovery.lan import Door, Mesh

ROUND_S = 240.0
AGAIN_S = 15.0
"""Until a member is asked again that could not be reached, or has dropped us."""
MAX_GUESSES = 30
"""Answers in one round that proved nothing. With three to a member nobody needs more; a guesser gets no more."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Look around."""


@dataclass(frozen=True, slots=True)
class Saw:
    """These meshes are here now."""

    meshes: tuple[Mesh, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A member knows our request now."""

    door: Door


@dataclass(frozen=True, slots=True)
class Guessed:
    """At this door a code was typed that is not ours."""

    door: Door


@dataclass(frozen=True, slots=True)
class Ended:
    """That request came to nothing."""

    door: Door
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A timer is due."""


Event = Begin | Saw | Held | Guessed | Ended | Tick


@dataclass(frozen=True, slots=True)
class AskAt:
    """Ask to be let in at ``door``, with ``code``."""

    door: Door
    code: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """End the request at ``door``."""

    door: Door


@dataclass(frozen=True, slots=True)
class ShowCode:
    """People who type ``code`` on a machine of one of the meshes let us in."""

    code: str
    meshes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TellMistyped:
    """A wrong code was typed on a machine of this mesh, or somebody guesses; at the third, a new request follows."""

    mesh: str


@dataclass(frozen=True, slots=True)
class Nobody:
    """There is no mesh here that could let us in. ``silent``: names of those that were announced, but do not answer."""

    silent: tuple[str, ...]


Effect = AskAt | Withdraw | ShowCode | TellMistyped | Nobody


@dataclass(slots=True)
class _Asked:
    mesh: str
    held: bool = False
    failed: bool = False
    again: float | None = None
    """When to ask again; None while a request stands."""


class Seeking:
    """``handle`` takes events, ``next_timer`` says when to tick.

    Args:
        look_s: how long to wait for the first announcement.
        new_code: makes one, as people read it.
    """

    def __init__(self, look_s: float, new_code: Callable[[], str]) -> None:
        self._look_s = look_s
        self._new_code = new_code
        self._look_until: float | None = None
        """None once it is settled that there is somebody, or nobody."""
        self._code = ""
        self._round_ends = 0.0
        self._guesses = 0
        self._doors: dict[Door, _Asked] = {}
        self._seen: dict[Door, str] = {}
        """What is announced now; a member that is not may still hold our request."""
        self._shown: tuple[str, tuple[str, ...]] = ("", ())

    def next_timer(self) -> float | None:
        due = [asked.again for asked in self._doors.values() if asked.again is not None]
        if self._doors:
            due.append(self._round_ends)
        if self._look_until is not None and not self._may_answer():
            due.append(self._look_until)
        return min(due, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects: list[Effect] = []
        match event:
            case Begin():
                self._look_until = now + self._look_s
                effects += self._new_round(now)
            case Saw(meshes):
                effects += self._saw(meshes)
            case Held(door) if door in self._doors:
                self._doors[door].held = True
                self._look_until = None
            case Guessed(door) if door in self._doors:
                self._guesses += 1
                effects.append(TellMistyped(self._doors[door].mesh))
            case Ended(door, code, _) if door in self._doors:
                self._ended(door, code, now)
            case _:
                pass
        if now >= self._round_ends or self._guesses >= MAX_GUESSES:
            effects += self._new_round(now)
        effects += self._ask(now)
        effects += self._show()
        effects += self._give_up(now)
        return effects

    def _ended(self, door: Door, code: str, now: float) -> None:
        if door not in self._seen:
            del self._doors[door]
            return
        asked = self._doors[door]
        asked.held, asked.failed = False, True
        # The same member, announced twice: it holds the other request, and would drop that one for this.
        asked.again = self._round_ends if code == "replaced" else now + AGAIN_S

    def _saw(self, meshes: tuple[Mesh, ...]) -> list[Effect]:
        seen = self._seen = {door: mesh.name for mesh in meshes for door in mesh.doors}
        # A member that said good-bye may still hold us for a moment; its connection says when that is over.
        gone = [door for door, asked in self._doors.items() if door not in seen and not asked.held]
        for door in gone:
            del self._doors[door]
        for door, name in seen.items():
            self._doors.setdefault(door, _Asked(name, again=0.0))
        return [Withdraw(door) for door in gone]

    def _new_round(self, now: float) -> list[Effect]:
        standing = [door for door, asked in self._doors.items() if asked.again is None]
        self._code, self._round_ends, self._guesses = self._new_code(), now + ROUND_S, 0
        for door in standing:
            self._doors[door].held, self._doors[door].again = False, now
        return [Withdraw(door) for door in standing]

    def _ask(self, now: float) -> list[Effect]:
        due = [door for door, asked in self._doors.items() if asked.again is not None and asked.again <= now]
        for door in due:
            self._doors[door].again = None
        return [AskAt(door, self._code) for door in due]

    def _show(self) -> list[Effect]:
        meshes = tuple(dict.fromkeys(asked.mesh for asked in self._doors.values() if asked.held))
        before = self._shown
        if not meshes or (self._code == before[0] and set(meshes) <= set(before[1])):
            return []
        self._shown = (self._code, meshes)
        return [ShowCode(self._code, meshes)]

    def _give_up(self, now: float) -> list[Effect]:
        if self._look_until is None or now < self._look_until:
            return []
        if self._may_answer():
            return []
        self._look_until = None
        return [Nobody(tuple(dict.fromkeys(asked.mesh for asked in self._doors.values())))]

    def _may_answer(self) -> bool:
        """Is somebody being asked for the first time? That ends soon, one way or the other."""
        return any(asked.again is None and not asked.failed for asked in self._doors.values())
