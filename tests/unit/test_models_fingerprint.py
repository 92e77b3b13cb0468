"""A fingerprint is the content's, is computed once, and survives a damaged cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mesh.errors import ModelError
from mesh.models import fingerprint as module
from mesh.models.fingerprint import FingerprintCache, cache_directory, fingerprint


@pytest.fixture
def cache(tmp_path: Path) -> FingerprintCache:
    return FingerprintCache(tmp_path / "cache")


def file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def never_read(done: int, total: int) -> None:
    raise AssertionError("the file was read again")


def test_shards_are_hashed_in_order_as_one_content(tmp_path: Path) -> None:
    one, two = file(tmp_path / "1", b"abc"), file(tmp_path / "2", b"def")
    assert fingerprint([one, two]) == hashlib.sha256(b"abcdef").hexdigest()
    assert fingerprint([two, one]) != fingerprint([one, two])


def test_progress_counts_all_shards_up_to_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    seen: list[tuple[int, int]] = []
    fingerprint(
        [file(tmp_path / "1", b"x" * 6), file(tmp_path / "2", b"y" * 4)], progress=lambda *step: seen.append(step)
    )
    assert seen == [(4, 10), (6, 10), (10, 10)]


def test_a_second_look_reads_nothing(tmp_path: Path, cache: FingerprintCache) -> None:
    path = file(tmp_path / "m", b"abc")
    first = fingerprint([path], cache=cache)
    assert fingerprint([path], cache=cache, progress=never_read) == first
    assert FingerprintCache(cache.directory).find(first) == (path,)


def test_a_changed_file_is_read_again(tmp_path: Path, cache: FingerprintCache) -> None:
    path = file(tmp_path / "m", b"abc")
    old = fingerprint([path], cache=cache)
    stat = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cache.find(old) is None
    assert fingerprint([path], cache=cache) == hashlib.sha256(b"abd").hexdigest()
    assert len(list(cache.directory.iterdir())) == 1


def test_a_vanished_file_is_not_found_by_its_fingerprint(tmp_path: Path, cache: FingerprintCache) -> None:
    path = file(tmp_path / "m", b"abc")
    known = fingerprint([path], cache=cache)
    path.unlink()
    assert cache.find(known) is None


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b'{"files": [], "fingerprint": "00"}', b'{"files": 3}', b"\xff\xfe"]
)
def test_a_damaged_cache_entry_is_only_a_miss(tmp_path: Path, cache: FingerprintCache, damage: bytes) -> None:
    path = file(tmp_path / "m", b"abc")
    first = fingerprint([path], cache=cache)
    (entry,) = cache.directory.iterdir()
    entry.write_bytes(damage)
    assert cache.find(first) is None
    assert fingerprint([path], cache=cache) == first
    assert cache.get([path]) == first


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    blocked = FingerprintCache(file(tmp_path / "file", b"") / "below")
    path = file(tmp_path / "m", b"abc")
    assert fingerprint([path], cache=blocked) == fingerprint([path])


def test_giving_up_half_way_remembers_nothing(tmp_path: Path, cache: FingerprintCache) -> None:
    path = file(tmp_path / "m", b"abc")
    with pytest.raises(AssertionError):
        fingerprint([path], cache=cache, progress=never_read)
    assert cache.get([path]) is None


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, cache: FingerprintCache) -> None:
    path = file(tmp_path / "m", b"abc")

    def grow(done: int, total: int) -> None:
        if done < 100:
            with path.open("ab") as out:
                out.write(b"more")

    with pytest.raises(ModelError, match="changed while it was read"):
        fingerprint([path], cache=cache, progress=grow)


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        fingerprint([tmp_path / "nothing"])


def test_the_cache_directory_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path / "fingerprints"
