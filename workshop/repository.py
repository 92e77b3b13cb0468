"""The patch queue as a git repository: the source, then one commit per patch, and back into files.

A patch's header is its commit's message: the subject first, then what follows ``Subject:`` in the file, word for word.
The name that the file had is kept in a last line of the message, without its number, which is the commit's place.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mesh.engine.patching import apply_patch, parse_patch
from mesh.engine.pin import Patch
from mesh.errors import EngineError

BASE = "engine-base"
"""The tag of the source without patches."""
_NAME = "Patch-name: "
_SUBJECT = "Subject: "
_NUMBER = re.compile(r"^\d+-")
# Nobody's settings may change what a diff looks like, or ask for a signature.
_SETTINGS = {"core.autocrlf": "false", "core.quotepath": "false", "commit.gpgsign": "false", "diff.noprefix": "false"}


class GitError(EngineError):
    """A git command failed; the message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Repository:
    """One git work tree of the engine's source."""

    root: Path

    def git(self, *arguments: str, fails: bool = False) -> str:
        """What the command prints.

        Args:
            fails: it may fail; then this is what it said instead.

        Raises:
            GitError: it failed, or git is not installed.
        """
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        try:
            done = subprocess.run(
                ["git", *settings, *arguments], cwd=self.root, env=_environment(), capture_output=True, check=False
            )
        except FileNotFoundError as error:
            raise GitError("git is needed for the engine's patches, and is not here", remedy="install git") from error
        said = (done.stdout if not done.returncode or not done.stderr else done.stderr).decode(errors="surrogateescape")
        if done.returncode and not fails:
            raise GitError(f"git {arguments[0]} failed in {self.root}:\n  {said.strip()}")
        return said

    def succeeds(self, *arguments: str) -> bool:
        """Whether the command ends well."""
        try:
            self.git(*arguments)
        except GitError:
            return False
        return True

    def commit(self, message: str) -> None:
        """Everything in the tree, also what the source itself ignores."""
        self.git("add", "--all", "--force")
        self.git("commit", "--quiet", "--allow-empty", "--no-verify", "--cleanup=verbatim", "--message", message)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    someone = {f"GIT_{role}_{what}": "engine-bump" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {**kept, **someone, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C"}


def begin(root: Path, title: str) -> Repository:
    """A repository whose first commit is the tree that lies in ``root``."""
    repository = Repository(root)
    repository.git("init", "--quiet", "--initial-branch=queue")
    # Whoever commits in it by hand has to be somebody, and need not have told git before.
    for name, value in {**_SETTINGS, "user.name": "engine-bump", "user.email": "engine-bump"}.items():
        repository.git("config", name, value)
    repository.commit(title)
    repository.git("tag", BASE)
    return repository


def add_patches(repository: Repository, patches: tuple[Patch, ...]) -> None:
    """One commit per patch, each applied exactly.

    Raises:
        EngineError: one does not fit.
    """
    for patch in patches:
        apply_patch(repository.root, patch)
        repository.commit(message_of(patch))


def message_of(patch: Patch) -> str:
    """The commit message that a patch's header becomes."""
    header = patch.content[: patch.content.index(b"diff --git ")].decode()
    subject, _, rest = header.strip().removeprefix(_SUBJECT).partition("\n")
    return f"{subject}\n\n{rest}\n\n{_NAME}{_NUMBER.sub('', patch.name)}\n"


def export(repository: Repository) -> tuple[Patch, ...]:
    """The queue that the commits since the base are.

    Raises:
        GitError: it is no repository of ours, has uncommitted changes, or a commit is not a patch.
    """
    if not repository.root.is_dir() or not repository.succeeds("rev-parse", "--verify", "--quiet", BASE):
        raise GitError(
            f"{repository.root} holds no patch queue",
            remedy="bin/engine-bump --open DIRECTORY makes a repository that does",
        )
    if repository.git("status", "--porcelain", "--untracked-files=no").strip():
        raise GitError(
            f"{repository.root} has changes that are in no commit, and would be lost",
            remedy="git commit --amend, git commit --fixup and git rebase --interactive --autosquash, or git restore",
        )
    commits = repository.git("rev-list", "--reverse", "--first-parent", f"{BASE}..HEAD").split()
    return tuple(_patch(repository, number, commit) for number, commit in enumerate(commits, 1))


def _patch(repository: Repository, number: int, commit: str) -> Patch:
    message = repository.git("show", "--no-patch", "--format=%B", commit).strip()
    lines = [line for line in message.splitlines() if not line.startswith(_NAME)]
    names = [line.removeprefix(_NAME) for line in message.splitlines() if line.startswith(_NAME)]
    name = names[-1] if names else re.sub(r"[^a-z0-9]+", "-", lines[0].lower()).strip("-") + ".patch"
    header = "\n".join([_SUBJECT + lines[0], *"\n".join(lines[1:]).strip().splitlines()])
    difference = repository.git(
        "diff", "--no-color", "--no-ext-diff", "--no-renames", "--abbrev=7", "--unified=3", f"{commit}^", commit
    )
    if "\ndeleted file mode " in difference:
        raise GitError(f"commit {commit[:9]} ({lines[0]}) cannot be a patch: patches delete no files")
    content = f"{header}\n\n{difference}".encode(errors="surrogateescape")
    try:
        if not parse_patch(content):
            raise ValueError("it changes nothing")
    except ValueError as error:
        raise GitError(f"commit {commit[:9]} ({lines[0]}) cannot be a patch: {error}") from error
    return Patch(f"{number:04d}-{name}", content)


def write_queue(patches: tuple[Patch, ...], directory: Path) -> list[str]:
    """Make ``directory`` hold exactly this queue; the names of the files that changed, appeared or went.

    The comments that ``series`` begins with stay.
    """
    series = directory / "series"
    said = series.read_text("utf-8").splitlines() if series.exists() else []
    comments = [line for line in said if line.startswith("#")]
    wanted = {patch.name: patch.content for patch in patches}
    wanted["series"] = "".join(f"{line}\n" for line in [*comments, *wanted]).encode()
    changed = [old.name for old in directory.glob("*.patch") if old.name not in wanted]
    for name in changed:
        (directory / name).unlink()
    for name, content in wanted.items():
        file = directory / name
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
            changed.append(name)
    return sorted(changed)
