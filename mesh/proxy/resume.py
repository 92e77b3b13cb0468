"""How an engine is asked to go on where another was lost. Pure.

The engine is *forced* along the tokens that the client has the text of: it takes the original request and these tokens,
runs each through the same machinery as if it had just sampled it, with the output muted, and goes on aloud.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.proxy.transcript import Said

RESUME_HEADER = (b"X-Mesh-Resume", b"1")


def may_be_wrapped(body: bytes) -> bool:
    """Whether ``body`` looks like the JSON object that a continuation must carry along; the engine took it for one."""
    return body[:64].lstrip()[:1] == b"{"


def wrap(body: bytes, choices: Sequence[Said | None]) -> tuple[bytes, ...]:
    """The body of a continuation, in pieces: the original as it came, and what its client has already.

    ``{"body": .., "choices": [{"tokens": [..], "end": bool} or null, ..]}``
    """
    return b'{"body":', body, b',"choices":[', b",".join(map(_told, choices)), b"]}"


def _told(said: Said | None) -> bytes:
    if said is None:
        return b"null"
    tokens = ",".join(map(str, said.tokens)).encode()
    return b'{"tokens":[%s],"end":%s}' % (tokens, b"true" if said.ended else b"false")
