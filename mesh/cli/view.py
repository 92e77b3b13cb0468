"""Three ways to see the same notices: a terminal, plain lines, JSON lines."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from mesh.cli.output import printable
from mesh.config import format_size
from mesh.notice import Notice, View

KIND = 8
"""Width of the first column, which says what a line is about."""
_COLOURS = {
    "ready": "bold green",
    "invite": "bold green",
    "warning": "bold yellow",
    "change": "bold magenta",
    "error": "bold red",
}
_SETTLES = frozenset({"plan", "ready", "change"})
"""After these, bars that did not come to their end never will."""
_SECRET = "invite"  # noqa: S105 - a kind of notice
log = logging.getLogger(__name__)


def make_view(*, plain: bool, json_lines: bool, stream: TextIO | None = None) -> View:
    """The view that suits where the output goes: ``stream``, or standard output."""
    stream = sys.stdout if stream is None else stream
    if json_lines:
        return JsonView(stream)
    if plain or not stream.isatty() or os.environ.get("TERM") == "dumb":
        return PlainView(stream)
    return RichView(Console(file=stream, highlight=False))


class LoggedView:
    """Another view, whose notices go to the log too; secrets do not."""

    def __init__(self, inner: View) -> None:
        self._inner = inner

    def show(self, notice: Notice) -> None:
        if notice.kind != _SECRET:
            level = logging.WARNING if notice.kind in ("warning", "error") else logging.INFO
            log.log(level, "%s: %s", notice.kind, printable(notice.text))
        self._inner.show(notice)

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        self._inner.progress(label, done, total, unit)

    def close(self) -> None:
        self._inner.close()


class _Pace:
    """Lets a moving number through now and then, and its end when anything of it was seen before."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._due: dict[str, float] = {}
        self._seen: set[str] = set()

    def lets(self, label: str, done: float, total: float) -> bool:
        now = time.monotonic()
        if done >= total:
            self._due.pop(label, None)
            seen = label in self._seen
            self._seen.discard(label)
            return seen  # over before anyone could wonder, otherwise
        if now < self._due.setdefault(label, now + self._every_s):
            return False
        self._due[label] = now + self._every_s
        self._seen.add(label)
        return True


class _Lines:
    """A stream that may go away, as that of ``mesh up | head`` does: the node outlives whoever watches it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def write(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            self._stream = None


class JsonView:
    """One JSON object a line, for scripts."""

    EVERY_S = 1.0

    def __init__(self, stream: TextIO) -> None:
        self._lines = _Lines(stream)
        self._pace = _Pace(self.EVERY_S)

    def show(self, notice: Notice) -> None:
        self._write({"kind": notice.kind, "text": notice.text, **notice.data})

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        if self._pace.lets(label, done, total):
            self._write({"kind": "progress", "label": label, "done": done, "total": total, "unit": unit})

    def close(self) -> None:
        pass

    def _write(self, value: dict[str, Any]) -> None:
        self._lines.write(json.dumps({"time": round(time.time(), 3), **value}))


class PlainView:
    """A line when something happens; of what takes long one now and then, and at the end."""

    EVERY_S = 5.0

    def __init__(self, stream: TextIO) -> None:
        self._lines = _Lines(stream)
        self._pace = _Pace(self.EVERY_S)

    def show(self, notice: Notice) -> None:
        first, *more = printable(notice.text).splitlines() or [""]
        self._lines.write(f"{notice.kind:{KIND}}{first}")
        for line in more:
            self._lines.write(f"{'':{_indent(notice)}}{line}")

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        if self._pace.lets(label, done, total):
            self._lines.write(f"{'':{KIND}}{printable(label)}: {_amounts(done, total, unit)}")

    def close(self) -> None:
        pass


class RichView:
    """Lines that stay, and below them bars that move."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def show(self, notice: Notice) -> None:
        if notice.kind in _SETTLES:
            self.close()
        width = max(self._console.width - KIND, 20)
        head = Text(f"{notice.kind:{KIND}}", _COLOURS.get(notice.kind, "bold cyan"))
        for line in printable(notice.text).splitlines():
            # A command to paste stays one line, however the terminal shows it.
            parts = [line] if notice.kind == "invite" else _wrap(line, width)
            for part in parts:
                self._console.print(Text.assemble(head, part), soft_wrap=True)
                head = Text(" " * _indent(notice))

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        if done >= total > 0:
            self._finish(label)
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn(" " * (KIND - 1)),
                TextColumn("{task.description}", markup=False, table_column=_LABEL),
                BarColumn(bar_width=20),
                _AmountColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        task = self._tasks.get(label)
        if task is None:
            task = self._tasks[label] = self._bars.add_task(printable(label), total=None, unit=unit)
        if total > 0:
            self._bars.update(task, completed=done, total=total)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    def _finish(self, label: str) -> None:
        task = self._tasks.pop(label, None)
        if task is not None and self._bars is not None:
            self._bars.remove_task(task)
            if not self._tasks:
                self.close()


# Short enough that a window made narrower rarely breaks a bar over two lines, which would leave its pieces behind.
_LABEL = Column(max_width=24, no_wrap=True, overflow="ellipsis")


class _AmountColumn(ProgressColumn):
    """``12 MB of 40 MB`` or ``12 of 215 targets``."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else _amounts(task.completed, task.total, task.fields["unit"]))


def _amounts(done: float, total: float, unit: str) -> str:
    if unit == "B":
        return f"{format_size(done)} of {format_size(total)}"
    return f"{done:.0f} of {total:.0f} {unit}"


def _indent(notice: Notice) -> int:
    return 0 if notice.kind == "invite" else KIND  # a command to paste begins at the edge


def _wrap(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
