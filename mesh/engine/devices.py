"""What the engine itself can compute on: its own device list, which is the last word, held to what the system shows.

The list is what ``llama-server --list-devices`` prints: a line for each, ``NAME: DESCRIPTION (N MiB, N MiB free)``.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from mesh.engine.cache import Engine
from mesh.errors import EngineError
from mesh.hardware import Shown
from mesh.wire.facts import Device

LIST_WITHIN_S = 20.0
"""The first look at a GPU after a boot loads its driver, and may compile for it."""
MAX_DEVICES = 16
_LINE = re.compile(
    r"^ {2}(?P<name>[A-Za-z]{1,16}\d{0,3}): (?P<text>.{0,256}) \((?P<total>\d{1,9}) MiB, (?P<free>\d{1,9}) MiB free\)$"
)
MIB = 1 << 20
Kind = Literal["cpu", "cuda", "metal", "vulkan", "rocm", "sycl"]


def list_devices(engine: Engine) -> tuple[Device, ...]:
    """The devices that this engine can use besides the processor, main memory not among them.

    Raises:
        EngineError: the engine does not run here, or not in time.
    """
    return read_devices(_ask(engine.llama_server), engine.backend)


def read_devices(said: str, backend: str) -> tuple[Device, ...]:
    """Devices as the engine prints them; lines of another shape are not devices."""
    found: list[Device] = []
    for line in said.splitlines():
        match = _LINE.match(line.rstrip())
        if match is not None and len(found) < MAX_DEVICES:
            total, free = int(match["total"]) * MIB, int(match["free"]) * MIB
            found.append(Device(match["name"], cast(Kind, backend), match["text"].strip(), total, min(free, total)))
    return tuple(found)


def _ask(server: Path) -> str:
    try:
        done = subprocess.run(
            [server, "--list-devices"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIST_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{server} did not list its devices within {LIST_WITHIN_S:.0f} s",
            remedy="a driver may hang: restart the machine, or compute without it:  mesh up --backend cpu",
        ) from error
    except OSError as error:
        raise EngineError(
            f"the engine cannot be run: {server}: {error.strerror or error}", remedy="mesh engine build"
        ) from error
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise EngineError(
            f"the engine does not run here (exit {done.returncode}): {last[0][:300]}",
            remedy=f"build it again:  rm -r {server.parent} && mesh engine build",
        )
    return done.stdout.decode("utf-8", "replace")


def usable(listed: Sequence[Device], system: Sequence[Device], backend: str) -> tuple[Device, ...]:
    """The devices that an engine for ``backend`` computes on: those that it lists, or else main memory.

    Args:
        listed: by the engine; the last word on which there are.
        system: by :func:`mesh.hardware.devices`; knows the free memory of this moment, where it knows the device.
    """
    if not listed or backend == "cpu":
        return tuple(device for device in system if device.kind == "cpu")
    return tuple(_fresh(device, system) for device in listed)


def _fresh(device: Device, system: Sequence[Device]) -> Device:
    same = [other for other in system if other.kind == device.kind and other.name == device.name]
    if not same or abs(same[0].total_bytes - device.total_bytes) > device.total_bytes // 10:
        return device  # numbered in another order: not the same device
    free = min(same[0].free_bytes, device.total_bytes)
    return Device(device.name, device.kind, device.description, device.total_bytes, free)


@dataclass(frozen=True, slots=True)
class Idle:
    """A GPU that the system shows and this engine cannot use, and what to do about it."""

    text: str
    remedy: str


def unused(shown: Sequence[Shown], listed: Sequence[Device], backend: str, forced: bool = False) -> tuple[Idle, ...]:
    """GPUs that compute nothing although they are there.

    Args:
        shown: by :func:`mesh.hardware.shown`.
        listed: by the engine in use.
        backend: of that engine.
        forced: its owner asked for this backend.
    """
    if listed or (forced and backend == "cpu"):
        return ()
    return tuple(_idle(gpu, backend) for gpu in shown)


def _idle(gpu: Shown, backend: str) -> Idle:
    what = f"the system shows {_article(gpu.description)}{gpu.description}"
    if backend in gpu.backends:
        return Idle(
            f"{what}, and the engine built for {backend} sees no device",
            _DRIVERS[gpu.vendor]
            if not gpu.driver
            else f"{_DRIVERS[gpu.vendor]}   (the kernel uses {gpu.driver} for it)",
        )
    if gpu.vendor == "NVIDIA" and gpu.driver in ("", "nouveau"):
        return Idle(f"{what}, without a driver that computes", _DRIVERS[gpu.vendor])
    return Idle(
        f"{what}, which an engine built for {backend} cannot use", f"mesh engine build --backend {gpu.backends[0]}"
    )


_DRIVERS = {
    "NVIDIA": "install NVIDIA's driver; `nvidia-smi` must show the GPU",
    "AMD": "may this user open it?  sudo usermod -aG render,video $USER   (then log in again)",
    "Intel": "may this user open it?  sudo usermod -aG render $USER   (then log in again)",
    "Apple": "run it outside of virtual machines and ssh sandboxes",
}


def _article(text: str) -> str:
    return "an " if text[:1] in "AEIOU" or text.startswith("NVIDIA") else "a "
