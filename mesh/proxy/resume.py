"""How an engine is asked to go on where another was lost, and when there is nothing left to ask for. Pure.

The engine is *forced* along the tokens that the client has the text of: it takes the original request and these tokens,
runs each through the same machinery as if it had just sampled it, with the output muted, and goes on aloud.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

from mesh.proxy.dialect import Dialect, Family
from mesh.proxy.transcript import Transcript

RESUME_HEADER = (b"X-Mesh-Resume", b"1")


def may_be_wrapped(body: bytes) -> bool:
    """Whether ``body`` looks like the JSON object that a continuation must carry along; the engine took it for one."""
    return body[:64].lstrip()[:1] == b"{"


def wrap(body: bytes, choices: Sequence[array[int] | None]) -> tuple[bytes, ...]:
    """The body of a continuation, in pieces: ``{"body": as it came, "choices": [{"tokens": [..]} or null, ..]}``."""
    told = (b"null" if ids is None else b'{"tokens":[%s]}' % ",".join(map(str, ids)).encode() for ids in choices)
    return b'{"body":', body, b',"choices":[', b",".join(told), b"]}"


def closing_mark(dialect: Dialect, body: bytes, transcript: Transcript) -> bytes | None:
    """What ends a stream of which every choice was delivered to its end, but for the mark itself.

    None: there is more to come, or the dialect has no mark apart from its last block. The engine is gone by then, so
    the mark may as well be ours.
    """
    if dialect.family is not Family.OPENAI or not transcript.resumable:
        return None
    closings = transcript.closings
    if not closings or len(closings) != _expected_choices(body) or not all(map(_is_finished, closings)):
        return None
    return b"data: [DONE]\n\n"


def _is_finished(block: bytes) -> bool:
    return any(_has_reason(line) for line in block.splitlines())


def _has_reason(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    try:
        choices = json.loads(line[6:]).get("choices")
        return any(choice.get("finish_reason") is not None for choice in choices)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def _expected_choices(body: bytes) -> int:
    try:
        asked: dict[str, Any] = json.loads(body)
        n = int(asked.get("n") or asked.get("n_cmpl") or 1)
        prompt = asked.get("prompt")
        # A list of tokens is one prompt, a list of texts or of lists is as many.
        several = isinstance(prompt, list) and len(prompt) > 0 and all(isinstance(one, str | list) for one in prompt)
        return n * len(prompt) if several and isinstance(prompt, list) else n
    except (ValueError, TypeError, AttributeError, RecursionError):
        return 0
