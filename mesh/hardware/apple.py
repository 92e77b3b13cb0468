"""Apple Silicon through ``sysctl``: one memory for all, of which the system gives the GPU a part.

Written from the documented formats of its tools; never run on such a machine.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import psutil

from mesh.hardware.ask import ask
from mesh.wire.facts import Device

GIB = 1 << 30
_NAMES = ("hw.memsize", "iogpu.wired_limit_mb", "machdep.cpu.brand_string", "hw.perflevel0.physicalcpu")

_BANDWIDTHS = {
    "M1": (68, 200, 400, 800),
    "M2": (100, 200, 400, 800),
    "M3": (100, 150, 300, 819),
    "M4": (120, 273, 410, 0),
    "M5": (153, 0, 0, 0),
}
"""GB/s of memory for the plain chip, Pro, Max and Ultra (the smaller Max where there are two); 0: not known here. From
Apple's technical specifications, https://support.apple.com/specs."""
_TIERS = ("", "Pro", "Max", "Ultra")


def memory_bandwidth(chip: str) -> int:
    """Bytes per second that the maker promises of a chip's memory, by its name (``Apple M2 Max``); 0 when unknown.

    What a machine does is measured; this is what a measurement can be held to.
    """
    words = chip.split()
    if len(words) < 2 or words[0] != "Apple" or words[1] not in _BANDWIDTHS:
        return 0
    tier = words[2] if len(words) > 2 else ""
    return _BANDWIDTHS[words[1]][_TIERS.index(tier)] * 10**9 if tier in _TIERS else 0


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
    # One name at a time: sysctl stops at the first it does not know, and older systems lack some.
    return ask(["/usr/sbin/sysctl", "-n", name])


def _number(answers: dict[str, str], name: str) -> int:
    text = answers.get(name, "")
    return int(text) if text.isdecimal() else 0
