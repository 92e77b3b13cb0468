"""What a check says: one sentence, how bad it is, and what to type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]
"""``warning``: it works, but not as it could. ``problem``: something will not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of one check.

    Attributes:
        check: the check's name, as in the first column.
        code: stable name of this very case, for scripts.
        remedy: commands or advice, a line each; empty when nothing needs doing.
    """

    check: str
    code: str
    level: Level
    text: str
    remedy: str = ""


def ok(check: str, text: str, code: str = "ok") -> Finding:
    return Finding(check, code, "ok", text)


def warning(check: str, code: str, text: str, remedy: str) -> Finding:
    return Finding(check, code, "warning", text, remedy)


def problem(check: str, code: str, text: str, remedy: str) -> Finding:
    return Finding(check, code, "problem", text, remedy)
