"""Patience with what fails again and again: back off, hold off, give up, with a reason a person can read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from mesh.wire.facts import NodeId
from mesh.wire.messages import HeldOff


class Backoff:
    """How long to wait before the same layout is tried again.

    The first failure waits for nothing; then ``base`` seconds, doubled each time up to ``cap``, of which up to half is
    taken off by ``jitter`` (0 to 1), so that meshes that broke together do not start together.
    """

    def __init__(self, jitter: float, *, base: float = 0.5, cap: float = 30.0, limit: int = 5) -> None:
        self._jitter = jitter
        self._base = base
        self._cap = cap
        self.limit = limit
        self._failures: dict[Hashable, tuple[int, str]] = {}

    def failed(self, shape: Hashable, why: str) -> None:
        self._failures[shape] = (self.failures(shape) + 1, why)

    def failures(self, shape: Hashable) -> int:
        return self._failures.get(shape, (0, ""))[0]

    def story(self, shape: Hashable) -> str:
        """How often, and what happened last; for people."""
        times, why = self._failures.get(shape, (0, ""))
        return f"the same layout failed {times} times; the last time: {why}"

    def delay(self, shape: Hashable) -> float:
        n = self.failures(shape)
        if n < 2:
            return 0.0
        # float exponent bounded: 2.0**2000 overflows, and a mesh may fail for months
        return min(self._cap, self._base * 2.0 ** min(n - 2, 16)) * (1.0 - self._jitter / 2)

    def is_exhausted(self, shape: Hashable) -> bool:
        return self.failures(shape) >= self.limit

    def forget(self) -> None:
        """Something changed, or went well: earlier failures say nothing any more."""
        self._failures.clear()


class HoldOffs:
    """Members the plan does without for a while, because they failed too often of late.

    ``limit`` strikes within ``window`` seconds hold a member off for ``base`` seconds, doubled with each strike more up
    to ``cap``. Strikes are forgotten ``window`` seconds after the last one, or the last hold-off's end.
    """

    def __init__(self, *, limit: int = 3, window: float = 120.0, base: float = 15.0, cap: float = 300.0) -> None:
        self._limit = limit
        self._window = window
        self._base = base
        self._cap = cap
        self._strikes: dict[NodeId, tuple[int, float]] = {}
        self._held: dict[NodeId, tuple[float, str]] = {}

    def strike(self, node: NodeId, why: str, now: float) -> None:
        count, last = self._strikes.get(node, (0, now))
        until = self._held.get(node, (last, ""))[0]
        count = 1 if now > max(last, until) + self._window else count + 1
        self._strikes[node] = (count, now)
        if count >= self._limit:
            seconds = min(self._cap, self._base * 2.0 ** min(count - self._limit, 16))
            self.hold(node, f"{why}, {count} times of late; held off for {seconds:.0f} s", now + seconds)

    def hold(self, node: NodeId, why: str, until: float) -> None:
        if until > self._held.get(node, (0.0, ""))[0]:
            self._held[node] = (until, why)

    def forgive(self, node: NodeId) -> None:
        self._strikes.pop(node, None)

    def held(self, now: float) -> dict[NodeId, str]:
        return {node: why for node, (until, why) in self._held.items() if now < until}

    def told(self, now: float) -> dict[NodeId, HeldOff]:
        """What another coordinator has to know."""
        return {node: HeldOff(until - now, why[:1024]) for node, (until, why) in self._held.items() if now < until}

    def hear(self, held_off: Mapping[NodeId, HeldOff], now: float) -> None:
        """Believe another's memory, as far as a hold-off may last."""
        for node, hold in held_off.items():
            self.hold(node, hold.why, now + min(hold.seconds, self._cap))

    def next_end(self, now: float) -> float | None:
        return min((until for until, _ in self._held.values() if until > now), default=None)


class StandIn:
    """When a node that is not the coordinator acts for it: the coordinator may be wrong about its duty, or we about it.

    Patience grows with the node's rank, so that one comes first, and doubles with every use until things go well.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._uses = 0
        self.at: float | None = None
        self.is_active = False

    def wait(self, rank: int, since: float) -> None:
        """Nobody has proposed what is needed; count from ``since``, unless counting already."""
        if self.at is None:
            self.at = since + self._patience * (1 + rank) * 2.0 ** min(self._uses, 5)

    def begins(self, now: float) -> bool:
        """Whether it is time; from now on the node leads, until somebody's proposal is followed."""
        if self.at is None or now < self.at:
            return False
        self.is_active, self.at = True, None
        self._uses += 1
        return True

    def rest(self) -> None:
        """No need, for now."""
        self.at = None

    def end(self) -> None:
        """Somebody proposed."""
        self.is_active, self.at = False, None

    def all_is_well(self) -> None:
        self._uses = 0


class Agenda:
    """When the coordinator looks at the layout again: at once, or when joins have settled.

    Every new change pushes the moment back by ``settle`` seconds, but never past ``limit`` after the first.
    """

    def __init__(self, settle: float, limit: float) -> None:
        self._settle = settle
        self._limit = limit
        self.at: float | None = None
        self._first: float | None = None

    def soon(self, at: float) -> None:
        """Not later than ``at``; no change pushes that back."""
        self.at = at if self.at is None else min(self.at, at)
        self._first = None

    def settle(self, now: float, seconds: float | None = None) -> None:
        wait = self._settle if seconds is None else seconds
        if self.at is None:
            self._first = now
            self.at = now + wait
        elif self._first is not None:
            self.at = min(max(self.at, now + wait), self._first + max(self._limit, wait))

    def is_due(self, now: float) -> bool:
        return self.at is not None and now >= self.at

    def clear(self) -> None:
        self.at = self._first = None
