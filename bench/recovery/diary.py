"""What a node said, and when: its notices as JSON lines. Nothing is asked of it while it is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOCK_ROUNDING_S = 0.0005
"""Of the times in the notices."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One notice. ``at``: seconds since 1970."""

    at: float
    kind: str
    said: dict[str, Any]


class Diary:
    """A node's output from now on.

    Args:
        path: of a node started with ``--json-logs``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin = path.stat().st_size if path.exists() else 0

    def entries(self) -> list[Entry]:
        """All notices so far; other lines (a crash, say) and halves of lines are left out."""
        with self._path.open("rb") as file:
            file.seek(self._begin)
            lines = file.read().split(b"\n")[:-1]
        return [entry for line in lines if (entry := _read(line)) is not None]

    def first(self, kinds: Sequence[str], suits: Callable[[Entry], bool], since: float) -> Entry | None:
        """The first notice of ``kinds`` at or after ``since`` that ``suits``."""
        for entry in self.entries():
            if entry.at >= since - CLOCK_ROUNDING_S and entry.kind in kinds and suits(entry):
                return entry
        return None


def _read(line: bytes) -> Entry | None:
    try:
        said = json.loads(line)
        return Entry(float(said["time"]), str(said["kind"]), said)
    except (ValueError, KeyError, TypeError):
        return None
