"""How results and errors are printed."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mesh.config import format_size
from mesh.errors import MeshError


def show_error(error: MeshError, arguments: Sequence[str] = ()) -> None:
    """One sentence and what to do next.

    Args:
        arguments: the command line: with ``--json`` or ``--json-logs`` it is JSON on stdout.
    """
    problem = {"code": error.code, "message": error.message, "remedy": error.remedy}
    if "--json" in arguments:
        print_json({"error": problem})
    elif "--json-logs" in arguments:
        click.echo(json.dumps({"time": round(time.time(), 3), "kind": "error", "text": error.message, **problem}))
    else:
        first, *more = _folded(printable(error.message)) or [""]
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(first, err=True)
        for line in (*more, *printable(error.remedy or "").splitlines()):
            click.echo(f"       {line.removeprefix('       ')}", err=True)


def _folded(text: str) -> list[str]:
    """Lines of a message within the terminal's width, by whole words. A file or a pipe gets them as they are."""
    lines = text.splitlines()
    if not sys.stderr.isatty():
        return lines
    width = max(40, shutil.get_terminal_size().columns - 7)
    return [
        part for line in lines for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    ]


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: names and reasons come from other machines."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings; a heading that ends in ``>`` is over numbers. Without headings when all are empty."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(c.strip(">") for c in columns))
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell).replace("[", r"\[") for cell in row))
    Console(highlight=False).print(table)


def print_layout(layout: dict[str, Any], extra: str = "") -> None:
    """A layout as `status` and `plan` have it: the model, and who carries what."""
    model = layout["model"]
    kept = layout.get("prompt_cache_bytes")  # not said by an older node
    keeps = f", {format_size(kept)} for earlier conversations" if kept else ""
    click.echo(
        f"{printable(model['name'])}  {format_size(model['size_bytes'])}, {model['n_layers']} layers, "
        f"{layout['mode']}, {extra}predicted {layout['predicted_ms_per_token']:.0f} ms/token{keeps}\n"
    )
    rows = [
        [
            member["name"],
            "-" if member["layers"] is None else "{}-{}".format(*member["layers"]),
            format_size(member["bytes"]),
            member["device"],
            "host" if member["id"] == layout["host"] else "",
        ]
        for member in layout["ring"]
    ]
    print_table(["ring", "layers", "memory>", "device", ""], rows)
