"""Hardware that a test makes up."""

from __future__ import annotations

from mesh.hardware.power_supply import Power
from mesh.hardware.sysfs import Shown
from mesh.wire.facts import Device


class FakeHardware:
    """Stands in for the module :mod:`mesh.hardware`: same questions."""

    def __init__(self, free_bytes: int = 8 << 30, *, threads: int = 2, devices: tuple[Device, ...] = ()) -> None:
        self.found = devices or (Device("CPU", "cpu", "a made-up processor", free_bytes, free_bytes),)
        self.cores = threads
        self.gpus: tuple[Shown, ...] = ()
        self.runs_on = Power()

    def devices(self) -> tuple[Device, ...]:
        return self.found

    def shown(self) -> tuple[Shown, ...]:
        return self.gpus

    def power(self) -> Power:
        return self.runs_on

    def threads(self) -> int:
        return self.cores
