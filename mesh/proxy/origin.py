"""Whose a request is, as the engine is told of it: ``X-Mesh-Request``. Pure.

The same header comes with every try of one request, so that whatever an engine makes up for its answer (ids, the seed
of its sampling) is the same after a replay, and its queue knows how long the request waits already, and for whom.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from dataclasses import dataclass

HEADER = b"X-Mesh-Request"
RESERVED_PREFIX = b"x-mesh-"
"""Headers of clients that begin so are dropped: what they say is said by the ingress alone."""
MAX_SEED = 0xFFFFFFFE
"""The largest 32-bit number means "any" to the engine."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Args:
    id: random hex.
    seed: of the sampling, where the request names none.
    client: what is the same for all requests of one client at one ingress, and tells nothing else.
    """

    id: str
    seed: int
    client: str

    def header(self, age_s: float) -> tuple[bytes, bytes]:
        """Args:
        age_s: how long ago the request arrived at its ingress.
        """
        said = {"id": self.id, "seed": self.seed, "age_ms": max(0, int(1000 * age_s)), "client": self.client}
        return HEADER, json.dumps(said, separators=(",", ":")).encode()


def client_tag(secret: bytes, key: str | None, address: str | None) -> str:
    """Who a client is among the others.

    Args:
        secret: of this run of this node, so that nobody who is told the tag can try keys on it, and tags of two
            ingresses never mean the same client.
        key: the API key that let it in; None where none was asked for: anybody could make one up for each request.
        address: else. Of IPv6 the network: one machine has as many addresses there as it likes.
    """
    who = f"key {key}" if key is not None else f"address {_network(address)}"
    return hmac.new(secret, who.encode(), hashlib.sha256).hexdigest()[:16]


def _network(address: str | None) -> str:
    try:
        parsed = ipaddress.ip_address((address or "").split("%")[0])
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None and not parsed.is_loopback:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
