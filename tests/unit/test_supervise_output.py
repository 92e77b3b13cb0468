"""What the engine prints, bounded in every direction; and what is importable where it cannot run."""

from __future__ import annotations

import ctypes
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import EngineError
from mesh.supervise.launch import child_environment
from mesh.supervise.output import MAX_LINE, TAIL_LINES, Output, RotatingLog
from mesh.supervise.windows import (
    EXTENDED_LIMIT_INFORMATION,
    JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE,
    ExtendedLimits,
    Job,
)


def test_a_full_log_moves_on_and_the_oldest_is_dropped(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "logs" / "x.log", max_bytes=100, keep=3)
    for n in range(50):
        log.write(b"%08d\n" % n)
    log.close()
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["x.log", "x.log.1", "x.log.2"]
    assert all(file.stat().st_size <= 100 for file in files)
    lines = [line for file in (files[2], files[1], files[0]) for line in file.read_text().split()]
    assert lines == [f"{n:08d}" for n in range(50 - len(lines), 50)]


def test_a_log_goes_on_where_the_last_run_ended(tmp_path: Path) -> None:
    for word in (b"one\n", b"two\n"):
        log = RotatingLog(tmp_path / "x.log")
        log.write(word)
        log.close()
    assert (tmp_path / "x.log").read_bytes() == b"one\ntwo\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_only_its_owner_reads_a_log(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "x.log")
    log.write(b"prompt\n")
    log.close()
    assert stat.S_IMODE((tmp_path / "x.log").stat().st_mode) == 0o600


def test_a_log_that_cannot_be_written_does_not_stop_the_engine(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the directory should be")
    Output(RotatingLog(tmp_path / "logs" / "x.log")).feed(2, b"hello\n")


def test_progress_is_read_from_stdout_and_kept_out_of_the_log(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    output = Output(RotatingLog(tmp_path / "x.log"), lambda done, total: seen.append((done, total)))
    output.feed(1, b"hello\nmesh-load 5 1")
    output.feed(1, b"00\r\nmesh-load x 1\nmesh-load 1 99999999999999999999\n")
    output.feed(2, b"mesh-load 6 100\n")
    assert seen == [(5, 100)]
    assert output.tail == ("hello", "mesh-load x 1", "mesh-load 1 99999999999999999999", "mesh-load 6 100")


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=9000)), max_size=8))
def test_no_output_of_any_shape_grows_the_tail_or_loses_the_log(pieces: list[tuple[int, bytes]]) -> None:
    class Kept:
        data = b""

        def write(self, data: bytes) -> None:
            self.data += data

    kept = Kept()
    output = Output(kept)  # type: ignore[arg-type]
    for descriptor, data in pieces:
        output.feed(descriptor, data)
    output.end()
    assert len(output.tail) <= TAIL_LINES
    assert all(len(line) <= MAX_LINE and line.isprintable() for line in output.tail)
    total = sum(len(data) for _, data in pieces)
    assert len(kept.data.replace(b"\n", b"")) == total - sum(data.count(b"\n") for _, data in pieces)


def test_the_engine_sees_our_environment_but_nothing_that_steers_it() -> None:
    own = {"PATH": "/bin", "LLAMA_ARG_PORT": "1", "MESH_SECRET": "x", "AIP_HTTP_PORT": "2", "llama_arg_mmap": "0"}
    assert child_environment(own, {"LLAMA_API_KEY": "k"}) == {
        "PATH": "/bin",
        "GGML_NO_BACKTRACE": "1",
        "LLAMA_API_KEY": "k",
    }


class FakeKernel32:
    """Remembers calls; ``refuse`` names one that fails."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            return 0 if name == self.refuse else 7

        return call


def test_a_job_kills_its_processes_when_its_last_handle_closes() -> None:
    kernel32 = FakeKernel32()
    Job(kernel32).add(1234)
    names = [name for name, _ in kernel32.calls]
    assert names == [
        "CreateJobObjectW",
        "SetInformationJobObject",
        "OpenProcess",
        "AssignProcessToJobObject",
        "CloseHandle",
    ]
    _, what, pointer, size = kernel32.calls[1][1]
    assert what == EXTENDED_LIMIT_INFORMATION
    assert pointer._obj.basic.limit_flags & JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
    assert size == ctypes.sizeof(ExtendedLimits)


@pytest.mark.parametrize(
    "refuse", ["CreateJobObjectW", "SetInformationJobObject", "OpenProcess", "AssignProcessToJobObject"]
)
def test_a_refusal_of_windows_is_an_engine_error(refuse: str) -> None:
    with pytest.raises(EngineError, match="Windows did not let mesh"):
        Job(FakeKernel32(refuse)).add(1)


@pytest.mark.skipif(sys.maxsize < 2**32, reason="64-bit layout")
def test_the_structure_given_to_windows_has_its_size() -> None:
    assert ctypes.sizeof(ExtendedLimits) == 144


@pytest.mark.parametrize("module", ["trampoline", "guard"])
def test_a_script_that_holds_a_child_imports_nothing_but_the_standard_library(module: str) -> None:
    import mesh.supervise

    script = Path(mesh.supervise.__file__).with_name(f"{module}.py")
    subprocess.run([sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({str(script)!r})"], check=True)
