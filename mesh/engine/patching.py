"""Applies unified diffs exactly: every context line must match where the hunk says it is.

The source is pinned to the byte, so a hunk that does not fit is an error in the queue and never something to search
around for. Done here because neither ``git`` nor ``patch`` is on every machine, and each has its own idea of fuzz.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mesh.engine.pin import Patch
from mesh.errors import EngineError

_HUNK = re.compile(rb"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_LINE = re.compile(rb"[^\n]*\n|[^\n]+")


@dataclass(frozen=True, slots=True)
class Hunk:
    """``old`` lines, from line ``start`` (counted from one; zero for a file that does not exist), become ``new``."""

    start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FileChange:
    """All hunks of one file, in order. A new file has no old lines."""

    path: PurePosixPath
    creates: bool
    hunks: tuple[Hunk, ...]


def parse_patch(content: bytes) -> tuple[FileChange, ...]:
    """Read what ``git diff`` writes; text before the first file is the header for people.

    Raises:
        ValueError: a hunk is cut short, a path leaves the tree, or a file is deleted or renamed.
    """
    lines = _LINE.findall(content)
    changes: list[FileChange] = []
    hunks: list[Hunk] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith((b"rename ", b"deleted file", b"GIT binary patch")) and changes:
            raise ValueError(f"not supported: {line.decode(errors='replace').strip()}")
        if line.startswith(b"--- ") and at + 1 < len(lines) and lines[at + 1].startswith(b"+++ "):
            hunks = []
            path = _path(lines[at + 1])
            at += 2
            while at < len(lines) and (match := _HUNK.match(lines[at])):
                hunk, at = _read_hunk(lines, at + 1, match)
                hunks.append(hunk)
            changes.append(FileChange(path, line.startswith(b"--- /dev/null"), tuple(hunks)))
            continue
        at += 1
    return tuple(changes)


def _path(line: bytes) -> PurePosixPath:
    name = line[4:].strip().partition(b"\t")[0].decode()
    path = PurePosixPath(*PurePosixPath(name).parts[1:])
    if not name.startswith("b/") or ".." in path.parts or path.is_absolute() or not path.parts:
        raise ValueError(f"not a path inside the tree: {name}")
    return path


def _read_hunk(lines: list[bytes], at: int, match: re.Match[bytes]) -> tuple[Hunk, int]:
    start = int(match[1])
    want_old, want_new = (int(n) if n is not None else 1 for n in (match[2], match[4]))
    old: list[bytes] = []
    new: list[bytes] = []
    while len(old) < want_old or len(new) < want_new:
        if at >= len(lines):
            raise ValueError(f"hunk at line {start} is cut short")
        sign, text = lines[at][:1], lines[at][1:]
        if sign == b"\n":  # an empty context line whose blank some editor took away
            sign, text = b" ", b"\n"
        if sign not in b" +-" or not sign:
            raise ValueError(f"hunk at line {start} is cut short")
        at += 1
        if at < len(lines) and lines[at].startswith(b"\\"):
            text = text.removesuffix(b"\n")
            at += 1
        if sign in b" -":
            old.append(text)
        if sign in b" +":
            new.append(text)
    if len(old) != want_old or len(new) != want_new:
        raise ValueError(f"hunk at line {start} has other lengths than it says")
    return Hunk(start, tuple(old), tuple(new)), at


def apply_hunks(content: bytes, hunks: tuple[Hunk, ...]) -> bytes:
    """The file after all hunks.

    Raises:
        ValueError: a hunk does not match the lines at its place.
    """
    lines: list[bytes] = _LINE.findall(content)
    result: list[bytes] = []
    done = 0
    for hunk in hunks:
        begin = hunk.start - 1 if hunk.old else hunk.start
        end = begin + len(hunk.old)
        if begin < done or tuple(lines[begin:end]) != hunk.old:
            raise ValueError(f"hunk at line {hunk.start} does not match")
        result += lines[done:begin]
        result += hunk.new
        done = end
    return b"".join(result + lines[done:])


def apply_patch(tree: Path, patch: Patch) -> None:
    """Change the files below ``tree``; on an error nothing more is changed, and the tree is good for nothing.

    Raises:
        EngineError: the patch does not fit.
    """
    where: PurePosixPath | None = None
    try:
        for change in parse_patch(patch.content):
            where = change.path
            target = tree / change.path
            if change.creates and target.exists():
                raise ValueError("the file exists already")
            before = b"" if change.creates else target.read_bytes()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(apply_hunks(before, change.hunks))
    except (ValueError, OSError) as error:
        place = f"{where}: " if where else ""
        raise EngineError(
            f"patch {patch.name} does not apply to the engine's source: {place}{error}",
            remedy="git checkout -- patches, or install mesh again",
        ) from error
