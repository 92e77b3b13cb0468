"""A build is done once, whole, or not at all. The compiler is a script; everything around it is real."""

from __future__ import annotations

import io
import json
import stat
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from mesh.engine import build, cache, source
from mesh.engine.build import build_engine
from mesh.engine.cache import BINARIES, VOCABULARIES, cache_key, cache_root, entry_dir, find_engine
from mesh.engine.pin import TREE
from mesh.engine.toolchain import BACKENDS, Toolchain, build_flags, find_toolchain
from mesh.errors import EngineError, UsageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for the compiler is a POSIX script")

COMPILER = """#!{python}
import pathlib, sys
args = sys.argv[1:]
if "-S" in args:
    sys.exit(0)
work = pathlib.Path(args[args.index("--build") + 1])
(work / "bin").mkdir(parents=True)
for n, name in enumerate(args[args.index("--target") + 1:]):
    print(f"[{{n + 1}}/3] Linking {{name}}", flush=True)
    (work / "bin" / name).write_text("#!/bin/sh\\n")
    (work / "bin" / name).chmod(0o755)
{then}
"""


class Watched:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[tuple[int, int, str]] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def advance(self, done: int, total: int, unit: str) -> None:
        self.steps.append((done, total, unit))


class Shop:
    """A cache of its own, a small source archive, and a compiler that does what it is told."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.builds = directory / "builds"
        self.cmake = directory / "cmake"
        archive = directory / "source.tar.gz"
        with tarfile.open(archive, "w:gz") as out:
            for name in (*(f"models/ggml-vocab-{v}.gguf" for v in VOCABULARIES), "CMakeLists.txt", "../../escape"):
                member = tarfile.TarInfo(str(TREE / name))
                member.size = len(name)
                out.addfile(member, io.BytesIO(name.encode()))
        monkeypatch.setenv("MESH_CACHE_DIR", str(directory / "cache"))
        monkeypatch.setattr(build, "patch_queue", tuple)
        monkeypatch.setattr(build, "fetch_source", lambda progress: archive)
        monkeypatch.setattr(build, "find_toolchain", lambda backend: Toolchain(self.cmake, directory / "ninja"))
        self.compiler()

    def compiler(self, then: str = "") -> None:
        counted = f"open({str(self.builds)!r}, 'a').write('x')\n{then}"
        self.cmake.write_text(COMPILER.format(python=sys.executable, then=counted))
        self.cmake.chmod(0o755)

    def built(self) -> int:
        return len(self.builds.read_text()) if self.builds.exists() else 0

    def debris(self) -> list[Path]:
        return list(cache_root().glob("building-*"))


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


def test_a_build_is_found_afterwards_and_not_repeated(shop: Shop) -> None:
    assert find_engine() is None
    seen = Watched()
    engine = build_engine(seen)
    assert engine == find_engine() == build_engine(Watched())
    assert shop.built() == 1
    assert seen.steps == [(1, 3, "targets"), (2, 3, "targets"), (3, 3, "targets")]
    assert {p.name for p in engine.dir.iterdir()} == {*BINARIES, "engine.json", "vocab"}
    assert engine.llama_server.stat().st_mode & stat.S_IXUSR
    assert engine.vocab("llama-spm").is_file()
    assert json.loads((engine.dir / "engine.json").read_text())["pin"] == engine.pin
    assert shop.debris() == []


def test_only_the_engines_tree_is_unpacked(shop: Shop, tmp_path: Path) -> None:
    build_engine(Watched())
    assert not list(tmp_path.rglob("escape"))


def test_two_builders_build_once(shop: Shop) -> None:
    both = [Watched(), Watched()]
    threads = [threading.Thread(target=build_engine, args=(seen,)) for seen in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert shop.built() == 1
    assert find_engine() is not None


def test_who_comes_second_is_told_of_the_wait(shop: Shop) -> None:
    gate = shop.builds.with_name("gate")
    shop.compiler(f"while not pathlib.Path({str(gate)!r}).exists(): pass")
    first = threading.Thread(target=build_engine, args=(Watched(),))
    first.start()
    while shop.built() == 0:
        assert first.is_alive()

    class Impatient(Watched):
        def phase(self, text: str) -> None:
            super().phase(text)
            gate.touch()

    second = Impatient()
    build_engine(second)
    first.join(30)
    assert "waiting" in second.phases[0]
    assert shop.built() == 1


def test_an_interrupted_build_is_no_engine_and_is_swept_by_the_next(shop: Shop) -> None:
    class Interrupts(Watched):
        def advance(self, done: int, total: int, unit: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(Interrupts())
    assert find_engine() is None
    (cache_root() / "building-killed").mkdir()
    build_engine(Watched())
    assert shop.debris() == []


def test_a_damaged_entry_is_not_an_engine_and_is_replaced(shop: Shop) -> None:
    engine = build_engine(Watched())
    engine.llama_server.write_text("")
    assert find_engine() is None
    assert build_engine(Watched()) == engine
    assert shop.built() == 2


def test_a_failed_compile_names_its_log_and_shows_the_end_of_it(shop: Shop) -> None:
    shop.compiler("print('sum.cpp: it does not add up'); sys.exit(3)")
    with pytest.raises(EngineError, match=r"exit 3(.|\n)*\.log(.|\n)*does not add up"):
        build_engine(Watched())
    assert find_engine() is None
    assert shop.debris() == []


def test_an_archive_that_is_not_the_pinned_one_is_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(version: str, sha256: str, directory: Path, progress: object) -> Path:
        (directory / "a").write_text("not it")
        return directory / "a"

    cache_root().mkdir(parents=True)
    monkeypatch.setattr(source, "download_source", wrong)
    with pytest.raises(EngineError, match="not the pinned one"):
        source.fetch_source(Watched())
    assert not list((cache_root() / "sources").iterdir())


def test_missing_tools_are_named_together_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "raspbian", "ID_LIKE": "debian"})
    with pytest.raises(EngineError, match=r"C\+\+ compiler; CMake.*Ninja") as caught:
        find_toolchain("cpu")
    assert caught.value.remedy is not None
    assert "apt install build-essential" in caught.value.remedy
    assert "pip install cmake ninja" in caught.value.remedy


def test_each_backend_has_an_entry_of_its_own() -> None:
    assert len({entry_dir(backend) for backend in BACKENDS}) == len(BACKENDS)
    with pytest.raises(UsageError, match="no backend"):
        build_flags("abacus")


def test_the_key_knows_pin_flags_system_and_processor() -> None:
    keys = {
        cache_key("p", ("f",), "s", "c"),
        cache_key("q", ("f",), "s", "c"),
        cache_key("p", ("g",), "s", "c"),
        cache_key("p", ("f",), "t", "c"),
        cache_key("p", ("f",), "s", "d"),
    }
    assert len(keys) == 5


def test_the_key_does_not_depend_on_kernel_flags_or_clock() -> None:
    before = ["cpu MHz\t: 2000.1", "flags\t\t: fpu avx2 fma ibrs", ""]
    after = ["cpu MHz\t: 3000.7", "flags\t\t: fma fpu avx2 retbleed", ""]
    other = ["flags\t\t: fpu avx2 fma avx512f"]
    assert cache._features_in(before) == cache._features_in(after) != cache._features_in(other)
