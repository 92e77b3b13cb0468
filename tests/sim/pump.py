"""The real pump, on the clock of one simulated node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mesh.pump import Core, Pump

if TYPE_CHECKING:
    from tests.sim.node import Node


class SimPump(Pump):
    """Rings when the node's own clock says so; not while the node sleeps, and never after its end."""

    def __init__(
        self,
        core: Core,
        carry_out: Callable[[Any], None],
        tick: Callable[[], Any],
        node: Node,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(core, carry_out, tick, node, after)  # type: ignore[arg-type]
        self._node = node
        self._armed: float | None = None

    def _arm(self) -> None:
        due = None if self._stopped else self._core.next_timer()
        if due != self._armed:
            self._armed = due
            if due is not None:
                node = self._node
                node.world.clock.at(node.true_time(due), self._rings, due)

    def _rings(self, due: float) -> None:
        if self._stopped or self._armed != due:
            return
        if not self._node.is_awake:
            self._node.defer(self._rings, due)
            return
        self._armed = None
        self._node.not_before(due)
        self.feed(self._tick())

    def ring_if_due(self) -> None:
        if self._armed is not None:
            self._rings(self._armed) if self._armed <= self._node.now() else None
