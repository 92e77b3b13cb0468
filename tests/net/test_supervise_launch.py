"""Real processes: nothing outlives us, nothing else is killed, and what was printed is known."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from mesh.errors import EngineError
from mesh.supervise import posix
from mesh.supervise.launch import child_environment
from mesh.supervise.output import Output, RotatingLog
from mesh.supervise.ports import EarlyExitError, free_port, listening, start_on_free_port
from mesh.supervise.posix import GUARD, TRAMPOLINE, PosixChild, PosixLauncher
from mesh.supervise.reasons import ProcessKind
from mesh.supervise.registry import FILE_NAME, Entry, ProcessRegistry, process_mark
from tests.eventually import eventually
from tests.fakes.processes import stand_in

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")

SCRIPTS = [
    pytest.param(TRAMPOLINE, id="trampoline", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux")),
    pytest.param(GUARD, id="guard"),
]


async def launch(tmp_path: Path, script: Path, *arguments: object) -> PosixChild:
    output = Output(RotatingLog(tmp_path / "engine.log"))
    return await PosixLauncher(script).launch(
        stand_in(*arguments).argv, child_environment(os.environ, {}), output, lambda pid: None
    )


def is_alive(pid: int) -> bool:
    return process_mark(pid) is not None


@pytest.mark.parametrize("script", SCRIPTS)
async def test_what_a_child_prints_reaches_the_log_and_the_tail(tmp_path: Path, script: Path) -> None:
    child = await launch(tmp_path, script, "exit", "--say", "no such model", "--code", "3")
    assert await child.wait() == 3
    assert child.tail == ("no such model",)
    assert (tmp_path / "engine.log").read_text() == "no such model\n"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
async def test_a_child_that_dies_of_a_signal_is_seen_to(tmp_path: Path, script: Path, number: int) -> None:
    child = await launch(tmp_path, script, "exit", "--signal", int(number))
    assert await child.wait() == -number


@pytest.mark.parametrize("script", SCRIPTS)
async def test_a_killed_child_is_gone_with_its_port_even_if_it_ignores_asking(tmp_path: Path, script: Path) -> None:
    port = free_port()
    child = await launch(tmp_path, script, "rpc", "--port", port)
    await asyncio.wait_for(listening(child, port), 10)
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    child.kill()
    assert await asyncio.wait_for(child.wait(), 5) == -signal.SIGKILL
    child.kill()  # harmless
    await eventually(lambda: not any(is_alive(process.pid) for process in family))


async def test_a_child_leads_its_own_session_reads_nothing_and_may_gain_no_privileges(tmp_path: Path) -> None:
    child = await launch(tmp_path, PosixLauncher()._script, "print")
    await child.wait()
    pid, ppid, pgid = (int(word) for word in child.tail[-1].split()[1::2])
    assert pid == pgid or ppid == pgid
    assert ppid == os.getpid() or pid != child.pid
    assert len(child.tail) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_engine_itself_runs_without_new_privileges_and_dumps_no_core(tmp_path: Path) -> None:
    port = free_port()
    child = await launch(tmp_path, TRAMPOLINE, "rpc", "--port", port)
    await asyncio.wait_for(listening(child, port), 10)
    process = Path(f"/proc/{child.pid}")
    assert "NoNewPrivs:\t1" in (process / "status").read_text()
    limits = next(line for line in (process / "limits").read_text().splitlines() if line.startswith("Max core"))
    assert limits.split()[4:6] == ["0", "0"]
    assert (process / "fd" / "0").readlink() == Path("/dev/null")
    child.kill()
    await child.wait()


async def test_a_missing_program_is_named_with_the_remedy(tmp_path: Path) -> None:
    output = Output(RotatingLog(tmp_path / "log"))
    with pytest.raises(EngineError, match="mesh engine build"):
        await PosixLauncher().launch([str(tmp_path / "llama-server")], {}, output, lambda pid: None)


@pytest.mark.parametrize("script", SCRIPTS)
async def test_nothing_of_a_child_runs_before_it_is_on_the_books(tmp_path: Path, script: Path) -> None:
    def refuse(pid: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await PosixLauncher(script).launch(
            stand_in("exit", "--say", "ran").argv, {}, Output(RotatingLog(tmp_path / "log")), refuse
        )
    assert not (tmp_path / "log").exists()


PARENT = """
import asyncio, os, sys
from pathlib import Path
from mesh.supervise.output import Output, RotatingLog
from mesh.supervise.posix import PosixLauncher
from mesh.supervise.ports import free_port, listening
from tests.fakes.processes import stand_in

async def main():
    script, where = Path(sys.argv[1]), Path(sys.argv[2])
    for n in range(2):
        port = free_port()
        output = Output(RotatingLog(where / "log"))
        child = await PosixLauncher(script).launch(
            stand_in("rpc", "--port", port).argv, dict(os.environ), output, lambda pid: None)
        await listening(child, port)
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("script", SCRIPTS)
async def test_a_parent_killed_outright_leaves_no_child(tmp_path: Path, script: Path) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs in this loop
        [sys.executable, "-c", PARENT, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 2
        marks = {process.pid: process_mark(process.pid) for process in family}
        parent.kill()
    await eventually(lambda: not [pid for pid, mark in marks.items() if process_mark(pid) == mark])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_parent_that_is_gone_before_its_child_looks_leaves_none(script: Path) -> None:
    # A pid that is not the script's parent stands for a parent that died and was replaced by init.
    ran = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "1", *stand_in("exit", "--say", "ran").argv],
        input=b"\n",
        capture_output=True,
        timeout=10,
    )
    assert ran.returncode == 125
    assert b"ran" not in ran.stderr


def orphan() -> subprocess.Popen[bytes]:
    return subprocess.Popen(stand_in("idle").argv, start_new_session=True)


def write_leftovers(state_dir: Path, *entries: Entry) -> None:
    (state_dir / FILE_NAME).write_bytes(msgspec.json.encode(list(entries)))


def test_a_sweep_ends_what_a_crashed_run_left_and_nothing_else(tmp_path: Path) -> None:
    left, recycled = orphan(), orphan()
    try:
        mark, older = process_mark(left.pid), process_mark(os.getpid())
        assert mark is not None and older is not None and mark != older
        dead = subprocess.Popen([sys.executable, "-c", ""])
        gone = Entry(dead.pid, process_mark(dead.pid) or "x", ProcessKind.RPC)
        dead.wait()
        write_leftovers(
            tmp_path,
            Entry(left.pid, mark, ProcessKind.RPC),
            # The pid was given to another program since: it started at another moment.
            Entry(recycled.pid, older, ProcessKind.SERVER),
            gone,
        )
        assert [entry.pid for entry in ProcessRegistry(tmp_path).sweep()] == [left.pid]
        assert left.wait(5) == -signal.SIGKILL
        assert recycled.poll() is None
        assert ProcessRegistry(tmp_path).left_over() == []
    finally:
        for process in (left, recycled):
            process.kill()
            process.wait()


@pytest.mark.parametrize("damage", [b"", b"{}", b'[{"pid": "x"}]', b"\xff\x00"])
def test_a_damaged_list_of_processes_kills_nobody_and_stops_nobody(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(damage)
    registry = ProcessRegistry(tmp_path)
    assert registry.sweep() == []
    registry.record(os.getpid(), ProcessKind.RPC)
    assert [entry.pid for entry in ProcessRegistry(tmp_path).left_over()] == [os.getpid()]
    registry.forget(os.getpid())
    assert ProcessRegistry(tmp_path).left_over() == []


async def test_a_port_lost_to_another_program_is_given_up_for_another(tmp_path: Path) -> None:
    other = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    taken = other.sockets[0].getsockname()[1]
    offers = iter([taken, taken, free_port()])
    children: list[PosixChild] = []

    async def start(port: int) -> PosixChild:
        children.append(await launch(tmp_path, posix.TRAMPOLINE, "rpc", "--port", port))
        return children[-1]

    child, port = await start_on_free_port(start, pick=lambda: next(offers))
    assert port != taken
    assert len(children) == 3
    assert child is children[-1]
    child.kill()
    await child.wait()
    other.close()


async def test_five_lost_races_are_an_error_a_person_can_read(tmp_path: Path) -> None:
    other = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    taken = other.sockets[0].getsockname()[1]
    with pytest.raises(EngineError, match="5 ports in a row"):
        await start_on_free_port(
            lambda port: launch(tmp_path, PosixLauncher()._script, "rpc", "--port", port), pick=lambda: taken
        )
    other.close()


async def test_a_child_that_ends_for_another_reason_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(EarlyExitError) as early:
        await start_on_free_port(
            lambda port: launch(tmp_path, PosixLauncher()._script, "exit", "--code", "7", "--say", "bad model")
        )
    assert (early.value.code, early.value.tail) == (7, ("bad model",))


async def test_a_strangers_listener_is_not_taken_for_the_childs(tmp_path: Path) -> None:
    other = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    child = await launch(tmp_path, PosixLauncher()._script, "idle")
    try:
        assert not child.listens_on(other.sockets[0].getsockname()[1])
    finally:
        child.kill()
        await child.wait()
        other.close()
