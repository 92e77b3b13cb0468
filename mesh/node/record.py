"""What a node keeps of its mesh between two runs: how it belongs, whom it knows, and the last epoch it followed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from mesh.errors import StateError
from mesh.identity.grants import Roster, found_mesh
from mesh.identity.key import NodeKey
from mesh.identity.store import load, save
from mesh.membership.join import JoinResult
from mesh.notice import Notice
from mesh.wire.facts import MeshId
from mesh.wire.messages import Grant, MemberAddress, Revocation

RECORD_FILE = "mesh.json"
log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """One mesh this node belongs to."""

    mesh: MeshId
    name: str
    founder: bytes
    grants: tuple[Grant, ...]
    revocations: tuple[Revocation, ...] = ()
    members: tuple[MemberAddress, ...] = ()
    epoch: int = 0
    """The highest epoch number followed: never to be followed back."""
    boot: int = 0
    """The number of the last run of this node, see :meth:`started`."""
    expelled: bool = False
    """The mesh threw this node out: only a new invite opens it again."""

    def roster(self) -> Roster:
        return Roster(self.mesh, self.founder, self.grants, self.revocations)

    def grown(self, roster: Roster, members: tuple[MemberAddress, ...]) -> Record:
        """With what was learned of who belongs and where they are."""
        return msgspec.structs.replace(self, grants=roster.grants, revocations=roster.revocations, members=members)

    def at(self, epoch: int) -> Record:
        return msgspec.structs.replace(self, epoch=epoch)

    def started(self, wall: float) -> Record:
        """For one more run: ``boot`` is the wall clock in milliseconds, but larger than before if the clock is not."""
        return msgspec.structs.replace(self, boot=max(int(wall * 1000), self.boot + 1))

    def without_us(self) -> Record:
        """After we were thrown out."""
        return msgspec.structs.replace(self, expelled=True)

    def is_only(self, key: NodeKey) -> bool:
        """Did this node found the mesh, and has nobody else ever been let in? Leaving it loses nothing."""
        return self.founder == key.public and all(grant.subject == key.public for grant in self.grants)


def found(key: NodeKey, name: str, wall: float) -> Record:
    """A new mesh around this node."""
    return Record(mesh=key.id, name=name, founder=key.public, grants=(found_mesh(key, wall),))


def from_join(joined: JoinResult, before: Record | None = None) -> Record:
    """The mesh that let us in. ``before``: what we kept, when we were in it once and were thrown out."""
    fresh = Record(joined.mesh, joined.mesh_name, joined.founder, joined.grants, members=joined.members)
    if before is None or before.mesh != fresh.mesh:
        return fresh
    return msgspec.structs.replace(fresh, epoch=before.epoch, boot=before.boot)


def load_record(state_dir: Path) -> Record | None:
    """Raises:
    StateError: there is one, but it cannot be read.
    """
    return load(state_dir / RECORD_FILE, Record)


def save_record(state_dir: Path, record: Record) -> None:
    save(state_dir / RECORD_FILE, record)


class Ledger:
    """Keeps a running node's record on its disk.

    A disk that takes nothing, a full one say, costs what should have been written, not the node: a person is told once,
    and :meth:`again` tries anew. Until then a crash would bring back an older record.

    Args:
        tell: shows a notice to people.
    """

    def __init__(self, state_dir: Path, tell: Callable[[Notice], None]) -> None:
        self._state_dir = state_dir
        self._tell = tell
        self._unwritten: Record | None = None

    def write(self, record: Record) -> None:
        """Put ``record`` on disk, now or later."""
        failed_before = self._unwritten is not None
        try:
            save_record(self._state_dir, record)
        except StateError as error:
            self._unwritten = record
            log.warning("%s", error.message)
            if not failed_before:
                text = f"{error.message}; this node goes on, and tries again until it can"
                self._tell(Notice("warning", text, {"remedy": error.remedy}))
            return
        self._unwritten = None
        if failed_before:
            self._tell(Notice("change", f"{self._state_dir} can be written again; nothing is lost"))

    def again(self) -> None:
        """Try to write what could not be written."""
        if self._unwritten is not None:
            self.write(self._unwritten)


def forget_record(state_dir: Path) -> None:
    """Leave for good: only the key stays."""
    (state_dir / RECORD_FILE).unlink(missing_ok=True)
