"""Small files that must never be half-written nor read by others."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TypeVar

import msgspec

from mesh.errors import StateError

T = TypeVar("T")


def write_private(path: Path, data: bytes, *, exclusive: bool = False) -> bool:
    """Put ``data`` at ``path`` with mode 0600, whole or not at all, and on disk before this returns.

    Returns:
        False, with the file untouched, when ``exclusive`` and ``path`` already exists; else True.

    Raises:
        StateError: the directory cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not exclusive:
            draft.replace(path)
        elif not _place_new(draft, path):
            return False
        _sync_directory(path.parent)
    except OSError as error:
        raise StateError(
            f"cannot write {path}: {error.strerror or error}",
            remedy="check the disk and the permissions of the directory, or choose another --state-dir",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return True


def _place_new(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:
        # No hard links on this file system. Two processes creating at once are kept apart by the state
        # directory's lock; this only guards what already lies there.
        if path.exists():
            return False
        draft.rename(path)
    return True


def _sync_directory(directory: Path) -> None:
    # The new name must outlast a power cut: a use of an invite that was burned must stay burned.
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: Path) -> bytes | None:
    """The content of ``path``; None when there is no such file.

    Raises:
        StateError: unreadable, or on POSIX readable by other users.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if os.name == "posix" and mode & 0o077:
                raise StateError(
                    f"{path} can be read or written by other users of this machine (mode {mode & 0o777:o})",
                    remedy=f"if nobody else can have seen it:  chmod 600 {path}",
                )
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror or error}") from error


def save(path: Path, value: msgspec.Struct) -> None:
    """Write ``value`` as JSON, atomically, mode 0600.

    Raises:
        StateError: the directory cannot be written.
    """
    write_private(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def load(path: Path, kind: type[T]) -> T | None:
    """Read what :func:`save` wrote; None when there is no such file.

    Raises:
        StateError: unreadable, damaged, or open to other users.
    """
    data = read_private(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateError(
            f"{path} is damaged: {error}", remedy="restore it from a copy, or move it away and join the mesh again"
        ) from error
