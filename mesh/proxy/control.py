"""What commands of this machine ask their node to do: ``POST /mesh/control/NAME``, opened by the node's own token."""

from __future__ import annotations

import hmac
import json
from typing import Any, Protocol

from mesh.errors import AdmissionError, MeshError, UsageError
from mesh.proxy.guard import bearer, check_origin
from mesh.proxy.http11 import Headers

MAX_CONTROL_BODY = 1 << 20
_STATUSES = {
    "usage": 400,
    "refused": 403,
    "state": 409,
    "model": 422,
    "plan": 422,
    "transport": 502,
    "wire": 502,
    "engine": 503,
    "not-a-code": 400,
    "code-typo": 400,
    "no-request": 404,
    "wrong-code": 403,
    "dropped": 403,
    "expired": 410,
}


class ControlApi(Protocol):
    """The node, as commands see it."""

    async def call(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """``invite``, ``revoke``, ``leave``, ``down``, ``plan``, ...

        Raises:
            UsageError: there is no such call, or its arguments are wrong.
            MeshError: it cannot be done.
        """
        ...


def check_control(headers: Headers, token: str) -> None:
    """Raises:
    AdmissionError: a browser page asks, or somebody who cannot read the node's state directory.
    """
    refused = check_origin(headers, same_only=True)
    if refused is not None:
        raise AdmissionError(refused.message)
    if not token or not hmac.compare_digest((bearer(headers) or "").encode(), token.encode()):
        raise AdmissionError(
            "the control token is missing or wrong", remedy="use the mesh command on the node's own machine"
        )


async def answer_control(api: ControlApi, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """``(HTTP status, JSON)`` of one call."""
    try:
        return 200, await api.call(name, _arguments(body))
    except MeshError as error:
        return refusal(error)


def refusal(error: MeshError) -> tuple[int, dict[str, Any]]:
    """A :class:`MeshError` as the command line reads it back."""
    problem = {"code": error.code, "message": error.message, "remedy": error.remedy}
    return _STATUSES.get(error.code, 500), {"error": problem}


def _arguments(body: bytes) -> dict[str, Any]:
    try:
        arguments = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the arguments are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise UsageError("the arguments are not a JSON object")
    return arguments
