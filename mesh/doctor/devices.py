"""What this machine computes on: devices, their memory, what it runs on, and GPUs that stay idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mesh import hardware
from mesh.config import format_size
from mesh.doctor.finding import Finding, ok, warning
from mesh.doctor.patient import Patient
from mesh.engine.devices import unused, usable
from mesh.hardware import Power, Shown, apple, nvidia
from mesh.hardware.power_supply import warnings
from mesh.wire.facts import Device

CHECK = "devices"
LITTLE = 10**9
"""Bytes: hardly a layer of the models that are worth several machines."""


def judge_memory(devices: Sequence[Device], max_memory: int, *, busy: bool) -> Iterator[Finding]:
    """Is there enough to carry something?

    Args:
        busy: an engine of ours holds memory already: what is free now says nothing.
    """
    for device in devices:
        amount = f"{format_size(device.free_bytes)} free of {format_size(device.total_bytes)}"
        text = f"{device.name} {device.description}: {amount}"
        if device.free_bytes >= LITTLE or busy:
            yield ok(CHECK, text)
        elif device.total_bytes < LITTLE and "container" in device.description:
            yield warning(
                CHECK, "little-memory", text, "give its container more memory: under 1 GB hardly holds a layer"
            )
        else:
            yield warning(CHECK, "little-memory", text, "close something: under 1 GB hardly holds a layer")
    free = max((device.free_bytes for device in devices), default=0)
    if max_memory and max_memory < LITTLE:
        yield warning(
            CHECK,
            "max-memory",
            f"--max-memory {format_size(max_memory)} hardly holds a layer; {format_size(free)} is free",
            f"mesh up --max-memory {max(1, int(free * 0.8 // 10**9))}GB   (or leave it out)",
        )
    elif max_memory > free and not busy:
        yield warning(
            CHECK,
            "max-memory",
            f"--max-memory {format_size(max_memory)} allows more than the {format_size(free)} that are free",
            "close something, or leave --max-memory out",
        )


def judge_gpus(shown: Sequence[Shown], listed: Sequence[Device], backend: str, *, forced: bool) -> Iterator[Finding]:
    """Is a GPU idle that the system shows?"""
    for idle in unused(shown, listed, backend, forced=forced):
        yield warning(CHECK, "gpu-idle", f"{idle.text}: it stays idle", idle.remedy)


def judge_power(state: Power) -> Iterator[Finding]:
    """A laptop on battery is a member that will slow down and go."""
    for text in warnings(state):
        yield warning("power", "on-battery" if "battery" in text else "saving", text, "plug it in, or turn saving off")


def judge_placement(placed: str, members: Sequence[dict[str, object]]) -> Iterator[Finding]:
    """Did engines put their weights where the layout has them?"""
    if placed:
        yield ok(CHECK, f"this node's engine says that it holds: {placed}")
    for member in members:
        if member["computes_on"]:
            yield warning(
                CHECK,
                "misplaced",
                f"{member['name']} computes on {member['computes_on']}, not on the device that was planned",
                f"on {member['name']}:  mesh doctor   mesh logs",
            )


def check(patient: Patient) -> Iterator[Finding]:
    """This machine's devices as its engine has them."""
    seen = patient.outfit
    if seen is None:
        return
    own = patient.checkup["settings"] if patient.checkup is not None else None
    devices = usable(seen.listed, hardware.devices(), seen.backend)
    max_memory = int(own["max_memory"]) if own is not None else patient.settings.max_memory
    busy = patient.checkup is not None and bool(patient.checkup["placed"])
    yield from judge_memory(devices, max_memory, busy=busy)
    for gpu in nvidia.details():
        parted = ", parted (MIG): the engine sees one instance" if gpu.parted else ""
        yield ok(CHECK, f"{gpu.name}: driver {gpu.driver}, compute capability {gpu.capability}{parted}")
    for device in devices:
        promised = apple.memory_bandwidth(device.description)
        if promised:
            yield ok(CHECK, f"{device.description}: {promised / 1e9:.0f} GB/s of memory, as its maker says")
    asked = own["backend"] if own is not None else patient.settings.backend
    yield from judge_gpus(hardware.shown(), seen.listed, seen.backend, forced=asked == seen.backend)
    yield ok(CHECK, f"{hardware.threads()} threads to compute with")
    yield from judge_power(hardware.power())
    if patient.checkup is not None:
        yield from judge_placement(patient.checkup["placed"], list(patient.checkup["members"]))
