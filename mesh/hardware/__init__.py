"""What this machine has that can hold and compute layers: one small module per source, one answer.

The engine's own device list is the last word on what it can use; this is what the machine shows without asking it.
"""

from __future__ import annotations

from mesh.hardware import apple, cpu, nvidia
from mesh.wire.facts import Device

SOURCES = (nvidia.devices, apple.devices, cpu.devices)
"""Each returns its devices, or none where there are none; none of them raises."""


def devices() -> tuple[Device, ...]:
    """Everything that could hold layers, GPUs first, main memory last. Free bytes are those of this moment."""
    return tuple(device for source in SOURCES for device in source())


def threads() -> int:
    """How many threads the engine should compute with: the fast cores that this process may use; 1 or more."""
    return apple.fast_cores() or cpu.usable_cores()


__all__ = ["devices", "threads"]
