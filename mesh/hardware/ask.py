"""What a tool of the system says, within a bound on time; nothing when it is not there, fails, or takes too long."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

TOOL_WITHIN_S = 3.0
"""A tool that talks to a hung driver never comes back; a node must start all the same."""
MAX_SAID = 1 << 20

Ask = Callable[[Sequence[str]], str]
"""Runs a command line, and gives what it said; replaced in tests."""


def ask(command: Sequence[str]) -> str:
    """The standard output of ``command``, or nothing. Never raises."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_WITHIN_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout[:MAX_SAID].decode("utf-8", "replace")


def read_json(text: str) -> Any:
    """The JSON in what a tool said, past the warnings some print before it; None when there is none."""
    starts = [at for at in (text.find("{"), text.find("[")) if at >= 0]
    if not starts:
        return None
    try:
        return json.loads(text[min(starts) :])
    except (ValueError, RecursionError):
        return None


def whole(value: Any) -> int:
    """A count of bytes, as tools write it (a number, or one in quotes); 0 for everything else."""
    if isinstance(value, bool):
        return 0
    if isinstance(value, int):
        return value if 0 <= value < 1 << 62 else 0
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0
