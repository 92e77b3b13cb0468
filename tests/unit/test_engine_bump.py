"""The pin is moved on small sources: git, patches and archives are real, nothing is fetched."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from mesh.engine import cache
from mesh.engine.patching import apply_patch, parse_patch
from mesh.engine.pin import SHA256, VERSION, Patch, read_queue, tree_in_archive
from mesh.engine.source import sha256_of
from mesh.errors import EngineError, MeshError, UsageError
from workshop import engine_bump
from workshop.bump import Move, checked_version, open_queue, repinned
from workshop.repository import BASE, GitError, Repository, add_patches, begin, export, message_of, write_queue

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")

BODY = "".join(f"line {n}\n" for n in range(1, 31))
HEADER = (
    "#define RPC_PROTO_MAJOR_VERSION    7\n#define RPC_PROTO_MINOR_VERSION    0\n#define RPC_PROTO_PATCH_VERSION    0\n"
)
OLD = {"a.cpp": BODY, "b.cpp": BODY, ".gitignore": "*.log\n", "kept.log": "kept\n", "ggml/include/ggml-rpc.h": HEADER}


def archive(directory: Path, version: str, files: dict[str, str]) -> Path:
    path = directory / f"llama_cpp_python-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        for name, text in files.items():
            member = tarfile.TarInfo(str(tree_in_archive(version) / name))
            member.size = len(text.encode())
            out.addfile(member, io.BytesIO(text.encode()))
    return path


def commit(root: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (root / name).write_text(text)
    Repository(root).commit(message)


class Bench:
    """A checkout with a queue of three patches on version 1.0, and what a person types in it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.checkout = directory / "checkout"
        self.scratch = directory / "scratch"
        self.pin = self.checkout / "mesh" / "engine" / "pin.py"
        self.pin.parent.mkdir(parents=True)
        self.pin.write_text('"""Pin."""\nVERSION = "1.0"\nSHA256 = "00"\n')
        (self.checkout / "patches").mkdir()
        (self.checkout / "patches" / "series").write_text("# in this order\n")
        self.old = archive(directory, "1.0", OLD)
        self.make_queue()
        monkeypatch.setattr(engine_bump, "CHECKOUT", self.checkout)
        monkeypatch.setattr(engine_bump, "VERSION", "1.0")
        monkeypatch.setattr(engine_bump, "fetch_source", lambda progress: self.old)
        monkeypatch.setattr(engine_bump, "patch_queue", lambda: read_queue(self.checkout / "patches"))

    def make_queue(self) -> None:
        root = self.directory / "made"
        repository = open_queue(root, self.old, "1.0", ())
        first = BODY.replace("line 3\n", "line three\n")
        commit(root, {"a.cpp": first}, "first: say three\n\nWhy: numbers are words.\nMeasured: nothing.\n")
        second = first.replace("line 4\n", "line four\n")
        commit(root, {"a.cpp": second, "new.cpp": "new\n"}, "second: and four\n\nWhy: as before.\n")
        commit(root, {"b.cpp": BODY.replace("line 20\n", "")}, "third: no twenty\n\nWhy: enough.\n")
        write_queue(export(repository), self.checkout / "patches")

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and what was said; a MeshError becomes its message."""
        result = CliRunner().invoke(engine_bump.command, [*arguments, *self.place(arguments)])
        if isinstance(result.exception, MeshError):
            return result.exception.exit_code, str(result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    def place(self, arguments: tuple[str, ...]) -> list[str]:
        return [] if "--open" in arguments or "--export" in arguments else ["--scratch", str(self.scratch)]

    def move(self, files: dict[str, str]) -> tuple[int, str]:
        return self.run("1.1", "--archive", str(archive(self.directory, "1.1", files)))

    def patches(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.checkout / "patches").glob("*.patch")}

    def result(self, version: str, files: dict[str, str]) -> Path:
        """A source with the queue applied to it, exactly."""
        tree = self.directory / f"applied-{version}"
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        for patch in read_queue(self.checkout / "patches"):
            apply_patch(tree, patch)
        return tree


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_the_queue_becomes_a_repository_and_the_same_files_again(bench: Bench) -> None:
    before = bench.patches()
    assert list(before) and all(text.startswith("Subject: ") for text in before.values())
    code, said = bench.run("--open", str(bench.directory / "tree"))
    assert code == 0, said
    log = Repository(bench.directory / "tree").git("log", "--format=%s", f"{BASE}..HEAD").split("\n")
    assert log[:3] == ["third: no twenty", "second: and four", "first: say three"]
    assert bench.run("--export", str(bench.directory / "tree")) == (0, "nothing changed\n")
    assert bench.patches() == before


def test_a_changed_a_new_and_a_dropped_commit_are_a_changed_a_new_and_a_dropped_file(bench: Bench) -> None:
    tree = bench.directory / "tree"
    bench.run("--open", str(tree))
    repository = Repository(tree)
    repository.git("reset", "--hard", "HEAD~1")  # the third goes
    commit(tree, {"new.cpp": "newer\n"}, "Rpc: a fourth, with a Name!\n\nWhy: to see.\n")
    code, said = bench.run("--export", str(tree))
    assert code == 0
    assert said.split() == [
        "patches/0003-rpc-a-fourth-with-a-name.patch",
        "patches/0003-third-no-twenty.patch",
        "patches/series",
    ]
    assert sorted(bench.patches()) == [
        "0001-first-say-three.patch", "0002-second-and-four.patch", "0003-rpc-a-fourth-with-a-name.patch"
    ]  # fmt: skip
    series = (bench.checkout / "patches" / "series").read_text().splitlines()
    assert series == ["# in this order", *sorted(bench.patches())]
    assert (bench.result("1.0", OLD) / "new.cpp").read_text() == "newer\n"


def test_what_is_not_committed_is_not_silently_left_out(bench: Bench) -> None:
    tree = bench.directory / "tree"
    bench.run("--open", str(tree))
    (tree / "a.cpp").write_text("changed\n")
    code, said = bench.run("--export", str(tree))
    assert code == 1 and "in no commit" in said


def test_a_source_that_changed_elsewhere_takes_the_queue_exactly(bench: Bench) -> None:
    before = bench.patches()
    files = OLD | {"c.cpp": "unrelated\n"}
    code, said = bench.move(files)
    assert code == 0, said
    assert said.count("applies exactly") == 3 and "merged" not in said
    assert bench.patches() == before
    assert 'VERSION = "1.1"' in bench.pin.read_text()
    assert f'SHA256 = "{sha256_of(bench.directory / "llama_cpp_python-1.1.tar.gz")}"' in bench.pin.read_text()
    assert "RPC protocol" not in said


def test_a_patch_whose_place_moved_is_merged_and_the_hunk_is_named(bench: Bench) -> None:
    files = OLD | {"a.cpp": "line 0\n" + BODY, "ggml/include/ggml-rpc.h": HEADER.replace("    7", "    8")}
    code, said = bench.move(files)
    assert code == 0, said
    assert "first: say three: merged (a.cpp: hunk at line 1 does not match)" in said
    assert "third: no twenty: applies exactly" in said
    assert "RPC protocol 7.0.0 -> 8.0.0" in said
    text = (bench.result("1.1", files) / "a.cpp").read_text()
    assert text.startswith("line 0\nline 1\nline 2\nline three\nline four\nline 5\n")
    assert "Measured: nothing." in bench.patches()["0001-first-say-three.patch"]


def test_a_conflict_is_left_to_a_person_and_gone_on_from(bench: Bench) -> None:
    files = OLD | {"a.cpp": BODY.replace("line 3\n", "line III\n")}
    before = bench.patches()
    code, said = bench.move(files)
    assert code == 1
    assert "first: say three: CONFLICT (a.cpp: hunk at line 1 does not match)" in said
    assert "Resolve a.cpp in " in said and "--continue" in said
    assert bench.patches() == before, "nothing is written before all is merged"

    code, said = bench.run("--continue")
    assert code == 1 and "not resolved yet" in said and "a.cpp" in said
    Repository(bench.scratch).git("add", "a.cpp")  # with its marks
    code, said = bench.run("--continue")
    assert code == 1 and "not resolved yet" in said

    (bench.scratch / "a.cpp").write_text(BODY.replace("line 3\n", "line III, three\n"))
    Repository(bench.scratch).git("add", "a.cpp")
    code, said = bench.run("--continue")
    assert code == 1 and "second: and four: CONFLICT" in said
    (bench.scratch / "a.cpp").write_text(
        BODY.replace("line 3\n", "line III, three\n").replace("line 4\n", "line four\n")
    )
    Repository(bench.scratch).git("add", "a.cpp")
    code, said = bench.run("--continue")
    assert code == 0, said
    assert "third: no twenty: applies exactly" in said
    assert "line III, three\nline four\n" in (bench.result("1.1", files) / "a.cpp").read_text()
    assert "Why: numbers are words." in bench.patches()["0001-first-say-three.patch"]
    assert 'VERSION = "1.1"' in bench.pin.read_text()


def test_a_resolution_committed_by_hand_counts_too(bench: Bench) -> None:
    bench.move(OLD | {"b.cpp": BODY.replace("line 20\n", "line XX\n")})
    (bench.scratch / "b.cpp").write_text(BODY.replace("line 20\n", ""))
    repository = Repository(bench.scratch)
    repository.git("add", "b.cpp")
    repository.git("-c", "core.editor=true", "cherry-pick", "--continue")
    code, said = bench.run("--continue")
    assert code == 0, said
    assert len(bench.patches()) == 3


def test_a_source_without_a_file_that_is_patched_is_a_conflict(bench: Bench) -> None:
    code, said = bench.move({name: text for name, text in OLD.items() if name != "b.cpp"})
    assert code == 1 and "CONFLICT (b.cpp is gone)" in said


@pytest.mark.parametrize("text", ["", "latest", "1", "1.2; rm", "-1.0", "../1.0"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a version"):
        checked_version(text)


@pytest.mark.parametrize("text", ["0.3.37", "1.0", "1.0rc2"])
def test_versions_are_versions(text: str) -> None:
    assert checked_version(text) == text


def test_an_archive_with_another_hash_is_refused(bench: Bench) -> None:
    path = archive(bench.directory, "1.1", OLD)
    code, said = bench.run("1.1", "--archive", str(path), "--sha256", "ab" * 32)
    assert code == 1 and f"has SHA-256 {sha256_of(path)}, not abab" in said
    assert not bench.scratch.exists()
    code, _ = bench.run("1.1", "--archive", str(path), "--sha256", sha256_of(path).upper())
    assert code == 0


def test_an_archive_that_is_something_else_is_refused(bench: Bench) -> None:
    path = archive(bench.directory, "9.9", OLD)
    code, said = bench.run("1.1", "--archive", str(path))
    assert code == 1 and "holds no llama_cpp_python-1.1/vendor/llama.cpp" in said
    code, said = bench.run("1.2", "--archive", str(bench.directory / "nowhere.tar.gz"))
    assert code != 0


def test_an_unfinished_move_is_not_overwritten(bench: Bench) -> None:
    bench.scratch.mkdir()
    (bench.scratch / "mine").write_text("work")
    code, said = bench.move(OLD)
    assert code == 2 and "an earlier move was not finished" in said and "--continue" in said
    code, said = bench.run("--continue")
    assert code == 2 and "no move of the pin was begun" in said
    code, said = bench.run("--open", str(bench.scratch))
    assert code == 2 and "is not empty" in said
    assert (bench.scratch / "mine").read_text() == "work"


def test_one_thing_at_a_time(bench: Bench) -> None:
    assert bench.run()[0] == 2
    assert bench.run("1.1", "--continue")[0] == 2
    assert bench.run("1.0") == (2, "the pin is at 1.0 already\n       bin/engine-bump --open DIRECTORY shows its queue")


def test_without_git_it_is_said_what_to_install(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(bench.directory))
    code, said = bench.run("--open", str(bench.directory / "tree"))
    assert code == 1 and "git is needed" in said and "install git" in said


def test_nobodys_git_settings_matter(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = bench.directory / "gitconfig"
    settings.write_text("[diff]\nnoprefix = true\ncontext = 0\n[core]\nautocrlf = true\n[commit]\ngpgsign = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_DIR", str(bench.directory / "elsewhere"))
    bench.run("--open", str(bench.directory / "tree"))
    assert bench.run("--export", str(bench.directory / "tree")) == (0, "nothing changed\n")


def test_a_header_is_a_message_word_for_word() -> None:
    patch = Patch("0007-x-y.patch", b"Subject: rpc: x\nWhy: a\n     b\nMeasured: 1\n\ndiff --git a/x b/x\n")
    assert message_of(patch) == "rpc: x\n\nWhy: a\n     b\nMeasured: 1\n\nPatch-name: x-y.patch\n"


def test_a_commit_that_deletes_a_file_is_no_patch(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a\n")
    repository = begin(tmp_path, "base")
    (tmp_path / "a").unlink()
    repository.commit("gone\n\nWhy: why not.\n")
    with pytest.raises(GitError, match="cannot be a patch: patches delete no files"):
        export(repository)


def test_the_pin_is_changed_where_it_is_and_nowhere_else() -> None:
    text = (Path(engine_bump.__file__).parents[1] / "mesh" / "engine" / "pin.py").read_text()
    changed = repinned(text, Move("9.9.9", "ff", "7.0.0"))
    assert changed.replace('"9.9.9"', f'"{VERSION}"').replace('"ff"', f'"{SHA256}"') == text
    with pytest.raises(EngineError, match="0 lines that set VERSION"):
        repinned("SHA256 = '1'\n", Move("9.9.9", "ff", "7.0.0"))


def test_the_command_is_there_and_teaches() -> None:
    checkout = Path(engine_bump.__file__).parents[1]
    assert os.access(checkout / "bin" / "engine-bump", os.X_OK)
    said = CliRunner().invoke(engine_bump.command, ["--help"]).output
    for word in ("--open", "--export", "--continue", "Patch-name:", "engine-base"):
        assert word in said


# The real queue, when its source is at hand: header and difference of every patch survive the way there and back.
def test_this_versions_queue_survives_being_opened_and_exported(tmp_path: Path) -> None:
    kept = cache.cache_root() / "sources" / f"llama_cpp_python-{VERSION}.tar.gz"
    if not kept.is_file():
        pytest.skip("the engine's source is not in the cache: mesh engine build")
    queue = read_queue(Path(engine_bump.__file__).parents[1] / "patches")
    changes = [change for patch in queue for change in parse_patch(patch.content)]
    touched = {str(tree_in_archive(VERSION) / change.path): tmp_path / "tree" / change.path for change in changes}
    with tarfile.open(kept, "r|gz") as members:
        for member in members:
            if target := touched.get(member.name):
                content = members.extractfile(member)
                assert content is not None
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    repository = begin(tmp_path / "tree", "the files that the queue touches")
    add_patches(repository, queue)
    assert export(repository) == queue
