"""Which machine is where and what its address is: the open internet, or a home behind a NAT. Pure.

Without homes all machines share one network, 10.77.0.0/24. With homes the outside is 11.77.0.0/16, which looks as
public to a program as any address, and every home has a private /24 of its own (or, when asked, the same as another's,
which is how homes really are).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.lab.links import Link, parse_link
from bench.lab.namespaces import LabError
from bench.lab.nat import KINDS, TIMEOUTS_S
from bench.lab.packet import TCP, UDP

_NAME = re.compile("[a-z0-9]{1,12}")
_HOSTS_PER_NETWORK = 250


@dataclass(frozen=True, slots=True)
class Home:
    """Machines behind one NAT.

    Args:
        kind: one of :data:`bench.lab.nat.KINDS`.
        machines: who lives there at first.
        subnet: the first three numbers of the private addresses; homes may share it. Each has its own when left out.
        hairpin: whether machines inside reach each other through the NAT's public address.
        preserve_port: give a machine the port outside that it uses inside, where it can.
        udp_timeout_s: how long a UDP mapping outlives the last packet out.
        tcp_timeout_s: the same of TCP.
        link: between machines of the home.
    """

    kind: str
    machines: Sequence[str] = ()
    subnet: str | None = None
    hairpin: bool = False
    preserve_port: bool = True
    udp_timeout_s: float = TIMEOUTS_S[UDP]
    tcp_timeout_s: float = TIMEOUTS_S[TCP]
    link: str | Link = "lan"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LabError(f"{self.kind!r} is no kind of NAT: {', '.join(KINDS)}")
        try:
            private = self.subnet is None or ipaddress.ip_network(f"{self.subnet}.0/24").is_private
        except ValueError:
            private = False
        if not private:
            raise LabError(f"a home's subnet is three numbers of a private network, like 192.168.1: {self.subnet!r}")


HomeLike = Home | tuple[str, Sequence[str]]


class Places:
    """Addresses of machines and NATs.

    Args:
        nodes: the machines.
        nat: machine to the kind of the NAT it sits behind, alone.
        homes: name to a :class:`Home`, or to its kind and machines.

    Raises:
        LabError: names that are none, a machine in two homes, no such kind of NAT.
    """

    def __init__(
        self, nodes: Sequence[str], nat: Mapping[str, str] | None = None, homes: Mapping[str, HomeLike] | None = None
    ) -> None:
        self.nodes = tuple(nodes)
        if len(set(self.nodes)) != len(self.nodes) or not all(_NAME.fullmatch(node) for node in self.nodes):
            raise LabError(f"machine names are distinct, of 1 to 12 lowercase letters and digits: {nodes}")
        self.homes = {node: Home(kind, (node,)) for node, kind in (nat or {}).items()}
        for name, home in (homes or {}).items():
            if name in self.homes or (name in self.nodes and name not in _home(home).machines):
                raise LabError(f"a home needs a name of its own: {name!r}")
            self.homes[name] = _home(home)
        self._home_of: dict[str, str] = {}
        for name, home in self.homes.items():
            for node in home.machines:
                if node not in self.nodes or node in self._home_of:
                    raise LabError(f"home {name!r}: {node!r} is no machine, or lives in another home too")
                self._home_of[node] = name
        self._subnets = {
            name: home.subnet or f"192.168.{number}" for number, (name, home) in enumerate(self.homes.items(), 1)
        }
        self._given: dict[str | None, int] = {}
        self._outside = {name: self._fresh(None) for name in self.homes}
        self._address = {node: self._fresh(self._home_of.get(node)) for node in self.nodes}

    def prefix_bits(self, node: str) -> int:
        """How long the network part of the machine's address is."""
        return 16 if self.homes and self._home_of.get(node) is None else 24

    def address(self, node: str) -> str:
        """The machine's own address, a private one behind a NAT."""
        if node not in self._address:
            raise LabError(f"no machine {node!r} in this lab: {', '.join(self.nodes)}")
        return self._address[node]

    def public_address(self, name: str) -> str:
        """What the internet sees of a machine or a home."""
        home = self.home_of(name)
        return self.address(name) if home is None else self._outside[home]

    def home_of(self, name: str) -> str | None:
        """The home of a machine, or the home of that name; None for a machine on the open internet.

        Raises:
            LabError: neither.
        """
        if name not in self.homes and name not in self.nodes:
            raise LabError(f"no machine or home {name!r} in this lab")
        return self._home_of.get(name) if name in self.nodes else name

    def need_home(self, name: str) -> str:
        """Like :meth:`home_of`.

        Raises:
            LabError: the machine is not behind a NAT.
        """
        home = self.home_of(name)
        if home is None:
            raise LabError(f"{name!r} is not behind a NAT")
        return home

    def number(self, home: str | None) -> int | None:
        """The home's number among all homes."""
        return None if home is None else list(self.homes).index(home)

    def move(self, node: str, to: str | None) -> None:
        """Give the machine a new address: in home ``to``, or on the open internet."""
        if to is not None and to not in self.homes:
            raise LabError(f"no home {to!r} in this lab: {', '.join(self.homes) or 'it has none'}")
        self.address(node)
        self._home_of.pop(node, None)
        if to is not None:
            self._home_of[node] = to
        self._address[node] = self._fresh(self._home_of.get(node))

    def renumber(self, home: str) -> str:
        """Give the home's NAT a new outside address."""
        self._outside[home] = self._fresh(None)
        return self._outside[home]

    def default_link(self, a: str, b: str) -> Link | None:
        """What lies between two machines of one home; None for others."""
        home = self._home_of.get(a)
        return None if home is None or home != self._home_of.get(b) else as_link(self.homes[home].link)

    def setup(self) -> list[dict[str, Any]]:
        """The homes, for the router."""
        return [
            {
                "public": self._outside[name],
                "kind": home.kind,
                "hairpin": home.hairpin,
                "preserve_port": home.preserve_port,
                "timeouts_s": {"udp": home.udp_timeout_s, "tcp": home.tcp_timeout_s},
            }
            for name, home in self.homes.items()
        ]

    def _fresh(self, home: str | None) -> str:
        """An address that nobody had there, so that what is sent to an old one finds nobody."""
        given = self._given[home] = self._given.get(home, -1) + 1
        if home is None and self.homes:
            return f"11.77.{given // _HOSTS_PER_NETWORK}.{given % _HOSTS_PER_NETWORK + 1}"
        if given >= _HOSTS_PER_NETWORK:
            raise LabError(f"no address left in {self._subnets.get(home or '', '10.77.0')}.0/24")
        # A home's first address is its router's.
        return f"10.77.0.{given + 1}" if home is None else f"{self._subnets[home]}.{given + 2}"


def as_link(link: str | Link) -> Link:
    return parse_link(link) if isinstance(link, str) else link


def _home(home: HomeLike) -> Home:
    return home if isinstance(home, Home) else Home(home[0], tuple(home[1]))
