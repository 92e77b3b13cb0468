"""What this machine has that can hold and compute layers: one small module per source, one answer.

The engine's own device list (:mod:`mesh.engine.devices`) is the last word on what it can use; this is what the machine
shows without asking it. No source raises, and each is bounded in time.
"""

from __future__ import annotations

import sys

from mesh.hardware import amd, apple, cpu, intel, nvidia
from mesh.hardware.power_supply import Power, power
from mesh.hardware.sysfs import Shown
from mesh.hardware.sysfs import shown as on_the_bus
from mesh.wire.facts import Device

SOURCES = (nvidia.devices, amd.devices, intel.devices, apple.devices, cpu.devices)
"""Each returns its devices, or none where there are none; none of them raises."""


def devices() -> tuple[Device, ...]:
    """Everything that could hold layers, GPUs first, main memory last. Free bytes are those of this moment."""
    return tuple(device for source in SOURCES for device in source())


def shown() -> tuple[Shown, ...]:
    """GPUs that the system shows, whether or not anything here can use them. Empty where it does not tell."""
    if sys.platform == "darwin":
        return tuple(Shown("Apple", gpu.description, ("metal",), "AGX") for gpu in apple.devices())
    found = on_the_bus() if sys.platform == "linux" else ()
    if not any(gpu.vendor == "NVIDIA" for gpu in found):
        # Containers and WSL pass a GPU through without showing its bus.
        found += tuple(Shown("NVIDIA", gpu.description, ("cuda", "vulkan"), "nvidia") for gpu in nvidia.devices())
    return found


def threads() -> int:
    """How many threads the engine should compute with: the fast cores that this process may use; 1 or more."""
    return apple.fast_cores() or cpu.usable_cores()


__all__ = ["Power", "Shown", "devices", "power", "shown", "threads"]
