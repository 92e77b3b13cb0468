"""What a running node tells the person in front of it.

A :class:`Notice` is one line in plain words with the same facts as data; progress is a moving number with a unit. Rooms
produce facts, the node turns them into notices, and a view (terminal, plain lines, JSON lines) shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["mesh", "model", "engine", "plan", "load", "ready", "invite", "change", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing worth a line."""

    kind: Kind
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


class View(Protocol):
    """Where notices go."""

    def show(self, notice: Notice) -> None: ...

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        """``label`` is at ``done`` of ``total``; equal: finished; ``total`` 0: under way, for nobody knows how long.

        ``unit`` is ``B`` for bytes, else a plural noun.
        """
        ...

    def close(self) -> None:
        """Put the terminal back."""
        ...
