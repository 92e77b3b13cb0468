"""NVIDIA devices through NVML; none where there is no driver.

A GPU that is parted into MIG instances is none by itself, and a CUDA process sees exactly one instance: the first,
unless ``CUDA_VISIBLE_DEVICES`` names another (NVIDIA's MIG user guide, "CUDA Device Enumeration"). MIG is written from
that guide, and was never run on such a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mesh.wire.facts import Device


def devices(load: Callable[[], Any] | None = None) -> tuple[Device, ...]:
    """Every GPU the engine would see, numbered as it would number them (in PCI order).

    Args:
        load: gives the ``pynvml`` module; replaced in tests.
    """
    with _nvml(load) as nvml:
        if nvml is None:
            return ()
        try:
            instance = _instance(nvml)
            if instance is not None:
                return (instance,)
            return tuple(
                device
                for number, index in enumerate(_visible(nvml))
                if not _is_parted(nvml, index) and (device := _device(nvml, number, index)) is not None
            )
        except nvml.NVMLError:
            return ()


@dataclass(frozen=True, slots=True)
class Details:
    """What is worth knowing of one GPU besides its memory. ``capability`` is CUDA's compute capability (``8.9``)."""

    name: str
    driver: str
    capability: str
    parted: bool
    """MIG mode is on."""


def details(load: Callable[[], Any] | None = None) -> tuple[Details, ...]:
    """One for each GPU of the machine, hidden ones too."""
    with _nvml(load) as nvml:
        if nvml is None:
            return ()
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            return tuple(
                found
                for index in range(nvml.nvmlDeviceGetCount())
                if (found := _details(nvml, index, driver)) is not None
            )
        except nvml.NVMLError:
            return ()


@contextmanager
def _nvml(load: Callable[[], Any] | None) -> Iterator[Any]:
    """The library, initialised; None without library, driver or permission: then there is no such GPU here."""
    try:
        nvml = (load or _load)()
        nvml.nvmlInit()
    except Exception:
        yield None
        return
    try:
        yield nvml
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _load() -> Any:
    import pynvml

    return pynvml


def _visible(nvml: Any) -> list[int]:
    """Indices that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; as in CUDA, the first bad entry ends the list."""
    count = nvml.nvmlDeviceGetCount()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(range(count))
    visible: list[int] = []
    for entry in (e.strip() for e in wanted.split(",")):
        if entry.isdecimal() and int(entry) < count:
            visible.append(int(entry))
            continue
        uuids = [_text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
        matches = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(matches) != 1:
            break
        visible.append(matches[0])
    return visible


def _device(nvml: Any, number: int, index: int) -> Device | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = _text(nvml.nvmlDeviceGetName(handle))
    except nvml.NVMLError:
        # A GPU that fell off the bus answers nothing: the others still count.
        return None
    return Device(f"CUDA{number}", "cuda", name[:256], int(memory.total), int(memory.free))


def _is_parted(nvml: Any, index: int) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(nvml.nvmlDeviceGetHandleByIndex(index))
    except (nvml.NVMLError, AttributeError):  # most GPUs have no such mode, and old libraries no such function
        return False
    return bool(current == 1)


def _instance(nvml: Any) -> Device | None:
    """The MIG instance that a CUDA process would see."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    if wanted and not wanted.startswith("MIG-"):
        return None
    for index in range(nvml.nvmlDeviceGetCount()):
        if not _is_parted(nvml, index):
            continue
        whole = nvml.nvmlDeviceGetHandleByIndex(index)
        for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, place)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                named = _text(nvml.nvmlDeviceGetUUID(handle))
                name = _text(nvml.nvmlDeviceGetName(handle))
            except nvml.NVMLError:
                continue  # places without an instance say "not found"
            if named.startswith(wanted):
                return Device("CUDA0", "cuda", name[:256], int(memory.total), int(memory.free))
    return None


def _details(nvml: Any, index: int, driver: str) -> Details | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Details(_text(nvml.nvmlDeviceGetName(handle)), driver, f"{major}.{minor}", _is_parted(nvml, index))
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
