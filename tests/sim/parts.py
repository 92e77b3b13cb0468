"""Which cores a simulation runs: the real ones, or real ones with one bug planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesh.election.core import Election
from mesh.identity.invite import InviteBook
from mesh.membership.core import Membership
from mesh.proxy.core import Core
from mesh.supervise.core import EngineCore
from tests.sim.admission import Disk, DiskBook


@dataclass(frozen=True)
class Parts:
    membership: Callable[..., Membership] = Membership
    election: Callable[..., Election] = Election
    engine: Callable[..., EngineCore] = EngineCore
    proxy: Callable[..., Core] = Core
    book: Callable[[Disk], InviteBook] = DiskBook
    fences_engines: bool = True
    """A worker's process is reached in its own epoch only, whatever the election thinks."""


REAL = Parts()
