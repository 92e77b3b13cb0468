"""Which ``model`` of a request means the one model the mesh serves."""

from __future__ import annotations

import re

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_ANY = frozenset({"", "default"})


def _stem(name: str) -> str:
    base = re.split(r"[/\\]", name)[-1]
    if base.lower().endswith(".gguf"):
        base = base[:-5]
    return _SHARD.sub("", base).casefold()


def means(asked: str | None, served: str) -> bool:
    """``asked`` is absent, ``default``, or the served model by name, stem, file name or path (case aside)."""
    if asked is None or asked.strip().casefold() in _ANY:
        return True
    return asked.casefold() == served.casefold() or _stem(asked) == _stem(served)
