"""How results and errors are printed."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mesh.errors import MeshError


def show_error(error: MeshError, *, as_json: bool) -> None:
    """One sentence and what to do next; on stderr, or as JSON on stdout."""
    if as_json:
        print_json({"error": {"code": error.code, "message": error.message, "remedy": error.remedy}})
        return
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(error.message, err=True)
    for line in (error.remedy or "").splitlines():
        click.echo(f"       {line}", err=True)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(title: str | None, columns: list[str], rows: list[list[str]]) -> None:
    """Rows under headings; numbers are the caller's to format."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
