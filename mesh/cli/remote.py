"""How a command finds its node: over the API port on this machine."""

from __future__ import annotations

from typing import Any

import httpx

from mesh.errors import MeshError, StateError, UsageError
from mesh.node.statedir import Running


class RemoteError(MeshError):
    """The node refused, in its own words and with its own code."""

    def __init__(self, message: str, *, code: str, remedy: str | None) -> None:
        super().__init__(message, remedy=remedy, code=code)
        if code == UsageError.code:
            self.exit_code = UsageError.exit_code


def get_status(running: Running) -> dict[str, Any]:
    """``GET /mesh/status``."""
    return _ask("GET", running, "/mesh/status", None)


def call(running: Running, name: str, arguments: dict[str, Any], timeout_s: float = 15.0) -> dict[str, Any]:
    """One control call, for example ``invite``.

    Raises:
        RemoteError: the node says no.
        StateError: the node does not answer.
    """
    return _ask("POST", running, f"/mesh/control/{name}", arguments, timeout_s)


def _ask(
    method: str, running: Running, path: str, body: dict[str, Any] | None, timeout_s: float = 15.0
) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {running.token}"}
    try:
        # Loopback only: a proxy from the environment must never see the token.
        with httpx.Client(base_url=running.api_url, timeout=timeout_s, trust_env=False) as client:
            answer = client.request(method, path, json=body, headers=headers)
            value = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise StateError(
            f"the node (pid {running.pid}) does not answer at {running.api_url}: {error}",
            remedy="look at its log: mesh logs",
        ) from error
    if answer.status_code >= 400:
        problem = value.get("error", {}) if isinstance(value, dict) else {}
        message = problem.get("message", f"HTTP {answer.status_code}")
        raise RemoteError(message, code=problem.get("code", "failed"), remedy=problem.get("remedy"))
    return dict(value)
