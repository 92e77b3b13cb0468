"""Ninety requests of every kind at four nodes, while machines and engines are killed under them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.mesh_kit import IN_LAB

pytestmark = IN_LAB
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_changed_while_machines_and_engines_are_killed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.endure",
        "--quick",
        "--weather",
        "kills",
        "--json",
        str(tmp_path / "f.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    [weather] = json.loads((tmp_path / "f.json").read_text())["weathers"]
    deeds = {(happened["deed"], happened["role"]) for happened in weather["happened"]}
    assert deeds >= {("node killed", "worker"), ("node killed", "host"), ("engine killed", "host")}
