"""What docs/threat-model.md claims is held by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
MODEL = TESTS.parent / "docs" / "threat-model.md"
TEXT = MODEL.read_text("utf-8")
NAMED = sorted(set(re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", TEXT)))


def functions() -> set[str]:
    return {
        node.name
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def rows(section: str) -> list[list[str]]:
    """Cells of the tables in one section, heads left out."""
    [body] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    return [row for row in cells[1:] if set(row[0]) != {"-"}]


def test_every_test_it_names_exists() -> None:
    known = functions() | {file.name for file in TESTS.rglob("test_*.py")}
    assert len(NAMED) > 50
    assert [name for name in NAMED if name not in known] == []


@pytest.mark.parametrize("section", ["Attackers", "Keys that got into the wrong hands", "Hostile input"])
def test_every_claim_has_a_test_beside_it(section: str) -> None:
    found = rows(section)
    assert found
    assert [row[0] for row in found if not re.search(r"`test_\w+(\.py)?`", row[-1])] == []


def test_a_claim_names_the_test_not_only_its_file() -> None:
    """A file's name alone says little of what is held: as a second witness it may stand."""
    for section in ("Attackers", "Keys that got into the wrong hands", "Hostile input"):
        assert [row[0] for row in rows(section) if not re.search(r"`test_\w+`", row[-1])] == []
