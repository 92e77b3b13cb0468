"""A network in a box: machines as namespaces, links that delay, jitter, lose, limit and break, counted to the byte.

    with Lab(nodes=["a", "b"], link="wan40") as lab:
        lab.popen("b", ["some-server", "--host", lab.address("b")])
        lab.http("a", "GET", f"http://{lab.address('b')}:8080/")
        lab.cut("a", "b")

Needs Linux, root and ``/dev/net/tun``; :func:`lab_available` says what is missing.
"""

from __future__ import annotations

from bench.lab.lab import Lab, Timing
from bench.lab.links import LINKS, Link, parse_link
from bench.lab.namespaces import LabError, lab_available
from bench.lab.path import Counter

__all__ = ["LINKS", "Counter", "Lab", "LabError", "Link", "Timing", "lab_available", "parse_link"]
