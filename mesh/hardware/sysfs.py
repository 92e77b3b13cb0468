"""What Linux shows of graphics cards in ``/sys``; nothing elsewhere.

https://docs.kernel.org/gpu/drm-uapi.html and https://docs.kernel.org/PCI/sysfs-pci.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DRM = Path("/sys/class/drm")
PCI = Path("/sys/bus/pci/devices")
_CARD = re.compile(r"card\d{1,3}")
MAX_CARDS = 64
_VENDORS = {
    "0x10de": ("NVIDIA", ("cuda", "vulkan")),
    "0x1002": ("AMD", ("rocm", "vulkan")),
    "0x8086": ("Intel", ("sycl", "vulkan")),
}
"""Vendor id: who that is, and what the engine may be built with to use its GPUs, the better one first."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A GPU that the system shows, whether or not anything here can use it.

    Attributes:
        backends: what the engine may be built with to use it, the better one first.
        driver: the kernel driver bound to it; empty: none.
    """

    vendor: str
    description: str
    backends: tuple[str, ...]
    driver: str = ""


def cards(drm: Path = DRM) -> list[Path]:
    """One directory for each graphics card, in the order of its PCI address, as the vendors' libraries count."""
    try:
        found = [path for path in drm.iterdir() if _CARD.fullmatch(path.name)][:MAX_CARDS]
    except OSError:
        return []
    return sorted(found, key=lambda path: (_address(path), path.name))


def shown(pci: Path = PCI) -> tuple[Shown, ...]:
    """GPUs on the PCI bus of the three vendors whose GPUs the engine computes on."""
    found = []
    try:
        places = sorted(pci.iterdir())[:4096]
    except OSError:
        return ()
    for place in places:
        kind, vendor = read_text(place / "class"), read_text(place / "vendor")
        # 0x03....: display controllers, of which 0x0302 has no screen.
        if not kind.startswith("0x03") or vendor not in _VENDORS:
            continue
        name, backends = _VENDORS[vendor]
        driver = place / "driver"
        found.append(
            Shown(
                name,
                f"{name} GPU {read_text(place / 'device')} at {place.name}",
                backends,
                driver.resolve().name if driver.exists() else "",
            )
        )
    return tuple(found)


def read_text(path: Path) -> str:
    """One short file, stripped; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4096).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _address(card: Path) -> str:
    try:
        return (card / "device").resolve().name
    except OSError:
        return ""
