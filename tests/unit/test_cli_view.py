"""What a person sees: lines, bars and JSON, and nothing that another machine's words could do to a terminal."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from mesh.cli.output import print_layout, print_table, printable, show_error
from mesh.cli.view import JsonView, LoggedView, PlainView, RichView, make_view
from mesh.errors import UsageError
from mesh.notice import Notice

COMMAND = "mesh up --join mesh1" + "a" * 200


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("mesh.cli.view.time.monotonic", lambda: now[0])
    return now


def rich(width: int = 60) -> tuple[RichView, io.StringIO]:
    out = io.StringIO()
    return RichView(Console(file=out, force_terminal=True, width=width, highlight=False, no_color=True)), out


def plain_text(out: io.StringIO) -> str:
    """What was written, without colours and cursor movements."""
    return "\n".join(Text.from_ansi(line).plain for line in out.getvalue().splitlines())


def test_the_view_suits_where_the_output_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_view(plain=False, json_lines=False, stream=io.StringIO()), PlainView)
    assert isinstance(make_view(plain=False, json_lines=False, stream=Terminal()), RichView)
    assert isinstance(make_view(plain=True, json_lines=False, stream=Terminal()), PlainView)
    assert isinstance(make_view(plain=False, json_lines=True, stream=Terminal()), JsonView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(plain=False, json_lines=False, stream=Terminal()), PlainView)


def test_a_plain_line_begins_with_what_it_is_about() -> None:
    out = io.StringIO()
    PlainView(out).show(Notice("ready", "http://localhost:9337/v1"))
    assert out.getvalue() == "ready   http://localhost:9337/v1\n"


@pytest.mark.parametrize("view", [PlainView, lambda out: RichView(Console(file=out, width=60))])
def test_a_command_to_paste_is_one_line_from_the_edge(view: Any) -> None:
    out = io.StringIO()
    view(out).show(Notice("invite", f"the next machine joins with:\n{COMMAND}"))
    assert COMMAND in out.getvalue().splitlines()


def test_a_long_line_is_wrapped_under_itself() -> None:
    view, out = rich(width=40)
    view.show(Notice("plan", "all twelve layers of the model on this machine, which holds it alone"))
    first, *more = plain_text(out).splitlines()
    assert first.startswith("plan    all twelve")
    assert more
    assert all(line.startswith("        ") and len(line) <= 40 for line in more)


def test_words_of_other_machines_cannot_move_the_cursor() -> None:
    evil = "attic\x1b[2J\x07\r is in"
    for make in (PlainView, lambda out: RichView(Console(file=out, width=60))):
        out = io.StringIO()
        make(out).show(Notice("mesh", evil))
        assert "attic?[2J?? is in" in out.getvalue()
    assert printable("é ✓\n\x9b") == "é ✓\n?"


def test_markup_in_a_name_is_only_text() -> None:
    view, out = rich()
    view.progress("[red]attic[/red]", 1, 10)
    view.show(Notice("mesh", "[bold]attic[/bold] is in"))
    view.close()
    assert "[red]attic[/red]" in plain_text(out)
    assert "[bold]attic[/bold] is in" in plain_text(out)


def test_plain_progress_is_told_now_and_then_and_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    view = PlainView(out)
    for done in range(12):
        view.progress("compiling", done, 12, "targets")
        clock[0] += 1
    view.progress("compiling", 12, 12, "targets")
    assert out.getvalue().splitlines() == [
        "        compiling: 5 of 12 targets",
        "        compiling: 10 of 12 targets",
        "        compiling: 12 of 12 targets",
    ]


def test_plain_progress_that_is_over_at_once_says_nothing(clock: list[float]) -> None:
    out = io.StringIO()
    view = PlainView(out)
    view.progress("checking", 1, 2)
    view.progress("checking", 2, 2)
    assert out.getvalue() == ""


def test_json_lines_carry_the_same_facts() -> None:
    out = io.StringIO()
    JsonView(out).show(Notice("ready", "here", {"api": "http://localhost:1/v1"}))
    line = json.loads(out.getvalue())
    assert line["kind"] == "ready"
    assert line["api"] == "http://localhost:1/v1"
    assert line["time"] > 1_600_000_000


def test_json_progress_is_at_most_one_line_a_second(clock: list[float]) -> None:
    out = io.StringIO()
    view = JsonView(out)
    for step in range(30):
        view.progress("checking", step, 30)
        clock[0] += 0.1
    assert len(out.getvalue().splitlines()) == 2


def test_bars_of_what_failed_do_not_stay() -> None:
    view, out = rich()
    view.progress("loading on attic", 3, 10)
    assert view._bars is not None
    view.show(Notice("change", "attic crashed"))
    assert view._bars is None
    assert "\x1b[?25h" in out.getvalue(), "the cursor is shown again"


def test_a_bar_may_not_know_how_long() -> None:
    view, _ = rich()
    view.progress("loading on this machine", 0, 0)
    view.progress("loading on this machine", 4, 10)
    view.progress("loading on this machine", 10, 10)
    assert view._bars is None


def test_a_bar_fits_a_narrow_window() -> None:
    view, out = rich(width=80)
    view.progress("loading on a-machine-with-a-very-long-name-indeed", 3_000_000_000, 40_000_000_000)
    assert view._bars is not None
    view._bars.refresh()
    view.close()
    assert max(len(line.rstrip()) for line in plain_text(out).splitlines()) < 80


def test_a_node_outlives_whoever_watches_it() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    for view in (PlainView(Gone()), JsonView(Gone())):
        view.show(Notice("ready", "here"))
        view.show(Notice("ready", "still here"))


def test_the_log_has_every_notice_but_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    view = LoggedView(PlainView(io.StringIO()))
    with caplog.at_level(logging.INFO, logger="mesh.cli.view"):
        view.show(Notice("plan", "all layers here"))
        view.show(Notice("warning", "hot"))
        view.show(Notice("invite", f"join with\n{COMMAND}"))
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "plan: all layers here"),
        ("WARNING", "warning: hot"),
    ]


def test_an_error_is_a_sentence_and_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(UsageError("it is wrong\x1b[2J", remedy="do this\nor that"))
    assert capsys.readouterr().err == "error: it is wrong?[2J\n       do this\n       or that\n"


def test_a_layout_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    ring = [
        {"id": "a", "name": "kitchen[/]", "layers": None, "bytes": 10**9, "device": "CPU"},
        {"id": "b", "name": "attic", "layers": [0, 11], "bytes": 2 * 10**9, "device": "CUDA0"},
    ]
    model = {"name": "qwen", "size_bytes": 18_500_000_000, "n_layers": 12}
    print_layout({"mode": "split", "host": "a", "model": model, "ring": ring, "predicted_ms_per_token": 60.7})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "qwen  18.5 GB, 12 layers, split, predicted 61 ms/token"
    assert lines[2].split() == ["ring", "layers", "memory", "device"]
    assert lines[3].split() == ["kitchen[/]", "-", "1", "GB", "CPU", "host"]
    assert lines[4].split() == ["attic", "0-11", "2", "GB", "CUDA0"]


def test_a_table_without_headings_has_no_empty_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["", ">"], [["a", "1"]])
    assert capsys.readouterr().out.splitlines()[0].split() == ["a", "1"]
