"""What a node keeps on disk: who holds the directory, and how it belongs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest

from mesh.errors import StateError
from mesh.identity.grants import sign_grant
from mesh.identity.key import NodeKey
from mesh.membership.core import BOOT_SHIFT, MAX_INCARNATION
from mesh.membership.join import JoinResult
from mesh.node.record import Record, forget_record, found, from_join, load_record, save_record
from mesh.node.statedir import (
    RUNNING_FILE,
    Running,
    StateDir,
    command_for,
    find_process,
    find_running,
    this_process,
    write_running,
)

FOUNDER = NodeKey.from_seed(bytes(32))
GUEST = NodeKey.from_seed(bytes([1]) * 32)
WALL = 1_700_000_000.0


def test_a_directory_is_held_by_one_node_at_a_time(tmp_path: Path) -> None:
    with StateDir(tmp_path / "a"), pytest.raises(StateError, match="in use by a running node") as refused:
        StateDir(tmp_path / "a").__enter__()
    assert refused.value.remedy is not None
    assert f"mesh down --state-dir {tmp_path / 'a'}" in refused.value.remedy
    with StateDir(tmp_path / "a"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_a_directory_is_its_owners_alone(tmp_path: Path) -> None:
    with StateDir(tmp_path / "deep" / "a"):
        assert (tmp_path / "deep" / "a").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "deep" / "a" / RUNNING_FILE).stat().st_mode & 0o777 == 0o600


def test_a_node_that_still_prepares_is_found_but_not_asked(tmp_path: Path) -> None:
    with StateDir(tmp_path):
        process = find_process(tmp_path)
        assert process is not None
        assert process.pid == os.getpid()
        with pytest.raises(StateError, match="still preparing") as refused:
            find_running(tmp_path)
        assert refused.value.code == "starting"


def test_a_node_that_answers_is_found_until_it_is_gone(tmp_path: Path) -> None:
    with StateDir(tmp_path):
        here = this_process("http://127.0.0.1:1", "secret")
        write_running(tmp_path, here)
        assert find_running(tmp_path) == here
    with pytest.raises(StateError, match="no node is running"):
        find_running(tmp_path)


@pytest.mark.parametrize(
    "running",
    [
        Running(2**22 + 7, "a start", "http://127.0.0.1:1", "x"),
        Running(os.getpid(), "another start", "http://127.0.0.1:1", "x"),
    ],
    ids=["no such process", "another program has its number"],
)
def test_what_a_killed_node_left_is_not_taken_for_a_node(tmp_path: Path, running: Running) -> None:
    write_running(tmp_path, running)
    assert find_process(tmp_path) is None
    with pytest.raises(StateError, match="no node is running"):
        find_running(tmp_path)


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    (tmp_path / RUNNING_FILE).write_text("{")
    (tmp_path / RUNNING_FILE).chmod(0o600)
    with pytest.raises(StateError, match="damaged"):
        find_running(tmp_path)


def test_a_command_names_its_directory_only_when_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if sys.platform.startswith("linux"):
        assert command_for(tmp_path / "mesh", "down") == "mesh down"
    assert command_for(tmp_path / "b", "down") == f"mesh down --state-dir {tmp_path / 'b'}"


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    assert load_record(tmp_path) is None
    record = found(FOUNDER, "home", WALL).at(7)
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record
    forget_record(tmp_path)
    forget_record(tmp_path)
    assert load_record(tmp_path) is None


def test_a_record_of_an_older_version_is_still_read(tmp_path: Path) -> None:
    old = msgspec.to_builtins(found(FOUNDER, "home", WALL))
    del old["expelled"]
    (tmp_path / "mesh.json").write_bytes(msgspec.json.encode(old))
    (tmp_path / "mesh.json").chmod(0o600)
    loaded = load_record(tmp_path)
    assert loaded is not None
    assert not loaded.expelled


def test_the_founder_belongs() -> None:
    record = found(FOUNDER, "home", WALL)
    assert record.mesh == FOUNDER.id
    assert record.roster().role_of(FOUNDER.public, WALL) == "worker"


def test_a_mesh_is_ours_alone_until_somebody_was_let_in() -> None:
    record = found(FOUNDER, "home", WALL)
    assert record.is_only(FOUNDER)
    assert not record.is_only(GUEST)
    invited = sign_grant(FOUNDER, mesh=record.mesh, subject=GUEST.public, role="client", wall=WALL)
    shared: Record = msgspec.structs.replace(record, grants=(*record.grants, invited))
    assert not shared.is_only(FOUNDER)


def test_runs_of_a_node_are_told_apart_whatever_its_wall_clock_does() -> None:
    """Two runs within a second had one number, and a clock that was set back gave a smaller one."""
    record = found(FOUNDER, "home", WALL)
    first = record.started(WALL + 0.100)
    again = first.started(WALL + 0.350)
    back = again.started(WALL - 7200)
    assert record.boot < first.boot < again.boot < back.boot
    assert back.boot << BOOT_SHIFT < MAX_INCARNATION


def test_who_is_let_in_again_remembers_what_it_followed() -> None:
    """An expelled node came back with epoch nought, and would have followed what the mesh had left behind."""
    mine = sign_grant(FOUNDER, mesh=FOUNDER.id, subject=GUEST.public, role="worker", wall=WALL)
    joined = JoinResult(FOUNDER.id, "home", FOUNDER.public, (mine,), (), FOUNDER.id, "")
    before = from_join(joined).started(WALL).at(7).without_us()
    after = from_join(joined, before)
    assert (after.epoch, after.boot, after.expelled) == (7, before.boot, False)
    other = from_join(joined, Record("b" * 26, "other", FOUNDER.public, (), epoch=9, boot=5))
    assert (other.epoch, other.boot) == (0, 0), "another mesh counts for itself"
