"""Ports for servers that are told theirs."""

from __future__ import annotations

import random
import socket

OURS = range(15_000, 32_000)
"""Below those that a system gives to whoever connects somewhere: one of them may be gone before a server has it."""


def free_port() -> int:
    """A TCP port that nobody has."""
    chance = random.SystemRandom()
    while True:
        port = chance.choice(OURS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
