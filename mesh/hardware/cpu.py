"""Main memory and processor, through psutil, within what a container allows."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import psutil

from mesh.hardware import android
from mesh.hardware.cgroup import Limits, limits
from mesh.wire.facts import Device


def devices() -> tuple[Device, ...]:
    """One device: the memory this process may use."""
    memory = psutil.virtual_memory()
    device = _device(memory.total, memory.available, _limits(), _model_name())
    return (_sparing(device) if android.is_android() else device,)


def usable_cores() -> int:
    """Physical cores, within this process's affinity and quota.

    A second thread on a core shares its arithmetic units: for the engine's kernels it costs more than it brings.
    """
    try:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    except OSError:
        affinity = psutil.cpu_count() or 1
    return _cores(affinity, psutil.cpu_count(logical=False), _limits().cpus)


def _cores(affinity: int, physical: int | None, quota: float | None) -> int:
    cores = min(affinity, physical or affinity)
    # 1.5 processors' worth of time is one thread: two would be stopped a quarter of the time, both at once.
    return max(1, cores if quota is None else min(cores, int(quota)))


def _device(total: int, available: int, allowed: Limits, description: str) -> Device:
    if allowed.memory_bytes is not None and allowed.memory_bytes < total:
        total = allowed.memory_bytes
        description = f"{description}, limited by its container"
    if allowed.free_bytes is not None:
        available = min(available, allowed.free_bytes)
    return Device("CPU", "cpu", description, total, min(available, total))


def _sparing(device: Device) -> Device:
    """A share of it: Android ends whoever takes most."""
    free = int(device.free_bytes * android.SHARE)
    return Device(device.name, device.kind, f"{device.description}, Android", device.total_bytes, free)


def _limits() -> Limits:
    return limits() if sys.platform == "linux" else Limits()


def _model_name() -> str:
    name = ""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
                if line.startswith("model name"):
                    name = line.partition(":")[2].strip()
                    break
        except OSError:
            pass
    return (name or platform.processor() or platform.machine() or "processor")[:256]
