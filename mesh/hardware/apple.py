"""Apple Silicon through ``sysctl``: one memory for all, of which the system gives the GPU a part.

Written from the documented formats of its tools; never run on such a machine.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable

import psutil

from mesh.wire.facts import Device

GIB = 1 << 30
_NAMES = ("hw.memsize", "iogpu.wired_limit_mb", "machdep.cpu.brand_string", "hw.perflevel0.physicalcpu")


def devices() -> tuple[Device, ...]:
    """The GPU, or none on anything but Apple Silicon."""
    if not _is_apple_silicon():
        return ()
    return _gpu(_sysctl(_ask), psutil.virtual_memory().available)


def fast_cores() -> int:
    """Performance cores; 0 on anything but Apple Silicon. The efficiency cores hold the others up."""
    return _number(_sysctl(_ask), "hw.perflevel0.physicalcpu") if _is_apple_silicon() else 0


def _is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _gpu(answers: dict[str, str], available: int) -> tuple[Device, ...]:
    memory = _number(answers, "hw.memsize")
    if not memory:
        return ()
    limit = _number(answers, "iogpu.wired_limit_mb") << 20
    if not limit:
        # What macOS recommends when nobody has set a limit: two thirds, of more than 36 GiB three quarters.
        limit = memory * 2 // 3 if memory <= 36 * GIB else memory * 3 // 4
    total = min(limit, memory)
    name = answers.get("machdep.cpu.brand_string") or "Apple GPU"
    return (Device("MTL0", "metal", name[:256], total, min(total, available)),)


def _sysctl(ask: Callable[[str], str]) -> dict[str, str]:
    return {name: ask(name).strip() for name in _NAMES}


def _ask(name: str) -> str:
    try:
        # One name at a time: sysctl stops at the first it does not know, and older systems lack some.
        return subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _number(answers: dict[str, str], name: str) -> int:
    text = answers.get(name, "")
    return int(text) if text.isdecimal() else 0
