"""What a link between two machines does to packets, and the links that have names.

All of it is per direction: ``delay_s`` is one way, a rate is shared by nothing but the packets of one direction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

BURST_S = 0.064
"""Seconds of traffic a queue holds on top of what is in flight: what home routers and switches roughly have."""


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a path.

    Args:
        delay_s: one way, without queueing.
        jitter_s: every packet takes ``delay_s`` plus or minus up to this; packets never overtake one another.
        loss: share of packets that vanish, 0 to 1.
        bytes_per_second: of IP packets; None for no limit.
        name: what tables call it.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_second: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.delay_s < 0 or not 0 <= self.jitter_s <= self.delay_s:
            raise ValueError(f"a link's jitter must be between 0 and its delay: {self}")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"a link's loss is a share between 0 and 1: {self}")
        if self.bytes_per_second is not None and self.bytes_per_second < 1000:
            raise ValueError(f"a link's rate must be at least 1 kB/s: {self}")

    @property
    def queue_s(self) -> float:
        """Seconds a packet may wait for its turn before the queue is full (drop-tail): one round trip plus a burst."""
        return BURST_S + 2 * (self.delay_s + self.jitter_s)

    @property
    def takes_trains(self) -> bool:
        """Whether a train of TCP segments may cross in one piece: too fast to tell, and none can be lost alone."""
        return not self.loss and (self.bytes_per_second is None or self.bytes_per_second >= 50e6)

    def describe(self) -> str:
        """One way, for people: ``20 ms, 5 MB/s``."""
        delay = f"{self.delay_s * 1e3:g}"
        if self.jitter_s:
            delay += f"±{self.jitter_s * 1e3:g}"
        words = [f"{delay} ms"]
        if self.bytes_per_second is not None:
            words.append(f"{self.bytes_per_second / 1e6:g} MB/s")
        if self.loss:
            words.append(f"{self.loss:.3g} loss" if self.loss < 0.001 else f"{self.loss * 100:g}% loss")
        return ", ".join(words)


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link(delay_s=0.0001, bytes_per_second=125e6, name="lan"),
        Link(delay_s=0.005, jitter_s=0.002, bytes_per_second=30e6, name="wifi"),
        Link(delay_s=0.010, bytes_per_second=5e6, name="wan20"),
        Link(delay_s=0.020, bytes_per_second=5e6, name="wan40"),
        Link(delay_s=0.150, jitter_s=0.020, loss=0.02, name="bad"),
    )
}
"""Named after the round trip where they have one: ``wan40`` is 20 ms each way."""

_PART = re.compile(
    r"(?P<delay>[\d.]+)(?:(?:±|\+-)(?P<jitter>[\d.]+))?ms|(?P<rate>[\d.]+)(?P<unit>[kMG])B/s|(?P<loss>[\d.]+)%"
)
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


def parse_link(text: str) -> Link:
    """A link by name, or spelt out one way: ``20ms,30MB/s``, ``5±2ms,30MB/s,1%`` (delay, rate, loss).

    Raises:
        ValueError: neither.
    """
    if text in LINKS:
        return LINKS[text]
    link = Link(name=text)
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{text!r} is no link: use one of {', '.join(LINKS)}, or spell it like 20ms,30MB/s,1%")
        if match["delay"]:
            link = replace(link, delay_s=float(match["delay"]) / 1e3, jitter_s=float(match["jitter"] or 0) / 1e3)
        elif match["rate"]:
            link = replace(link, bytes_per_second=float(match["rate"]) * _UNITS[match["unit"]])
        else:
            link = replace(link, loss=float(match["loss"]) / 100)
    return link
