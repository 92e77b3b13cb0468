"""Which API keys open this node's API: from a file, from the environment, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mesh.errors import UsageError


def read_api_keys(path: Path | None, named: Sequence[str] = ()) -> tuple[str, ...]:
    """All keys, each once; none where neither is given.

    Args:
        path: a file with one key per line; ``#`` begins a comment.
        named: those of the environment.

    Raises:
        UsageError: the file is unreadable, or holds none.
    """
    return tuple(dict.fromkeys((*_in_file(path), *named)))


def _in_file(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file", remedy="it should hold API keys, one per line") from error
    except OSError as error:
        raise UsageError(
            f"cannot read the API keys in {path}: {error.strerror}", remedy="check the path given to --api-key-file"
        ) from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"{path} holds no API key", remedy="write one per line, or leave --api-key-file out")
    return keys
