"""The HTTP face of a node: the engine's API passed through, and a few answers of the node's own."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from mesh.errors import AdmissionError, StateError, UsageError
from mesh.proxy import failure, guard
from mesh.proxy.budget import Share
from mesh.proxy.control import MAX_CONTROL_BODY, ControlApi, answer_control, check_control, refusal
from mesh.proxy.dialect import Dialect
from mesh.proxy.exchange import Ask
from mesh.proxy.failure import Failure
from mesh.proxy.ingress import Proxy
from mesh.proxy.metrics import CONTENT_TYPE
from mesh.proxy.origin import MAX_SEED, RESERVED_PREFIX, Origin, client_tag
from mesh.proxy.pages import FRONT_PAGE, health, model_list
from mesh.proxy.reply import STALL_S, Reply, without

MAX_BODY = 64 << 20
"""Bytes of one request; images and audio travel inside."""
_PARSE_ASIDE_BYTES = 1 << 20

# What llama-server answers outside /v1. Its tools, its proxy and its web interface are not for other machines.
ENGINE_PATHS = frozenset(
    {
        "/apply-template",
        "/audio/transcriptions",
        "/chat/completions",
        "/chat/completions/input_tokens",
        "/completion",
        "/completions",
        "/detokenize",
        "/embedding",
        "/embeddings",
        "/infill",
        "/lora-adapters",
        "/props",
        "/rerank",
        "/reranking",
        "/responses",
        "/responses/input_tokens",
        "/slots",
        "/tokenize",
    }
)
_PUBLIC = frozenset({"/", "/health", "/v1/health"})
_MODEL_LISTS = frozenset({"/v1/models", "/models"})
_STATUS = "/mesh/status"
_METRICS = frozenset({"/metrics", "/mesh/metrics"})
_CONTROL = "/mesh/control/"

# The engine's key goes in their place, and what belongs to this connection or this browser stays here. Without
# accept-encoding the engine never compresses, which would hold back the first tokens of a stream.
_NOT_FORWARDED = frozenset(
    {
        b"accept-encoding",
        b"authorization",
        b"connection",
        b"content-length",
        b"cookie",
        b"expect",
        b"host",
        b"keep-alive",
        b"origin",
        b"proxy-authorization",
        b"proxy-connection",
        b"referer",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
    }
)


class _Wish(msgspec.Struct):
    """The two fields of a request that the ingress must know; whatever their type, the engine judges it."""

    model: Any = None
    stream: Any = None


_wish_decoder = msgspec.json.Decoder(_Wish)


def create_app(
    proxy: Proxy,
    status: Callable[[], dict[str, Any]],
    control: ControlApi | None = None,
    *,
    control_token: str = "",
    api_keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    max_body: int = MAX_BODY,
    stall_s: float = STALL_S,
) -> ASGIApp:
    """The ASGI application of a node.

    Args:
        status: the JSON of ``GET /mesh/status``.
        control_token: opens ``POST /mesh/control/NAME``; empty: nothing does.
        api_keys: when there are any, every call of the API needs one.
        allowed_hosts: names (not addresses) that clients may reach this node by, besides localhost.
        max_body: bytes of one request.
        stall_s: how long a client may take nothing of its answer, or send nothing of its request.
    """
    return _Api(proxy, status, control, control_token, tuple(api_keys), tuple(allowed_hosts), max_body, stall_s)


class _Api:
    def __init__(
        self,
        proxy: Proxy,
        status: Callable[[], dict[str, Any]],
        control: ControlApi | None,
        control_token: str,
        api_keys: tuple[str, ...],
        allowed_hosts: tuple[str, ...],
        max_body: int,
        stall_s: float,
    ) -> None:
        self._proxy = proxy
        self._status = status
        self._control = control
        self._control_token = control_token
        self._api_keys = api_keys
        self._allowed_hosts = allowed_hosts
        self._max_body = max_body
        self._stall_s = stall_s
        self._tag_secret = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        reply = Reply(send, Dialect.of(path), stall_s=self._stall_s)
        refused = guard.check_host(scope["headers"], self._allowed_hosts)
        if refused is not None:
            await reply.fail(refused)
        elif path.startswith(_CONTROL):
            await self._answer_control(path.removeprefix(_CONTROL), scope, receive, reply)
        else:
            refused = self._refusal(path, scope)
            if refused is not None:
                await reply.fail(refused)
            elif not await self._answer_here(path, scope["method"], reply):
                await self._answer_by_engine(path, scope, receive, reply)

    def _refusal(self, path: str, scope: Scope) -> Failure | None:
        headers = scope["headers"]
        refused = guard.check_origin(headers, same_only=False)
        if refused is not None or path in _PUBLIC:
            return refused
        if path == _STATUS:
            client = scope.get("client")
            if guard.is_loopback(client[0] if client else None):
                return None
            if self._control_token and guard.check_key(headers, [self._control_token]) is None:
                return None
        return guard.check_key(headers, self._api_keys)

    # -- the node's own answers --------------------------------------------------------------------------------------

    async def _answer_here(self, path: str, method: str, reply: Reply) -> bool:
        """Whether the path is the node's own; then it is answered."""
        own = path in _PUBLIC or path == _STATUS or path in _MODEL_LISTS or path in _METRICS
        if method == "OPTIONS" or (own and method not in ("GET", "HEAD")):
            await reply.fail(failure.wrong_method(method, path))
        elif path == "/":
            await reply.whole(200, [(b"content-type", b"text/html; charset=utf-8")], FRONT_PAGE)
        elif path in _PUBLIC:
            await _say(reply, *health(self._proxy.route is not None))
        elif path == _STATUS:
            await _say(reply, 200, self._status())
        elif path in _METRICS:
            await reply.whole(200, [(b"content-type", CONTENT_TYPE)], await self._scrape(path))
        elif path in _MODEL_LISTS:
            seen = await self._proxy.peek(b"/v1/models")
            if seen is None:
                await _say(reply, 200, model_list(self._proxy.model_name))
            else:
                await reply.whole(*seen)
        elif path.startswith("/v1/models/") and method in ("GET", "HEAD"):
            await self._answer_model(path.removeprefix("/v1/models/"), reply)
        else:
            return False
        return True

    async def _scrape(self, path: str) -> bytes:
        """The node's own, after the engine's where those are expected."""
        seen = await self._proxy.peek(b"/metrics") if path == "/metrics" else None
        engines = b"" if seen is None else seen[2].rstrip(b"\n") + b"\n"
        return engines + self._proxy.metrics.render()

    async def _answer_model(self, asked: str, reply: Reply) -> None:
        listed = model_list(self._proxy.model_name)["data"]
        if listed and listed[0]["id"] == asked:
            await _say(reply, 200, listed[0])
        else:
            await reply.fail(failure.model_not_found(asked, self._proxy.model_name or "nothing yet"))

    async def _answer_control(self, name: str, scope: Scope, receive: Receive, reply: Reply) -> None:
        try:
            check_control(scope["headers"], self._control_token)
            if scope["method"] != "POST":
                raise UsageError(f"control calls are POST, not {scope['method']}")
            if self._control is None:
                raise StateError("this node takes no control calls")
        except (AdmissionError, UsageError, StateError) as error:
            await _say(reply, *refusal(error))
            return
        with Share(self._proxy.budget) as share:
            body = await _read_body(scope, receive, share, MAX_CONTROL_BODY, self._stall_s)
            if isinstance(body, bytes):
                await _say(reply, *await answer_control(self._control, name, body))
            elif body is not None:
                await reply.fail(body)

    # -- the engine's ------------------------------------------------------------------------------------------------

    async def _answer_by_engine(self, path: str, scope: Scope, receive: Receive, reply: Reply) -> None:
        if not _is_engines(path):
            await reply.fail(failure.not_found(scope["method"], path))
            return
        with Share(self._proxy.budget) as share:
            body = await _read_body(scope, receive, share, self._max_body, self._stall_s)
            if isinstance(body, bytes):
                ask = await _ask(path, scope, body, self._origin(scope))
                await self._proxy.carry(ask, reply, lambda: _gone(receive))
            elif body is not None:
                await reply.fail(body)

    def _origin(self, scope: Scope) -> Origin:
        key = guard.given_key(scope["headers"]) if self._api_keys else None
        client = scope.get("client")
        tag = client_tag(self._tag_secret, key, client[0] if client else None)
        return Origin(secrets.token_hex(16), secrets.randbelow(MAX_SEED + 1), tag)


def _is_engines(path: str) -> bool:
    # A dot segment would be judged here by one path and there by another.
    if ".." in path or "//" in path:
        return False
    return path.startswith("/v1/") or path in ENGINE_PATHS or path.startswith("/slots/")


async def _ask(path: str, scope: Scope, body: bytes, origin: Origin) -> Ask:
    method: str = scope["method"]
    target: bytes = scope["raw_path"]
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    headers = [
        (name, value)
        for name, value in without(scope["headers"], _NOT_FORWARDED)
        if not name.lower().startswith(RESERVED_PREFIX)
    ]
    # Megabytes of base64 would keep the loop, and with it every other stream, waiting.
    aside = len(body) > _PARSE_ASIDE_BYTES
    wish = await asyncio.to_thread(_wish, body) if aside else _wish(body)
    return Ask(
        method=method,
        path=path,
        target=target,
        headers=headers,
        body=body,
        dialect=Dialect.of(path),
        origin=origin,
        model=wish.model if isinstance(wish.model, str) else None,
        streams=wish.stream is True,
        # A question about the engine that runs now makes no sense when none does.
        holds=method not in ("GET", "HEAD"),
    )


def _wish(body: bytes) -> _Wish:
    try:
        return _wish_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Wish()


async def _read_body(
    scope: Scope, receive: Receive, share: Share, limit: int, stall_s: float
) -> bytes | Failure | None:
    """The whole body; or why it is not taken; or None when the client went away in the middle of it."""
    declared = guard.header(scope["headers"], b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        return failure.body_too_large(limit)
    pieces: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(stall_s):
                message = await receive()
        except TimeoutError:
            return failure.body_too_slow(stall_s)
        if message["type"] == "http.disconnect":
            return None
        piece: bytes = message.get("body", b"")
        size += len(piece)
        if size > limit:
            return failure.body_too_large(limit)
        if not share.take(len(piece)):
            return failure.out_of_memory(share.budget.total, 5)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _say(reply: Reply, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await reply.whole(status, headers, body)
