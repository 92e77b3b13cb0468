"""Old engines leave the cache; what is current, lately used or running stays."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import filelock
import pytest

from mesh.engine.build import build_engine, tidy
from mesh.engine.cache import RECORD, cache_root, find_engine
from mesh.engine.prune import KEPT, mark_used, prune
from tests.unit.test_engine_build import Shop, Watched
from tests.unit.test_engine_build import shop as shop


def entry(root: Path, number: int, *, kind: str = "cpu", used_at: int | None = None, size: int = 1000) -> Path:
    path = root / f"{kind}-{number:016x}"
    path.mkdir(parents=True)
    (path / RECORD).write_text("{}")
    (path / "llama-server").write_bytes(bytes(size))
    at = number if used_at is None else used_at
    os.utime(path, (at, at))
    return path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_of_each_kind_the_last_used_stay(tmp_path: Path) -> None:
    entries = [entry(tmp_path, n) for n in range(1, 6)]
    checked = [entry(tmp_path, n, kind="checked") for n in range(1, 3)]
    gone = prune(tmp_path, current=[], running=list)
    assert {removed.name for removed in gone} == {path.name for path in entries[: 5 - KEPT]}
    assert all(removed.bytes >= 1000 for removed in gone)
    assert names(tmp_path) == sorted(path.name for path in (*entries[5 - KEPT :], *checked))


def test_the_current_one_stays_however_old(tmp_path: Path) -> None:
    entries = [entry(tmp_path, n) for n in range(1, 5)]
    prune(tmp_path, current=entries[:1], running=list)
    assert entries[0].exists() and not entries[1].exists()


def test_one_that_runs_stays(tmp_path: Path) -> None:
    entries = [entry(tmp_path, n) for n in range(1, 5)]
    prune(tmp_path, current=[], running=lambda: [entries[0] / "llama-server", Path("/usr/bin/python3")])
    assert entries[0].exists() and not entries[1].exists()


def test_what_is_no_entry_is_left_alone(tmp_path: Path) -> None:
    for n in range(1, 6):
        entry(tmp_path, n)
    for other in ("sources", "logs", "building-x", "cpu-notes", "cpu-123"):
        (tmp_path / other).mkdir()
    (tmp_path / "cpu-ffffffffffffffff").mkdir()  # without a record: half a copy, or somebody's own
    prune(tmp_path, current=[], running=list)
    assert {"sources", "logs", "building-x", "cpu-notes", "cpu-123", "cpu-ffffffffffffffff"} <= set(names(tmp_path))


def test_an_empty_cache_is_no_trouble(tmp_path: Path) -> None:
    assert prune(tmp_path / "none", current=[], running=list) == ()


def test_starting_an_engine_keeps_it(shop: Shop) -> None:
    engine = build_engine(Watched())
    os.utime(engine.dir, (1, 1))
    mark_used(engine)
    assert engine.dir.stat().st_mtime > 1e9


def test_a_build_removes_what_is_old_and_says_so(shop: Shop) -> None:
    root = cache_root()
    for n in range(1, KEPT + 3):
        entry(root, n)
    seen = Watched()
    engine = build_engine(seen)
    assert find_engine() == engine
    assert [phase for phase in seen.phases if "removed an engine" in phase and "0000001" in phase]
    assert len(list(root.glob("cpu-*"))) == KEPT + 1
    assert shop.debris() == []


def test_nothing_is_removed_while_somebody_builds(shop: Shop) -> None:
    root = cache_root()
    for n in range(1, KEPT + 3):
        entry(root, n)
    held, done = threading.Event(), threading.Event()

    def build() -> None:
        with filelock.FileLock(root / "build.lock"):
            held.set()
            done.wait(10)

    builder = threading.Thread(target=build)
    builder.start()
    assert held.wait(10)
    tidy(Watched())
    assert len(names(root)) >= KEPT + 2
    done.set()
    builder.join()
    tidy(Watched())
    assert len(list(root.glob("cpu-*"))) == KEPT


@pytest.mark.parametrize("interrupted", ["building-removed-abc"])
def test_a_removal_that_was_interrupted_is_swept(shop: Shop, interrupted: str) -> None:
    half = cache_root() / interrupted / "cpu-0000000000000001"
    half.mkdir(parents=True)
    build_engine(Watched())
    assert shop.debris() == []
