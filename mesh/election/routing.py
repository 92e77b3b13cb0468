"""Whether requests may go to the host, and for how long they have."""

from __future__ import annotations

from mesh.election.events import Served, Unserved
from mesh.election.following import Following, Phase
from mesh.membership.view import View


class Routing:
    """What the proxy was told last.

    Args:
        stable_after: seconds of serving after which earlier failures count no more.
    """

    def __init__(self, following: Following, stable_after: float) -> None:
        self._following = following
        self._stable_after = stable_after
        self._since: float | None = None
        self.served: Served | None = None
        self.is_stable = False

    def update(self, view: View, now: float) -> list[Served | Unserved]:
        """Tell the proxy what changed, if anything did."""
        following = self._following
        served = None
        if following.host is not None and following.api_key is not None and following.phase(view) is Phase.SERVING:
            served = Served(following.epoch, following.host, following.api_key)
            self._since = now if self._since is None else self._since
        else:
            self._since, self.is_stable = None, False
        broken = following.broken(view)
        drain_s = 0.0 if broken else max(0.0, following.drains_until - now)
        return self._tell(served, broken or following.propose.reason, drain_s)

    def close(self, reason: str) -> list[Served | Unserved]:
        return self._tell(None, reason)

    def becomes_stable(self, now: float) -> bool:
        """True once: it has served for long enough."""
        if self._since is None or self.is_stable or now < self._since + self._stable_after:
            return False
        self.is_stable = True
        return True

    @property
    def stable_at(self) -> float | None:
        return None if self._since is None or self.is_stable else self._since + self._stable_after

    def _tell(self, served: Served | None, reason: str, drain_s: float = 0.0) -> list[Served | Unserved]:
        if served == self.served:
            return []
        self.served = served
        return [Unserved(reason, drain_s) if served is None else served]
