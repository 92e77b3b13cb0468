"""A STUN server (RFC 8489, Binding over UDP and IPv4 or IPv6) that can also misbehave.

    python -m bench.lab.stunserver ADDRESS PORT [--lie HOST:PORT | --silent | --garble]

It says one line once it listens. ``--lie`` answers every request with that address, ``--silent`` with nothing,
``--garble`` with noise; each is correct otherwise, the transaction id included.
"""

from __future__ import annotations

import argparse
import ipaddress
import random
import socket
import struct
import sys
from collections.abc import Sequence

MAGIC = 0x2112A442
BINDING_REQUEST, BINDING_SUCCESS, BINDING_ERROR = 0x0001, 0x0101, 0x0111
ERROR_CODE, UNKNOWN_ATTRIBUTES, XOR_MAPPED_ADDRESS, SOFTWARE = 0x0009, 0x000A, 0x0020, 0x8022
_HEADER = struct.Struct("!HHI12s")
_UNDERSTOOD = frozenset((0x0006, 0x0008, 0x0014, 0x0015))
"""Attributes of a request that a server without passwords may pass over, though they must be understood."""
Address = tuple[str, int]


def answer(datagram: bytes, source: Address) -> bytes | None:
    """The response to a Binding request from ``source``; None for whatever is none."""
    if len(datagram) < _HEADER.size:
        return None
    kind, length, magic, transaction = _HEADER.unpack_from(datagram)
    if kind != BINDING_REQUEST or magic != MAGIC or length % 4 or length != len(datagram) - _HEADER.size:
        return None
    unknown, at = [], _HEADER.size
    while at < len(datagram):
        name, size = struct.unpack_from("!HH", datagram, at)
        if at + 4 + size > len(datagram):
            return None
        if name < 0x8000 and name not in _UNDERSTOOD:
            unknown.append(name)
        at += 4 + size + -size % 4
    if unknown:
        names = struct.pack(f"!{len(unknown)}H", *unknown)
        refusal = _attribute(ERROR_CODE, struct.pack("!HBB", 0, 4, 20) + b"Unknown Attribute")
        return _message(BINDING_ERROR, transaction, refusal + _attribute(UNKNOWN_ATTRIBUTES, names))
    mapped = _attribute(XOR_MAPPED_ADDRESS, _xored(source, transaction))
    return _message(BINDING_SUCCESS, transaction, mapped + _attribute(SOFTWARE, b"mesh lab"))


def _xored(address: Address, transaction: bytes) -> bytes:
    ip = ipaddress.ip_address(address[0])
    mask = (struct.pack("!I", MAGIC) + transaction)[: len(ip.packed)]
    host = bytes(a ^ b for a, b in zip(ip.packed, mask, strict=True))
    return struct.pack("!HH", 1 if ip.version == 4 else 2, address[1] ^ MAGIC >> 16) + host


def _attribute(name: int, value: bytes) -> bytes:
    return struct.pack("!HH", name, len(value)) + value + bytes(-len(value) % 4)


def _message(kind: int, transaction: bytes, attributes: bytes) -> bytes:
    return _HEADER.pack(kind, len(attributes), MAGIC, transaction) + attributes


def address_of(text: str) -> Address:
    """``HOST:PORT``, an IPv6 host in brackets.

    Raises:
        ValueError: it is neither.
    """
    host, _, port = text.rpartition(":")
    return str(ipaddress.ip_address(host.strip("[]"))), int(port)


def serve(listener: socket.socket, *, lie: Address | None = None, silent: bool = False, garble: bool = False) -> None:
    """Answer until the socket is closed or fails."""
    while True:
        datagram, source = listener.recvfrom(2048)
        response = answer(datagram, lie or source[:2])
        if response is None or silent:
            continue
        if garble:
            response = response[:20] + random.randbytes(len(response) - 20)
        listener.sendto(response, source)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lab.stunserver", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", help="to listen on")
    parser.add_argument("port", type=int)
    manner = parser.add_mutually_exclusive_group()
    manner.add_argument("--lie", type=address_of, metavar="HOST:PORT", help="what to tell everybody")
    manner.add_argument("--silent", action="store_true", help="never answer")
    manner.add_argument("--garble", action="store_true", help="answer with noise after the header")
    options = parser.parse_args(arguments)
    family = socket.AF_INET6 if ":" in options.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as listener:
        listener.bind((options.address, options.port))
        print(f"listening on {options.address} port {listener.getsockname()[1]}", flush=True)
        try:
            serve(listener, lie=options.lie, silent=options.silent, garble=options.garble)
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
