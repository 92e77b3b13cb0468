"""AMD GPUs through the kernel's amdgpu driver, or ``rocm-smi`` where its files cannot be seen.

Written from the documented formats and never run on such a machine: ``mem_info_vram_*`` as in
https://docs.kernel.org/gpu/amdgpu/driver-misc.html, ``rocm-smi --json`` as in https://rocm.docs.amd.com/projects/rocm_smi_lib.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mesh.hardware.ask import Ask, ask, read_json, whole
from mesh.hardware.sysfs import DRM, cards, read_text, shown
from mesh.wire.facts import Device

VENDOR = "0x1002"
_LEAST_BYTES = 2 << 30
"""An integrated GPU is lent some hundred megabytes at boot: no layers fit, and the rest is main memory."""


_TOOL = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")


def devices(drm: Path = DRM, tool: Ask | None = None) -> tuple[Device, ...]:
    """Every GPU with memory of its own, numbered as ROCm numbers those that may be seen (in PCI order).

    Args:
        tool: runs ``rocm-smi``; None: only where the system shows such a GPU, for it takes half a second.
    """
    found = _from_kernel(drm)
    if not found:
        if tool is None:
            if sys.platform != "linux" or all(gpu.vendor != "AMD" for gpu in shown()):
                return ()
            tool = ask
        found = _from_tool(tool(_TOOL))
    kept = [entry for entry in found if entry[1] >= _LEAST_BYTES]
    return tuple(
        Device(f"ROCm{number}", "rocm", name[:256], total, max(0, total - used))
        for number, (name, total, used) in enumerate(kept[index] for index in _visible(len(kept)))
    )


def _visible(count: int) -> list[int]:
    """Indices that ``HIP_VISIBLE_DEVICES`` (or ``ROCR_``) leaves; the first bad entry ends the list."""
    wanted = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES"))
    if wanted is None:
        return list(range(count))
    visible: list[int] = []
    for entry in (e.strip() for e in wanted.split(",")):
        if not entry.isdecimal() or int(entry) >= count:
            break
        visible.append(int(entry))
    return visible


def _from_kernel(drm: Path) -> list[tuple[str, int, int]]:
    found = []
    for card in cards(drm):
        if read_text(card / "device" / "vendor") != VENDOR:
            continue
        total = whole(read_text(card / "device" / "mem_info_vram_total"))
        used = whole(read_text(card / "device" / "mem_info_vram_used"))
        name = read_text(card / "device" / "product_name") or f"AMD GPU {read_text(card / 'device' / 'device')}"
        if total:
            found.append((name.strip(), total, used))
    return found


def _from_tool(said: str) -> list[tuple[str, int, int]]:
    """One object for each card, under ``card0``, ``card1``, ...; every value is text. Names changed with versions."""
    answer = read_json(said)
    if not isinstance(answer, dict):
        return []
    found = []
    for key in sorted((k for k in answer if k.startswith("card") and k[4:].isdecimal()), key=lambda k: int(k[4:])):
        card = answer[key]
        if not isinstance(card, dict):
            continue
        folded = {str(name).casefold(): value for name, value in card.items()}
        total = whole(folded.get("vram total memory (b)"))
        used = whole(folded.get("vram total used memory (b)"))
        name = folded.get("card series") or folded.get("card model") or "AMD GPU"
        if total:
            found.append((str(name), total, used))
    return found
