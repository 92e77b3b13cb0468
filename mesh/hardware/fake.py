"""Hardware that a test makes up."""

from __future__ import annotations

from mesh.wire.facts import Device


class FakeHardware:
    """Stands in for the module :mod:`mesh.hardware`: same two questions."""

    def __init__(self, free_bytes: int = 8 << 30, *, threads: int = 2, devices: tuple[Device, ...] = ()) -> None:
        self.found = devices or (Device("CPU", "cpu", "a made-up processor", free_bytes, free_bytes),)
        self.cores = threads

    def devices(self) -> tuple[Device, ...]:
        return self.found

    def threads(self) -> int:
        return self.cores
