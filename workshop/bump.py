"""Moves the engine's pin to another source: the queue is applied to it, exactly where it fits, else merged.

The work happens in a scratch repository with two histories: the old source with the queue, and the new source, to which
one patch after the other is brought. What does not apply exactly is a three-way merge of git's, whose base is the old
source with all patches before it. What git cannot merge is left to a person.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mesh.engine.patching import apply_hunks, parse_patch
from mesh.engine.pin import Patch, read_queue, tree_in_archive
from mesh.engine.source import sha256_of, unpack_source
from mesh.errors import EngineError, UsageError
from workshop.repository import BASE, Repository, add_patches, begin, export, write_queue

_OLD = "old"
_PROTOCOL = re.compile(r"#define RPC_PROTO_(MAJOR|MINOR|PATCH)_VERSION\s+(\d+)")
_VERSION = re.compile(r"\d+(\.\d+)+([a-z]+\d+)?")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Move:
    """Where to: what the scratch repository remembers from one call to the next."""

    version: str
    sha256: str
    protocol: str
    """Of the old source."""


def checked_version(text: str) -> str:
    """``text``, if it can be a version of the package.

    Raises:
        UsageError: it is something else.
    """
    if not _VERSION.fullmatch(text):
        raise UsageError(f"{text!r} is not a version", remedy="for example: bin/engine-bump 0.3.37")
    return text


def checked_archive(archive: Path, sha256: str | None) -> str:
    """The archive's hash.

    Raises:
        EngineError: it is not there, or is not the one whose hash was given.
    """
    if not archive.is_file():
        raise UsageError(f"there is no archive {archive}", remedy="leave --archive out, and it is downloaded")
    digest = sha256_of(archive)
    if sha256 is not None and digest != sha256.lower():
        raise EngineError(
            f"{archive.name} has SHA-256 {digest}, not {sha256}",
            remedy="compare with the hash that the package index shows; do not go on with a file that differs",
        )
    return digest


def open_queue(root: Path, archive: Path, version: str, patches: tuple[Patch, ...]) -> Repository:
    """A new repository in ``root``: the source, then one commit per patch.

    Raises:
        EngineError: ``root`` is not empty, or a patch does not fit.
    """
    if root.exists() and any(root.iterdir()):
        raise UsageError(f"{root} is not empty", remedy=f"rm -r {root}, or another directory")
    _unpack(archive, version, root)
    repository = begin(root, f"llama-cpp-python {version}")
    add_patches(repository, patches)
    return repository


def _unpack(archive: Path, version: str, root: Path) -> None:
    if root.exists():
        root.rmdir()
    root.parent.mkdir(parents=True, exist_ok=True)
    unpack_source(archive, root, tree_in_archive(version))
    (root / ".git").unlink(missing_ok=True)  # upstream's own, of a repository that is not there
    if not any(root.iterdir()):
        shutil.rmtree(root)
        raise EngineError(
            f"{archive.name} holds no {tree_in_archive(version)}", remedy=f"is it the source distribution of {version}?"
        )


def start(repository: Repository, archive: Path, move: Move) -> None:
    """Put the new source beside the old one: a second child of what both came from, and the place to work on."""
    repository.git("branch", "--move", _OLD)
    repository.git("tag", "old-base", BASE)
    repository.git("checkout", "--quiet", "-b", "queue", BASE)
    for path in repository.root.iterdir():
        if path.name == ".git":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    staging = repository.root / ".git" / "new-source"
    _unpack(archive, move.version, staging)
    for path in staging.iterdir():
        path.rename(repository.root / path.name)
    staging.rmdir()
    repository.commit(f"llama-cpp-python {move.version}")
    repository.git("tag", "--force", BASE)
    _memory(repository).write_text(json.dumps(asdict(move)), "utf-8")


def _memory(repository: Repository) -> Path:
    return repository.root / ".git" / "engine-bump.json"


def resume(root: Path) -> tuple[Repository, Move]:
    """The move that was begun in ``root``.

    Raises:
        UsageError: none was.
    """
    repository = Repository(root)
    try:
        return repository, Move(**json.loads(_memory(repository).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"no move of the pin was begun in {root}", remedy="bin/engine-bump VERSION begins one"
        ) from error


def carry_over(repository: Repository, say: Say) -> bool:
    """Bring over what is left of the queue; False when a person has to resolve a conflict first.

    Raises:
        EngineError: a conflict that was left is not resolved yet.
    """
    _finish_merge(repository)
    waiting = repository.git("rev-list", "--reverse", f"old-base..{_OLD}").split()
    done = int(repository.git("rev-list", "--count", f"{BASE}..HEAD"))
    for number, commit in enumerate(waiting[done:], done + 1):
        title = repository.git("show", "--no-patch", "--format=%s", commit).strip()
        misfit = _misfit(repository, commit)
        if repository.succeeds("cherry-pick", "--allow-empty", "--keep-redundant-commits", commit):
            say(f"{number:4} {title}: {f'merged ({misfit})' if misfit else 'applies exactly'}")
            continue
        torn = repository.git("diff", "--name-only", "--diff-filter=U").split()
        say(f"{number:4} {title}: CONFLICT ({misfit or 'git could not merge it'})")
        say(
            f"\nResolve {', '.join(torn) or 'it'} in {repository.root}, `git add` the result there, "
            "then: bin/engine-bump --continue"
        )
        return False
    return True


def _finish_merge(repository: Repository) -> None:
    if not (repository.root / ".git" / "CHERRY_PICK_HEAD").exists():
        return
    torn = repository.git("diff", "--name-only", "--diff-filter=U").split()
    marked = [
        name for name in repository.git("diff", "--name-only", "HEAD").split() if _has_marks(repository.root / name)
    ]
    if torn or marked:
        raise EngineError(
            f"not resolved yet in {repository.root}: {', '.join(sorted({*torn, *marked}))}",
            remedy="edit, `git add`, then: bin/engine-bump --continue",
        )
    repository.git("-c", "core.editor=true", "cherry-pick", "--continue")


def _has_marks(path: Path) -> bool:
    return path.is_file() and re.search(rb"^(<{7}|>{7}) ", path.read_bytes(), re.MULTILINE) is not None


def _misfit(repository: Repository, commit: str) -> str:
    """The first hunk of the commit that does not apply exactly to the tree as it is; empty when all do."""
    difference = repository.git("diff", "--no-color", "--no-renames", f"{commit}^", commit)
    for change in parse_patch(difference.encode(errors="surrogateescape")):
        target = repository.root / change.path
        try:
            if change.creates and target.exists():
                return f"{change.path} exists already"
            apply_hunks(b"" if change.creates else target.read_bytes(), change.hunks)
        except ValueError as error:
            return f"{change.path}: {error}"
        except OSError:
            return f"{change.path} is gone"
    return ""


def finish(repository: Repository, move: Move, checkout: Path, say: Say) -> None:
    """Write the queue and the pin of the checkout."""
    patches = export(repository)
    before = len(read_queue(checkout / "patches"))
    for name in write_queue(patches, checkout / "patches"):
        say(f"patches/{name}")
    pin = checkout / "mesh" / "engine" / "pin.py"
    pin.write_text(repinned(pin.read_text("utf-8"), move), "utf-8")
    say("mesh/engine/pin.py")
    protocol = protocol_of(repository.root)
    if protocol != move.protocol:
        say(f"\nRPC protocol {move.protocol} -> {protocol}: commands, operations and types may have other numbers now.")
        say("The tests name some: tests/net/rpc_client.py, tests/net/rpc_frames.py.")
    if len(patches) != before:
        say(f"\n{before} patches became {len(patches)}.")
    say("\nNext: bin/test, then the measurements that the patches' headers tell; then commit patches/ and the pin.")


def repinned(text: str, move: Move) -> str:
    """``pin.py`` with another version and hash.

    Raises:
        EngineError: it does not say them where they were.
    """
    for name, value in (("VERSION", move.version), ("SHA256", move.sha256)):
        text, count = re.subn(rf'^{name} = "[^"]*"$', f'{name} = "{value}"', text, flags=re.MULTILINE)
        if count != 1:
            raise EngineError(f"mesh/engine/pin.py has {count} lines that set {name}, not one", remedy="set it by hand")
    return text


def protocol_of(tree: Path) -> str:
    """The number of the RPC protocol that a source says it speaks."""
    try:
        said = dict(_PROTOCOL.findall((tree / "ggml" / "include" / "ggml-rpc.h").read_text("utf-8", "replace")))
    except OSError:
        said = {}
    return ".".join(said.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
