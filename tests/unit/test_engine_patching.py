"""Patches fit exactly, or are refused."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.engine.patching import apply_hunks, apply_patch, parse_patch
from mesh.engine.pin import Patch, patch_queue, queue_digest, read_queue
from mesh.errors import EngineError

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "--- x", "+++ y", "@@ z", "", " ", "\\ w"]), max_size=30).map(
    lambda lines: "".join(f"{line}\n" for line in lines)
)


def diff(before: str, after: str, context: int = 3) -> bytes:
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), "a/f.c", "b/f.c", n=context)
    return "".join(lines).encode()


# A diff turns its old text into its new text, whatever the lines look like.
@given(TEXTS, TEXTS, st.integers(0, 3))
def test_a_diff_takes_old_to_new(before: str, after: str, context: int) -> None:
    for change in parse_patch(diff(before, after, context)):
        assert apply_hunks(before.encode(), change.hunks) == after.encode()
    assert before == after or parse_patch(diff(before, after, context))


# Any other starting text is refused, or was not touched where it differs.
@given(TEXTS, TEXTS, TEXTS)
def test_a_diff_never_applies_where_its_context_differs(before: str, after: str, other: str) -> None:
    for change in parse_patch(diff(before, after, 100)):
        if other != before and not other.startswith(before):
            with pytest.raises(ValueError, match="does not match"):
                apply_hunks(other.encode(), change.hunks)


def test_a_patch_creates_a_file(tmp_path: Path) -> None:
    content = (
        b"Why: so\n---\ndiff --git a/d/n b/d/n\nnew file mode 100644\n--- /dev/null\n+++ b/d/n\n@@ -0,0 +1 @@\n+hi\n"
    )
    apply_patch(tmp_path, Patch("p", content))
    assert (tmp_path / "d" / "n").read_bytes() == b"hi\n"
    with pytest.raises(EngineError, match="exists already"):
        apply_patch(tmp_path, Patch("p", content))


@pytest.mark.parametrize("name", ["b/../../etc/x", "/etc/x", "b/"])
def test_a_patch_stays_in_its_tree(tmp_path: Path, name: str) -> None:
    content = f"--- /dev/null\n+++ {name}\n@@ -0,0 +1 @@\n+hi\n".encode()
    with pytest.raises(EngineError, match="inside the tree"):
        apply_patch(tmp_path, Patch("p", content))
    assert not list(tmp_path.rglob("*"))


def test_a_patch_that_does_not_fit_says_which_file(tmp_path: Path) -> None:
    (tmp_path / "f.c").write_text("something else\n")
    with pytest.raises(EngineError, match=r"0001.*f\.c: hunk at line 1"):
        apply_patch(tmp_path, Patch("0001", diff("a\n", "b\n")))


def test_the_pin_knows_names_order_and_contents() -> None:
    a, b = Patch("a", b"1"), Patch("b", b"2")
    digests = {queue_digest(q) for q in [(), (a,), (a, b), (b, a), (Patch("a", b"12"), Patch("b", b""))]}
    assert len(digests) == 5


def test_the_pin_does_not_depend_on_line_ends(tmp_path: Path) -> None:
    (tmp_path / "series").write_bytes(b"# comment\r\np\r\n")
    (tmp_path / "p").write_bytes(b"x\r\ny\r\n")
    assert read_queue(tmp_path) == (Patch("p", b"x\ny\n"),)


def test_every_patch_of_the_queue_says_why_and_parses() -> None:
    for patch in patch_queue():
        header = patch.content.partition(b"\ndiff --git")[0].decode()
        assert all(f"{field}: " in header for field in ("Subject", "Why", "Upstream", "Measured")), patch.name
        assert parse_patch(patch.content)
