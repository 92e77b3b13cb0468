"""Where an engine really put its weights, from what it prints: asked for a GPU, it may compute on the processor. Pure.

``llama-server`` prints a line for each buffer it fills (at verbosity 4), ``ggml-rpc-server`` its devices as it starts.
"""

from __future__ import annotations

import re

from mesh.engine.devices import read_devices

_BUFFER = re.compile(r"load_tensors: +(?P<buffer>\S{1,64}) model buffer size = +(?P<mib>\d{1,9}\.\d{1,3}) MiB")
_OFFLOADED = re.compile(r"load_tensors: offloaded (?P<layers>\d{1,5})/\d{1,5} layers to GPU")
_LOCAL = re.compile(r"(?P<device>CPU|[A-Za-z]{1,16}\d{1,3})(?:_(?:Mapped|Private|REPACK|AMX|Split))?")
CPU = "CPU"


class Placement:
    """What one process of the engine has told so far."""

    def __init__(self) -> None:
        self._mib: dict[str, float] = {}
        self.offloaded: int | None = None
        """Layers that are not on this machine's processor, workers' too; None: not told."""

    def __str__(self) -> str:
        held = (f"{device} ({mib:.0f} MiB)" if mib else device for device, mib in self._mib.items())
        return ", ".join(held) or "its part on the processor"  # which is not told of: there is no other place

    def read(self, line: str) -> bool:
        """Take in a line of its output. Returns whether it told of a device."""
        if match := _BUFFER.search(line):
            device = _device_of(match["buffer"])
            if device is not None:
                self._mib[device] = self._mib.get(device, 0.0) + float(match["mib"])
            return device is not None
        if match := _OFFLOADED.search(line):
            self.offloaded = int(match["layers"])
            return True
        served = read_devices(line, CPU.lower())
        for entry in served:
            self._mib.setdefault(entry.name, 0.0)
        return bool(served)

    @property
    def devices(self) -> dict[str, float]:
        """MiB of weights on each device of this machine, as far as told; 0 for a worker's, which tells no amounts."""
        return dict(self._mib)

    def instead_of(self, asked: str) -> str:
        """What the weights are on, when none are on ``asked``; empty when all is well or nothing was told."""
        if not self._mib or asked in self._mib:
            return ""
        return max(self._mib, key=lambda device: self._mib[device])


def _device_of(buffer: str) -> str | None:
    """The device of this machine that a buffer is on; None for a worker's, which is named after its address."""
    if buffer.startswith("RPC"):
        return None
    if buffer.endswith("_Host"):
        return CPU  # main memory that a GPU can read: the processor's
    match = _LOCAL.fullmatch(buffer)
    return match["device"] if match is not None else None
