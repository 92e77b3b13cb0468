"""A network in a box: machines as namespaces, links that delay, jitter, lose, limit and break, counted to the byte.

    with Lab(nodes=["a", "b"], link="wan40") as lab:
        lab.popen("b", ["some-server", "--host", lab.address("b")])
        lab.http("a", "GET", f"http://{lab.address('b')}:8080/")
        lab.cut("a", "b")

    with Lab(nodes=["a", "b", "stun"], link="wan20", nat={"a": "symmetric", "b": "port-restricted"}) as lab:
        lab.address("a"), lab.public_address("a")         # 192.168.1.2 and what the others see: 11.77.0.1
        lab.popen("stun", [sys.executable, "-m", "bench.lab.stunserver", lab.address("stun"), "3478"])
        lab.reboot_nat("a")
        lab.move("b")                                     # onto the open internet
        lab.block("a", "b", "tcp")

Kinds of NAT: ``full-cone``, ``address-restricted``, ``port-restricted``, ``symmetric``; :class:`Home` has the rest of
what can be set. Needs Linux, root and ``/dev/net/tun``; :func:`lab_available` says what is missing.
"""

from __future__ import annotations

from bench.lab.lab import Lab, Mapped, NatState, Timing
from bench.lab.links import LINKS, Link, parse_link
from bench.lab.namespaces import LabError, lab_available
from bench.lab.path import Counter
from bench.lab.places import Home

__all__ = [
    "LINKS",
    "Counter",
    "Home",
    "Lab",
    "LabError",
    "Link",
    "Mapped",
    "NatState",
    "Timing",
    "lab_available",
    "parse_link",
]
