"""Three ways to see the same notices: a terminal, plain lines, JSON lines."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from mesh.config import format_size
from mesh.notice import Notice, View

_COLOURS = {"ready": "bold green", "warning": "bold yellow", "change": "bold magenta"}


def make_view(*, plain: bool, json_lines: bool, stream: TextIO = sys.stdout) -> View:
    """The view that suits where the output goes."""
    if json_lines:
        return JsonView(stream)
    if plain or not stream.isatty():
        return PlainView(stream)
    return RichView(Console(file=stream, highlight=False))


class JsonView:
    """One JSON object a line, for scripts."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, notice: Notice) -> None:
        self._write({"kind": notice.kind, "text": notice.text, **notice.data})

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        self._write({"kind": "progress", "label": label, "done": done, "total": total, "unit": unit})

    def close(self) -> None:
        pass

    def _write(self, value: dict[str, Any]) -> None:
        print(json.dumps({"time": round(time.time(), 3), **value}), file=self._stream, flush=True)


class PlainView:
    """A line when something happens; progress at most every two seconds, and at the end."""

    EVERY_S = 2.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: dict[str, float] = {}

    def show(self, notice: Notice) -> None:
        print(f"{notice.kind:7}{notice.text}", file=self._stream, flush=True)

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        now = time.monotonic()
        finished = done >= total
        if not finished and now - self._last.setdefault(label, now) < self.EVERY_S:
            return
        if finished and label not in self._last:
            return  # over before anyone could wonder
        self._last[label] = now
        if finished:
            del self._last[label]
        print(f"{'load':7}{label}  {_amount(done, unit)} of {_amount(total, unit)}", file=self._stream, flush=True)

    def close(self) -> None:
        pass


class RichView:
    """Lines that stay, and below them bars that move."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def show(self, notice: Notice) -> None:
        line = Text.assemble((f"{notice.kind:7}", _COLOURS.get(notice.kind, "bold cyan")), notice.text)
        self._console.print(line, soft_wrap=True)

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("[bold cyan]load   [/]{task.description}"),
                BarColumn(bar_width=24),
                _AmountColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        task = self._tasks.get(label)
        if task is None:
            task = self._tasks[label] = self._bars.add_task(label, total=total, unit=unit)
        self._bars.update(task, completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(label))
            if not self._tasks:
                self.close()

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()


class _AmountColumn(ProgressColumn):
    """``12 MB/40 MB`` or ``12/215 targets``."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if unit == "B":
            return Text(f"{format_size(task.completed)}/{format_size(task.total or 0)}")
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {unit}")


def _amount(value: float, unit: str) -> str:
    return format_size(value) if unit == "B" else f"{value:.0f} {unit}"
