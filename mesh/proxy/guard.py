"""Who may speak to the API at all. Pure checks on a request's head.

Known attacks these are for: a web page that makes the browser post to localhost; a name that resolves to this machine
only after the page has loaded (DNS rebinding); guessing a key by the time its refusal takes.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from mesh.proxy.failure import Failure, wrong_host, wrong_key, wrong_origin
from mesh.proxy.http11 import Headers


def header(headers: Headers, name: bytes) -> str | None:
    """The first value of ``name`` (lower case)."""
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), None)


def is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return False


def check_host(headers: Headers, allowed: Iterable[str]) -> Failure | None:
    """Refuse names that anybody may point at this machine. An address in ``Host`` cannot be rebound."""
    written = header(headers, b"host")
    if written is None:
        return None  # every browser sends one
    host = _hostname(written)
    if _is_address(host) or host == "localhost" or host.endswith(".localhost"):
        return None
    return None if host in {name.casefold() for name in allowed} else wrong_host(written)


def check_origin(headers: Headers, *, same_only: bool) -> Failure | None:
    """Refuse requests that a page from elsewhere makes a browser send.

    Args:
        same_only: pages of this very API alone may call; else any page of this machine and local applications may.
    """
    origin = header(headers, b"origin")
    if origin is None:
        return wrong_origin("another site") if _is_cross_site(headers) else None
    parts = urlsplit(origin)
    if same_only:
        own = header(headers, b"host")
        return None if parts.scheme in ("http", "https") and own and parts.netloc == own else wrong_origin(origin)
    if parts.scheme in ("http", "https"):
        host = _hostname(parts.netloc)
        local = host == "localhost" or host.endswith(".localhost") or is_loopback(host)
        return None if local or parts.netloc == header(headers, b"host") else wrong_origin(origin)
    # Sandboxed frames of any page send "null"; other schemes are desktop applications and editors.
    return wrong_origin(origin) if origin == "null" else None


def check_key(headers: Headers, keys: Sequence[str]) -> Failure | None:
    """Refuse a request without one of ``keys``, when there are any. OpenAI's header or Anthropic's."""
    if not keys:
        return None
    given = given_key(headers)
    # All keys are compared, so the time taken says nothing.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return None if any(matches) else wrong_key()


def given_key(headers: Headers) -> str:
    """What the request shows as its API key; ``""`` when it shows none."""
    return bearer(headers) or header(headers, b"x-api-key") or ""


def bearer(headers: Headers) -> str | None:
    value = header(headers, b"authorization")
    if value is None or value[:7].casefold() != "bearer ":
        return None
    return value[7:].strip()


def _is_cross_site(headers: Headers) -> bool:
    # Links and images carry no Origin, but browsers say where they came from.
    return header(headers, b"sec-fetch-site") == "cross-site" and header(headers, b"sec-fetch-mode") != "navigate"


def _hostname(netloc: str) -> str:
    try:
        return (urlsplit(f"//{netloc}").hostname or "").casefold()
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return True
