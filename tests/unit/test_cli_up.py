"""The life of ``mesh up`` around the node itself: what goes wrong unexpectedly, and signals."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.cli import up
from mesh.cli.view import PlainView
from mesh.config import Settings
from mesh.errors import MeshError
from mesh.node.statedir import RUNNING_FILE


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Signal handlers and logging are the process's own: put them back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.getsignal(number)) for number in numbers]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for number, handler in before:
        signal.signal(number, handler)
    for added in root.handlers:
        if added not in handlers:
            added.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def settings(tmp_path: Path) -> Settings:
    return Settings(
        role="client", state_dir=tmp_path / "s", name="kitchen", bind_host=("127.0.0.1",), bind_port=0, api_port=0,
        no_discovery=True,
    )  # fmt: skip


def played_by(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """``run`` instead of a node, in a mesh that need not exist."""

    async def enter(*_: Any) -> None:
        return None

    monkeypatch.setattr(up, "enter", enter)
    monkeypatch.setattr(up, "run", run)


def test_an_unexpected_exception_is_one_line_and_its_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def run(*_: Any) -> None:
        raise RuntimeError("the sky fell")

    played_by(monkeypatch, run)
    with pytest.raises(MeshError) as raised:
        up.run_node(settings(tmp_path))
    log = tmp_path / "s" / "logs" / "mesh.log"
    assert raised.value.message == "internal error: RuntimeError: the sky fell"
    assert str(log) in (raised.value.remedy or "")
    assert "Traceback" in log.read_text()
    assert not (tmp_path / "s" / RUNNING_FILE).exists()


def test_an_exception_that_nobody_waits_for_is_told_once_and_the_node_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("a callback fell over")

    async def run(_s: Any, _r: Any, _e: Any, _m: Any, _v: Any, stop: asyncio.Event) -> None:
        for _ in range(2):
            asyncio.get_running_loop().call_soon(fail)
        await asyncio.sleep(0.01)
        stop.set()

    played_by(monkeypatch, run)
    up.run_node(settings(tmp_path))
    told = [line for line in capsys.readouterr().out.splitlines() if "a callback fell over" in line]
    assert len(told) == 1
    assert told[0].startswith("warning internal error: RuntimeError")
    assert (tmp_path / "s" / "logs" / "mesh.log").read_text().count("Traceback") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_node_to_stop_and_the_command_succeeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    async def run(_s: Any, _r: Any, _e: Any, _m: Any, _v: Any, stop: asyncio.Event) -> None:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 5)

    played_by(monkeypatch, run)
    up.run_node(settings(tmp_path))
    assert "stopping (again to stop at once)" in capsys.readouterr().out


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    asked: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    up._on_interrupt(lambda: asked.append(1), PlainView(io.StringIO()))
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    assert ended == [130]


def test_a_signal_after_the_loop_has_ended_does_no_harm() -> None:
    def too_late() -> None:
        raise RuntimeError("Event loop is closed")

    up._on_interrupt(too_late, PlainView(io.StringIO()))
    signal.raise_signal(signal.SIGTERM)


def test_a_log_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "logs").write_text("in the way")
    with pytest.raises(MeshError, match="cannot write the log"):
        up.run_node(settings(tmp_path))


def looking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seek: Any, **changes: Any) -> list[Any]:
    """Run with ``seek`` instead of a search on the network; returns the record each node was started with."""
    ran: list[Any] = []

    async def run(_settings: Any, record: Any, *_: Any) -> None:
        ran.append(record)

    played_by(monkeypatch, run)
    monkeypatch.setattr(up, "seek", seek)
    monkeypatch.setattr(up, "_equip", lambda *_: (None, None))
    up.run_node(replace(settings(tmp_path), **{"no_discovery": False, **changes}))
    return ran


def test_a_machine_with_nothing_to_do_looks_for_a_mesh_before_it_founds_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = object()

    async def seek(*_: Any) -> Any:
        return found

    assert looking(monkeypatch, tmp_path, seek, role="worker") == [found]


@pytest.mark.parametrize("told", [{"model": "qwen"}, {"demo": True}, {"no_discovery": True}])
def test_a_machine_that_was_told_what_to_do_does_not_look_around(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: dict[str, Any]
) -> None:
    async def seek(*_: Any) -> Any:
        raise AssertionError("it looked")

    monkeypatch.setattr(up, "check", lambda _: None)  # there is no such model
    assert looking(monkeypatch, tmp_path, seek, **{"role": "worker", "no_discovery": False, **told}) == [None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_to_be_let_in_ends_cleanly_at_a_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    async def seek(_s: Any, _v: Any, stop: asyncio.Event) -> None:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 5)

    assert looking(monkeypatch, tmp_path, seek, role="worker") == []
    assert "stopping; this machine is in no mesh" in capsys.readouterr().out
    assert signal.getsignal(number) is before
