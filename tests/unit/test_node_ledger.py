"""What a node keeps on a disk that fails for a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import StateError
from mesh.identity.key import NodeKey
from mesh.node import record as records
from mesh.node.record import Ledger, Record, found, load_record
from mesh.notice import Notice


class Disk:
    """Takes writes, or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        save = records.save_record

        def save_if_room(state_dir: Path, record: Record) -> None:
            if self.is_full:
                raise StateError("cannot write mesh.json: No space left on device", remedy="check the disk")
            save(state_dir, record)

        monkeypatch.setattr(records, "save_record", save_if_room)


def test_a_full_disk_is_told_of_once_and_what_it_did_not_take_is_written_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk, told = Disk(monkeypatch), list[Notice]()
    ledger = Ledger(tmp_path, told.append)
    record = found(NodeKey.generate(), "home", 0.0)
    ledger.write(record.at(3))
    disk.is_full = True
    for number in (4, 5):
        ledger.write(record.at(number))
    ledger.again()
    assert [(notice.kind, "this node goes on" in notice.text) for notice in told] == [("warning", True)]
    assert load_record(tmp_path) == record.at(3), "the old one is whole"
    disk.is_full = False
    ledger.again()
    assert load_record(tmp_path) == record.at(5)
    assert told[-1].kind == "change"
    ledger.again()
    assert len(told) == 2
