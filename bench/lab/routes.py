"""Where packets go: machines on the open internet, machines in homes behind a NAT, and the NATs between. Pure.

A packet is translated outwards when its machine sends it, and inwards when the link has delivered it: a hole punched
while it was under way lets it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.lab.nat import Nat
from bench.lab.packet import Flow, flow_of, rewrite


@dataclass(slots=True)
class HomeNetwork:
    """Machines behind one NAT, by packed address."""

    nat: Nat
    machines: dict[bytes, int] = field(default_factory=dict)


class Routes:
    """Who has which address.

    Args:
        count: of machines; they are numbered from 0 and have no address until placed.
        homes: by number.
    """

    def __init__(self, count: int, homes: list[HomeNetwork]) -> None:
        self.homes = homes
        self._public: dict[bytes, int] = {}
        self._home_of: list[HomeNetwork | None] = [None] * count

    def place(self, machine: int, addresses: list[bytes], home: int | None) -> None:
        """Put a machine into a home, or onto the open internet; it leaves where it was."""
        for network in self.homes:
            for address in [address for address, other in network.machines.items() if other == machine]:
                del network.machines[address]
                network.nat.forget(address)
        for address in [address for address, other in self._public.items() if other == machine]:
            del self._public[address]
        self._home_of[machine] = None if home is None else self.homes[home]
        table = self._public if home is None else self.homes[home].machines
        table.update(dict.fromkeys(addresses, machine))

    def near(self, machine: int) -> dict[bytes, int]:
        """The addresses that a machine reaches without a NAT in between, its own among them; stays up to date."""
        home = self._home_of[machine]
        return self._public if home is None else home.machines

    def neighbours(self, machine: int) -> list[int]:
        """Who hears a multicast: the same home or, in a lab without homes, everyone. The internet carries none."""
        if self.homes and self._home_of[machine] is None:
            return []
        return [other for other in dict.fromkeys(self.near(machine).values()) if other != machine]

    def behind_nat(self, machine: int) -> bool:
        return self._home_of[machine] is not None

    def leave(self, machine: int, packet: bytes, now: float, *, partial: bool) -> tuple[int, bytes] | None:
        """A packet to an address that is not :meth:`near`: the machine at whose link it goes, and what it looks like
        there; None when it goes nowhere.

        For a goal behind a NAT the machine may be any of the home's: only the NAT decides, in :meth:`arrive`.
        """
        flow = flow_of(packet)
        if flow is None:
            return None
        home = self._home_of[machine]
        if home is not None:
            if flow.goal.host == home.nat.public and not home.nat.hairpin:
                home.nat.refused_out += 1
                return None
            outside = home.nat.outbound(flow, now)
            if outside is None:
                return None
            flow, packet = outside, rewrite(packet, outside, partial=partial)
        goal = self._public.get(flow.goal.host)
        if goal is None:
            goal = self._at_home(flow)
        return None if goal is None else (goal, packet)

    def arrive(self, machine: int, packet: bytes, now: float, *, partial: bool) -> tuple[int, bytes] | None:
        """A packet that came over the link of ``machine``: who gets it, and what it looks like there; None when the
        home's NAT keeps it out."""
        home = self._home_of[machine]
        if home is None or packet[16:20] != home.nat.public:
            return machine, packet
        flow = flow_of(packet)
        inside = None if flow is None else home.nat.inbound(flow, now)
        if inside is None or inside.goal.host not in home.machines:
            return None
        return home.machines[inside.goal.host], rewrite(packet, inside, partial=partial)

    def _at_home(self, flow: Flow) -> int | None:
        for home in self.homes:
            if home.nat.public == flow.goal.host:
                owner = home.machines.get(home.nat.owner(flow) or b"")
                return next(iter(home.machines.values()), None) if owner is None else owner
        return None
