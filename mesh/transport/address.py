"""``host:port`` as people write it, IPv6 hosts in brackets."""

from __future__ import annotations

import ipaddress

from mesh.errors import UsageError

MAX_ADDRESS = 128
"""Characters; what the wire carries."""


def split_address(text: str, *, default_port: int | None = None) -> tuple[str, int]:
    """``kitchen:7842``, ``10.0.0.5:7842`` or ``[fd00::5]:7842`` as host and port.

    Args:
        default_port: taken when ``text`` names none; a bare IPv6 address needs no brackets then.

    Raises:
        UsageError: not an address.
    """
    wrong = UsageError(
        f"{text!r} is not an address", remedy="write it as 192.168.1.5:7842, kitchen.lan:7842 or [fd00::5]:7842"
    )
    text = text.strip()
    if not text or len(text) > MAX_ADDRESS:
        raise wrong
    host, port_text = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(host) or (rest and not rest.startswith(":")):
            raise wrong
        port_text = rest[1:]
        if rest == ":":
            raise wrong
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
        if not port_text:
            raise wrong
    elif ":" in text and not _is_ipv6(text):
        raise wrong
    if not host or any(ord(c) <= 32 or c in "/@?#[]" for c in host):
        raise wrong
    if not port_text:
        if default_port is None:
            raise wrong
        return host, default_port
    if not (port_text.isascii() and port_text.isdigit()) or not 0 < int(port_text) < 65536:
        raise wrong
    return host, int(port_text)


def join_address(host: str, port: int) -> str:
    """The inverse of :func:`split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
