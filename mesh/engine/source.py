"""Fetches the pinned source with the package client, and unpacks the engine's tree of it and nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Protocol

from mesh.engine.cache import cache_root
from mesh.engine.pin import ARCHIVE, PACKAGE, SHA256, TREE, VERSION, archive_name, data_dir
from mesh.errors import EngineError

_RAW_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)")


class BuildProgress(Protocol):
    """Who watches a build. Called from the thread that builds."""

    def phase(self, text: str) -> None:
        """A new piece of work begins; ``text`` is for people."""
        ...

    def advance(self, done: int, total: int, unit: str) -> None:
        """How far the piece is, in ``unit`` (``bytes`` or ``targets``)."""
        ...


def fetch_source(progress: BuildProgress) -> Path:
    """The source archive in the cache, downloaded if it is not there yet, its hash checked either way.

    Raises:
        EngineError: it cannot be downloaded, or is not what was pinned.
    """
    kept = cache_root() / "sources" / ARCHIVE
    if kept.is_file():
        progress.phase(f"checking the source ({PACKAGE} {VERSION})")
        if sha256_of(kept) == SHA256:
            return kept
        kept.unlink()
    progress.phase(f"fetching the source ({PACKAGE} {VERSION}, 77 MB)")
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Named like an unfinished build, so that one that was interrupted is swept with them.
    with tempfile.TemporaryDirectory(prefix="building-source-", dir=cache_root()) as scratch:
        fetched = download_source(VERSION, SHA256, Path(scratch), progress)
        digest = sha256_of(fetched)
        if digest != SHA256:
            raise EngineError(
                f"the source of the engine is not the pinned one: {fetched.name} has SHA-256 {digest}, not {SHA256}",
                remedy="check which package index pip is configured to use: pip config list",
            )
        fetched.replace(kept)
    return kept


def sha256_of(path: Path) -> str:
    """Hex, over the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_source(version: str, sha256: str | None, directory: Path, progress: BuildProgress) -> Path:
    """The archive of ``version`` from the package index, in ``directory``; pip checks the hash when one is known.

    Raises:
        EngineError: it cannot be had, or has another hash.
    """
    if importlib.util.find_spec("pip") is None:
        raise EngineError(
            "the engine's source is fetched with pip, which this Python does not have",
            remedy=f"{sys.executable} -m ensurepip --upgrade",
        )
    wanted = directory / "source.txt"
    wanted.write_text(f"{PACKAGE}=={version}{f' --hash=sha256:{sha256}' if sha256 else ''}\n", "utf-8")
    pip_version = tuple(int(n) for n in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--require-hashes"] if sha256 else []
    # The archive's own build backend would be installed and run to learn a name we know: see native/README.md.
    command += ["--no-build-isolation", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "raw" if pip_version >= (24, 1) else "off"]
    command += ["--dest", str(directory), "--requirement", str(wanted)]
    environment = dict(os.environ, PYTHONPATH=str(data_dir("native") / "metadata_only"), PYTHONUNBUFFERED="1")
    said: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := _RAW_PROGRESS.match(line):
                progress.advance(int(match[1]), int(match[2]), "bytes")
            else:
                said.append(line.rstrip())
    archive = directory / archive_name(version)
    if pip.returncode != 0 or not archive.is_file():
        raise EngineError(
            f"the engine's source ({PACKAGE} {version}) could not be downloaded:\n  " + "\n  ".join(said[-8:]),
            remedy="check the network connection, and try again: mesh engine build",
        )
    return archive


def unpack_source(archive: Path, into: Path, tree: PurePosixPath = TREE) -> Path:
    """Unpack the engine's tree below ``into``: regular files and directories only. Returns its root.

    Raises:
        EngineError: the archive is damaged, or wants to write elsewhere.
    """
    into.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                path = PurePosixPath(member.name)
                if not path.is_relative_to(tree) or ".." in path.parts or not (member.isfile() or member.isdir()):
                    continue
                target = into / path.relative_to(tree)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                content = members.extractfile(member)
                assert content is not None
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
                target.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise EngineError(
            f"the engine's source cannot be unpacked: {error}",
            remedy=f"free some disk space, or delete {archive} and try again",
        ) from error
    return into
