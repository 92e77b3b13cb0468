"""``mesh doctor``: gather, examine, print."""

from __future__ import annotations

import asyncio
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.status import Status
from rich.text import Text

from mesh.cli.output import print_json, printable
from mesh.cli.remote import call, get_status
from mesh.config import load_settings
from mesh.doctor.examination import examine
from mesh.doctor.finding import Finding, Level
from mesh.doctor.outfit import look
from mesh.doctor.patient import Patient
from mesh.errors import MeshError
from mesh.node.statedir import find_process

CHECKUP_WITHIN_S = 30.0
"""For a node with many slow links."""
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
_INDENT = 18


def run(config: Path | None, as_json: bool, flags: dict[str, Any]) -> None:
    """Print every finding; exit 1 when one is a problem."""
    settings = load_settings({**flags, "role": "worker"}, config)
    console = Console(highlight=False)
    with console.status("looking for the node") as status:
        if as_json or not console.is_terminal:
            status.stop()
        patient = _admit(Patient(settings))
        show = (lambda finding: None) if as_json else (lambda finding: _show(finding, console))
        findings = asyncio.run(examine(patient, show, lambda names: _tell(status, names)))
    counts: Counter[Level] = Counter(finding.level for finding in findings)
    if as_json:
        print_json(
            {
                "problems": counts["problem"],
                "warnings": counts["warning"],
                "findings": [_as_json(finding) for finding in findings],
            }
        )
    else:
        click.echo(_sum(counts))
    if counts["problem"]:
        raise SystemExit(1)


def _admit(patient: Patient) -> Patient:
    """The patient with what its node and its engine say of themselves."""
    running = status = checkup = None
    silent = ""
    try:
        running = find_process(patient.state_dir)
        if running is not None and running.api_url:
            status = get_status(running)
            checkup = call(running, "checkup", {}, CHECKUP_WITHIN_S)
    except MeshError as error:
        silent = error.message  # with a status: it answers, but not this; an older version perhaps
    found = replace(patient, running=running, status=status, checkup=checkup, silent=silent)
    return replace(found, outfit=look(found.backend)) if found.computes else found


def _show(finding: Finding, console: Console) -> None:
    # Through the console that has the moving line: what is printed beside it would run into it.
    width = max(40, min(console.width, 110) - _INDENT)
    first, *more = _wrapped(finding.text, width)
    head = Text(f"{finding.level:8}", _COLOURS[finding.level])
    console.print(Text.assemble(head, f"{finding.check:10}{first}"), soft_wrap=True)
    for text in more:
        console.print(Text(f"{'':{_INDENT}}{text}"), soft_wrap=True)
    for remedy in printable(finding.remedy).splitlines():
        # A command stays one line, to be pasted.
        console.print(Text(f"{'':{_INDENT}}> {remedy}", "bold"), soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(printable(text), width, break_long_words=False, break_on_hyphens=False) or [""]


def _tell(status: Status, names: Sequence[str]) -> None:
    status.update(f"checking {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")


def _sum(counts: Mapping[Level, int]) -> str:
    if not counts["problem"] and not counts["warning"]:
        return "\nnothing is wrong"
    levels: tuple[Level, ...] = ("problem", "warning")
    parts = [f"{n} {level}{'' if n == 1 else 's'}" for level in levels if (n := counts[level])]
    return f"\n{' and '.join(parts)}; what to do about each stands below it, after >"


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "code": finding.code,
        "level": finding.level,
        "text": finding.text,
        "remedy": finding.remedy or None,
    }
