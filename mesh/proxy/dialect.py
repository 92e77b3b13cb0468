"""How each family of endpoints says "error" and "this is the end". Pure.

Sources: OpenAI's and Anthropic's API references, llama-server's README.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mesh.proxy.failure import Failure

COMMENT = b": waiting for the mesh\n\n"
"""An event stream's clients skip lines that begin with a colon."""


class Family(Enum):
    """Who an endpoint was modelled on."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    NATIVE = "native"
    OTHER = "other"


_FAMILIES = {
    "chat/completions": Family.OPENAI,
    "v1/chat/completions": Family.OPENAI,
    "v1/completions": Family.OPENAI,
    "audio/transcriptions": Family.OPENAI,
    "v1/audio/transcriptions": Family.OPENAI,
    "v1/responses": Family.RESPONSES,
    "responses": Family.RESPONSES,
    "v1/messages": Family.ANTHROPIC,
    "v1/messages/count_tokens": Family.ANTHROPIC,
    "completion": Family.NATIVE,
    "completions": Family.NATIVE,
    "infill": Family.NATIVE,
}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_RESPONSES_ENDS = (b"event: response.completed", b"event: response.failed", b"event: response.incomplete")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The manners of one endpoint."""

    family: Family

    @classmethod
    def of(cls, path: str) -> Dialect:
        return cls(_FAMILIES.get(path.strip("/"), Family.OTHER))

    @property
    def has_end_mark(self) -> bool:
        """Its streams say that they are complete."""
        return self.family is not Family.OTHER

    def is_end(self, event: bytes) -> bool:
        """Whether a stream that ended with ``event`` is complete. A stream that merely stops is not."""
        if self.family is Family.OTHER:
            return True
        if event.startswith((b'data: {"error"', b"error:", b"event: error")):
            return True
        if self.family is Family.OPENAI:
            return event.startswith(b"data: [DONE]")
        if self.family is Family.ANTHROPIC:
            return event.startswith(b"event: message_stop")
        if self.family is Family.RESPONSES:
            return event.startswith(_RESPONSES_ENDS)
        # Inside a JSON string the quotes would be escaped, so generated text cannot forge this.
        return b'"stop":true' in event

    def error_body(self, failure: Failure) -> dict[str, Any]:
        """The JSON of an error response."""
        if self.family is Family.ANTHROPIC:
            kind = _ANTHROPIC_KINDS.get(failure.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": failure.message}}
        return {
            "error": {
                "message": failure.message,
                "type": failure.kind,
                "code": failure.code,
                "param": failure.param,
            }
        }

    def error_event(self, failure: Failure) -> bytes:
        """One event that ends a stream in an error no client takes for the end of the answer."""
        body = self.error_body(failure)
        if self.family is Family.RESPONSES:
            body = {"type": "error", "code": failure.code, "message": failure.message, "param": failure.param, **body}
        return self._event(json.dumps(body, ensure_ascii=False).encode())

    def answer_event(self, status: int, body: bytes) -> bytes:
        """An answer that came whole, for a client that was already promised a stream."""
        try:
            compact = json.dumps(json.loads(body), ensure_ascii=False, separators=(",", ":")).encode()
        except ValueError:
            text = body[:1000].decode("utf-8", "replace")
            return self.error_event(Failure(status, "engine_error", "server_error", f"HTTP {status}: {text}"))
        return self._event(compact) if status >= 400 else b"data: " + compact + b"\n\n"

    def _event(self, data: bytes) -> bytes:
        named = self.family in (Family.ANTHROPIC, Family.RESPONSES)
        return (b"event: error\ndata: " if named else b"data: ") + data + b"\n\n"


def error_message(body: bytes) -> str:
    """What an engine's error response says."""
    try:
        return str(json.loads(body)["error"]["message"])[:1000]
    except (ValueError, TypeError, KeyError, RecursionError):
        return body[:200].decode("utf-8", "replace")
