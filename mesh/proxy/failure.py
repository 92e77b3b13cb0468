"""Every way a request can end without an answer, in words a person can act on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as OpenAI's clients know it; :mod:`mesh.proxy.dialect` renders it for the others.

    Args:
        status: of the response, where its headers are still to be sent.
        code: stable, for programs.
        kind: OpenAI's ``type``.
        retry_after_s: when trying again may help.
    """

    status: int
    code: str
    kind: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None


def not_serving(reason: str, waited_s: float, retry_after_s: int) -> Failure:
    waited = f" (waited {waited_s:.0f} s)" if waited_s >= 1 else ""
    message = f"the mesh serves no model right now{waited}: {reason}"
    return Failure(503, "mesh_not_serving", "service_unavailable", message, retry_after_s=retry_after_s)


def queue_full(held: int, retry_after_s: int) -> Failure:
    message = f"{held} requests already wait for the mesh to serve again; no more are taken"
    return Failure(429, "queue_full", "rate_limit_error", message, retry_after_s=retry_after_s)


def out_of_memory(limit_bytes: int, retry_after_s: int) -> Failure:
    message = f"the requests in flight hold {limit_bytes >> 20} MiB, as much as this node allows"
    return Failure(429, "memory_full", "rate_limit_error", message, retry_after_s=retry_after_s)


def engine_lost(losses: int, reason: str) -> Failure:
    message = f"the engine was lost {losses} times while answering this request, last: {reason}"
    return Failure(502, "engine_lost", "server_error", message)


def stream_interrupted(reason: str) -> Failure:
    message = f"the answer was cut short and is not complete: {reason}"
    return Failure(502, "stream_interrupted", "server_error", message)


def cannot_resume(reason: str) -> Failure:
    message = f"the engine was lost in the middle of the answer, and it cannot be continued faithfully: {reason}"
    return Failure(502, "cannot_resume", "server_error", message)


def stopping(reason: str) -> Failure:
    return Failure(503, "mesh_stopping", "service_unavailable", reason, retry_after_s=5)


def model_not_found(asked: str, served: str) -> Failure:
    message = f'the model "{asked}" does not exist here; this mesh serves "{served}"'
    return Failure(404, "model_not_found", "invalid_request_error", message, param="model")


def not_found(method: str, path: str) -> Failure:
    return Failure(404, "unknown_url", "invalid_request_error", f"unknown request URL: {method} {path}")


def wrong_method(method: str, path: str) -> Failure:
    return Failure(405, "method_not_allowed", "invalid_request_error", f"{path} does not take {method}")


def body_too_large(limit_bytes: int) -> Failure:
    message = f"the request's body is over the limit of {limit_bytes >> 20} MiB"
    return Failure(413, "request_too_large", "invalid_request_error", message)


def body_too_slow(seconds: float) -> Failure:
    message = f"the request's body stopped arriving for {seconds:.0f} s"
    return Failure(408, "request_timeout", "invalid_request_error", message)


def wrong_key() -> Failure:
    message = "this API wants one of its keys: Authorization: Bearer KEY"
    return Failure(401, "invalid_api_key", "authentication_error", message)


def wrong_host(host: str) -> Failure:
    message = f'the Host header names "{host}", which is not this node: use localhost or an address'
    return Failure(403, "wrong_host", "permission_error", message)


def wrong_origin(origin: str) -> Failure:
    return Failure(403, "wrong_origin", "permission_error", f'pages from "{origin}" may not use this API')
