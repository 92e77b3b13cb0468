"""How five endpoints are asked, and what their answers say in terms that all of them share. Pure.

Sources: OpenAI's and Anthropic's API references, llama-server's README.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"
DELTA = "delta"
WHOLE = ("whole",)


class Wrong(Exception):  # noqa: N818 - an outcome
    """An answer that no client could make sense of, or two answers in one."""


class Refused(Exception):  # noqa: N818 - an outcome
    """An error that says what is wrong; ``code`` of it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Said:
    """An answer.

    Args:
        finish: why it ended, in the endpoint's own words.
        shape: kinds of events in their order, a run of text as one; :data:`WHOLE` of an answer in one piece.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    shape: tuple[str, ...] = WHOLE

    def unlike(self, expected: Said) -> str | None:
        """What differs from ``expected``, in words; None: nothing."""
        for name in self.__slots__:
            ours, theirs = getattr(self, name), getattr(expected, name)
            if ours != theirs:
                return f"{name}: {_short(ours)} is not {_short(theirs)}"
        return None


@dataclass(frozen=True, slots=True)
class Part:
    """What one event, or a whole answer, says."""

    kind: str
    text: str = ""
    ids: tuple[str, ...] = ()
    finish: str | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    all_text: str | None = None
    """The whole text so far, where an event repeats it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way to ask for text.

    Args:
        chats: takes messages, and sees the chat template.
        said: the words for ``(prompt, tokens)`` in a request.
        last: the kind of a stream's last event.
    """

    name: str
    path: str
    chats: bool
    said: Callable[[str, int], dict[str, Any]]
    whole: Callable[[Mapping[str, Any]], Part]
    event: Callable[[Mapping[str, Any]], Part]
    last: str

    def body(self, prompt: str, tokens: int, streams: bool) -> dict[str, Any]:
        return {**self.said(prompt, tokens), "temperature": 0, "stream": streams}

    def read_whole(self, body: bytes) -> Said:
        """An answer in one piece.

        Raises:
            Refused, Wrong: it is an error, or nothing that can be read.
        """
        answer = _json(body.decode("utf-8", "replace"))
        try:
            return _said(self.whole(answer), WHOLE)
        except (LookupError, TypeError, ValueError) as error:
            raise Wrong(f"{type(error).__name__} {error} in {_short(body)}") from error


@dataclass(slots=True)
class Stream:
    """Reads the lines of an event stream."""

    endpoint: Endpoint
    text: str = ""
    shape: list[str] = field(default_factory=list)
    _finish: str | None = None
    _prompt_tokens: int | None = None
    _tokens: int | None = None
    _ids: dict[str, str] = field(default_factory=dict)
    """By what stands before an id's first ``_`` or ``-``."""

    def line(self, line: str) -> bool:
        """Take a line in; whether it was part of the answer, and not a comment.

        Raises:
            Refused, Wrong: the stream ends in an error, or nobody could read it.
        """
        if not line.startswith(("data: ", "error: ")):
            return False
        if self.ended:
            raise Wrong(f"more after the end: {_short(line)}")
        said = line.split(": ", 1)[1]
        try:
            self._take(Part(DONE) if said == DONE else self.endpoint.event(_json(said)))
        except (LookupError, TypeError, ValueError) as error:
            raise Wrong(f"{type(error).__name__} {error} in {_short(line)}") from error
        return True

    @property
    def ended(self) -> bool:
        return bool(self.shape) and self.shape[-1] == self.endpoint.last

    def said(self) -> Said:
        """The whole answer; only after its end."""
        part = Part("", self.text, (), self._finish, self._prompt_tokens, self._tokens)
        return _said(part, tuple(self.shape))

    def _take(self, part: Part) -> None:
        if part.kind == "ping":
            return
        if part.kind != DELTA or self.shape[-1:] != [DELTA]:
            self.shape.append(part.kind)
        self.text += part.text
        if part.all_text is not None and part.all_text != self.text:
            raise Wrong(f"{part.kind} repeats {_short(part.all_text)}, and the parts said {_short(self.text)}")
        for name in part.ids:
            kind = name.replace("-", "_").split("_")[0]
            if self._ids.setdefault(kind, name) != name:
                raise Wrong(f"two ids in one answer: {self._ids[kind]} and {name}")
        self._finish = part.finish or self._finish
        self._prompt_tokens = self._prompt_tokens if part.prompt_tokens is None else part.prompt_tokens
        self._tokens = self._tokens if part.tokens is None else part.tokens


def _said(part: Part, shape: tuple[str, ...]) -> Said:
    if part.finish is None or part.prompt_tokens is None or part.tokens is None:
        raise Wrong("the answer does not say why it ended, or what it used")
    return Said(part.text, part.finish, part.prompt_tokens, part.tokens, shape)


def _json(text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise Wrong(f"no JSON: {_short(text)}") from error
    if not isinstance(answer, dict):
        raise Wrong(f"no object: {_short(text)}")
    told = answer.get("error")
    if isinstance(told, dict):
        raise Refused(str(told.get("code") or told.get("type")), str(told.get("message")))
    if answer.get("type") == "error" or (set(answer) >= {"code", "message"} and "choices" not in answer):
        raise Refused(str(answer.get("code")), str(answer.get("message")))
    return answer


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:70]} ... {text[-80:]}"


# -- the endpoints ---------------------------------------------------------------------------------------------------


def _openai_usage(usage: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if usage is None else {"prompt_tokens": usage["prompt_tokens"], "tokens": usage["completion_tokens"]}


def _chat_whole(answer: Mapping[str, Any]) -> Part:
    [choice] = answer["choices"]
    usage = _openai_usage(answer["usage"])
    return Part("whole", choice["message"]["content"], (answer["id"],), choice["finish_reason"], **usage)


def _chat_event(event: Mapping[str, Any]) -> Part:
    usage = _openai_usage(event.get("usage"))
    if not event["choices"]:
        return Part("usage", ids=(event["id"],), **usage)
    [choice] = event["choices"]
    delta, finish = choice["delta"], choice["finish_reason"]
    kind = "finish" if finish else "role" if delta.get("role") else DELTA
    return Part(kind, delta.get("content") or "", (event["id"],), finish, **usage)


def _text_whole(answer: Mapping[str, Any]) -> Part:
    [choice] = answer["choices"]
    return Part("whole", choice["text"], (answer["id"],), choice["finish_reason"], **_openai_usage(answer["usage"]))


def _text_event(event: Mapping[str, Any]) -> Part:
    [choice] = event["choices"]
    finish = choice["finish_reason"]
    usage = _openai_usage(event.get("usage"))
    return Part("finish" if finish else DELTA, choice["text"], (event["id"],), finish, **usage)


def _native(answer: Mapping[str, Any]) -> Part:
    if not answer["stop"]:
        return Part(DELTA, answer["content"])
    return Part(
        "stop", answer["content"], (), answer["stop_type"], answer["tokens_evaluated"], answer["tokens_predicted"]
    )


def _response(answer: Mapping[str, Any]) -> Part:
    [item] = answer["output"]
    [content] = item["content"]
    usage = answer["usage"]
    ids = (answer["id"], item["id"])
    status, text = answer["status"], content["text"]
    return Part("whole", text, ids, status, usage["input_tokens"], usage["output_tokens"])


def _response_event(event: Mapping[str, Any]) -> Part:
    kind = event["type"]
    if kind in ("response.completed", "response.incomplete"):
        whole = _response(event["response"])
        return Part(kind, "", whole.ids, whole.finish, whole.prompt_tokens, whole.tokens, whole.text)
    if kind == "response.output_text.delta":
        return Part(DELTA, event["delta"], (event["item_id"],))
    ids = [event[name]["id"] for name in ("response", "item") if name in event]
    ids += [event["item_id"]] if "item_id" in event else []
    return Part(kind, "", tuple(ids), all_text=event.get("text"))


def _message(answer: Mapping[str, Any]) -> Part:
    [block] = answer["content"]
    usage = answer["usage"]
    return Part(
        "whole", block["text"], (answer["id"],), answer["stop_reason"], _anthropic_input(usage), usage["output_tokens"]
    )


def _anthropic_input(usage: Mapping[str, Any]) -> int:
    return int(usage["input_tokens"]) + int(usage.get("cache_read_input_tokens") or 0)


def _message_event(event: Mapping[str, Any]) -> Part:
    kind = event["type"]
    match kind:
        case "message_start":
            message = event["message"]
            return Part(kind, ids=(message["id"],), prompt_tokens=_anthropic_input(message["usage"]))
        case "content_block_delta":
            return Part(DELTA, event["delta"]["text"])
        case "message_delta":
            return Part(kind, finish=event["delta"]["stop_reason"], tokens=event["usage"]["output_tokens"])
    return Part(kind)


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


ENDPOINTS = (
    Endpoint(
        "chat",
        "/v1/chat/completions",
        True,
        lambda p, n: {"messages": _messages(p), "max_tokens": n, "stream_options": {"include_usage": True}},
        _chat_whole,
        _chat_event,
        DONE,
    ),
    Endpoint(
        "text",
        "/v1/completions",
        False,
        lambda p, n: {"prompt": p, "max_tokens": n},
        _text_whole,
        _text_event,
        DONE,
    ),
    Endpoint(
        "native",
        "/completion",
        False,
        lambda p, n: {"prompt": p, "n_predict": n},
        _native,
        _native,
        "stop",
    ),
    Endpoint(
        "responses",
        "/v1/responses",
        True,
        lambda p, n: {"input": p, "max_output_tokens": n},
        _response,
        _response_event,
        "response.completed",
    ),
    Endpoint(
        "messages",
        "/v1/messages",
        True,
        lambda p, n: {"messages": _messages(p), "max_tokens": n},
        _message,
        _message_event,
        "message_stop",
    ),
)
