"""Intel GPUs with memory of their own, through ``xpu-smi``; the integrated ones share main memory, and count as none.

Written from the documented format and never run on such a machine:
https://intel.github.io/xpumanager/smi_user_guide.html#get-the-device-info-in-json-format
"""

from __future__ import annotations

import sys
from typing import Any

from mesh.hardware.ask import Ask, ask, read_json, whole
from mesh.hardware.sysfs import shown
from mesh.wire.facts import Device

MAX_DEVICES = 16


def devices(tool: Ask | None = None) -> tuple[Device, ...]:
    """Every GPU that Intel's tool knows, numbered as it numbers them."""
    if tool is None:
        if sys.platform != "linux" or all(gpu.vendor != "Intel" for gpu in shown()):
            return ()
        tool = ask
    found: list[Device] = []
    for entry in _entries(read_json(tool(["xpu-smi", "discovery", "-j"])))[:MAX_DEVICES]:
        number = entry.get("device_id")
        if isinstance(number, bool) or not isinstance(number, int):
            continue
        # The list names the devices; what they have is told of one at a time.
        detail = read_json(tool(["xpu-smi", "discovery", "-d", str(number), "-j"]))
        detail = detail if isinstance(detail, dict) else entry
        total = whole(detail.get("memory_physical_size_byte"))
        free = whole(detail.get("memory_free_size_byte")) or total
        name = str(detail.get("device_name") or entry.get("device_name") or "Intel GPU")
        if total:
            found.append(Device(f"SYCL{len(found)}", "sycl", name[:256], total, min(free, total)))
    return tuple(found)


def _entries(answer: Any) -> list[dict[str, Any]]:
    if isinstance(answer, dict):
        answer = answer.get("device_list")
    return [entry for entry in answer if isinstance(entry, dict)] if isinstance(answer, list) else []
