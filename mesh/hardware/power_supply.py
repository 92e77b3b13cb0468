"""What this machine runs on: a laptop on battery slows down, and then goes away.

Linux: psutil, and ``/sys/firmware/acpi/platform_profile`` (https://docs.kernel.org/userspace-api/sysfs-platform_profile.html).
macOS: ``pmset -g``, written from its manual and never run there.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from mesh.hardware.ask import Ask, ask
from mesh.hardware.sysfs import read_text

PROFILE = Path("/sys/firmware/acpi/platform_profile")
_LOW_PROFILES = ("low-power", "quiet", "cool")
_PERCENT = re.compile(r"\b(\d{1,3})%")


@dataclass(frozen=True, slots=True)
class Power:
    """``on_battery`` None: there is none, or nobody can tell. ``percent`` is what is left of it."""

    on_battery: bool | None = None
    percent: int | None = None
    saving: bool = False
    """The system was told to save power, and computes slowly."""


def power(tool: Ask = ask, profile: Path = PROFILE) -> Power:
    """The state of this moment. Never raises."""
    if sys.platform == "darwin":
        return from_pmset(tool(["pmset", "-g", "batt"]), tool(["pmset", "-g"]))
    saving = read_text(profile) in _LOW_PROFILES
    try:
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except Exception:  # what a driver writes there, psutil may not understand
        battery = None
    if battery is None:
        return Power(saving=saving)
    plugged = battery.power_plugged
    return Power(None if plugged is None else not plugged, round(battery.percent), saving)


def from_pmset(source: str, settings: str) -> Power:
    """The state as ``pmset -g batt`` and ``pmset -g`` print it."""
    on_battery = None
    if "drawing from" in source:
        on_battery = "'Battery Power'" in source
    percent = _PERCENT.search(source)
    modes = [line.split() for line in settings.splitlines()]
    saving = any(words[:2] == ["lowpowermode", "1"] for words in modes)
    return Power(on_battery, min(100, int(percent[1])) if percent else None, saving)


def warnings(state: Power) -> list[str]:
    """What a person should know of it, in sentences; none when all is well."""
    said = []
    if state.on_battery:
        left = "" if state.percent is None else f", {state.percent}% left"
        said.append(f"this machine runs on battery{left}: it computes slowly, and the mesh loses it when that is empty")
    if state.saving:
        said.append("this machine is told to save power, and computes slowly")
    return said
