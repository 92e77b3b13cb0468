"""NVIDIA devices through NVML; none where there is no driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mesh.wire.facts import Device


def devices(load: Callable[[], Any] | None = None) -> tuple[Device, ...]:
    """Every GPU the engine would see, numbered as it would number them (in PCI order).

    Args:
        load: gives the ``pynvml`` module; replaced in tests.
    """
    try:
        nvml = (load or _load)()
        nvml.nvmlInit()
    except Exception:  # a missing library, driver or permission: all mean that there is no such GPU here
        return ()
    try:
        found = []
        for number, index in enumerate(_visible(nvml)):
            device = _device(nvml, number, index)
            if device is not None:
                found.append(device)
        return tuple(found)
    except nvml.NVMLError:
        return ()
    finally:
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


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
