"""Which homes reach which: two machines behind NATs of every kind, and a public one that introduces them.

    bin/bench nat --link wan20 --json figures.json
    bin/bench nat --kind symmetric --kind port-restricted

For every pair of kinds a mesh is started anew: a member with a public address (``--third``), two STUN servers, and one
machine behind a NAT of each kind. The two must carry a model together and each must answer from its own localhost. The
table says how they came to each other, how long after both APIs were up that took, and what the link measures. "Could
be" is what is possible at all: two NATs of which neither can know the other's port need a relay. Ends with 1 when a
pair served no tokens, or went through a relay without need. Needs root (see bench/lab).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import tables
from bench.lab import Lab, LabError, lab_available
from bench.lab.lab import ROOT
from bench.lab.nat import KINDS, Dependence
from bench.measure import BenchError, complete
from bench.meshnode import MeshNode, MeshNodeError, stop_all
from bench.models import find_model
from bench.tokps import find_programs
from mesh.errors import MeshError

OPEN = "none"
"""The kind of a machine that sits behind no NAT."""
DIRECT = ("quic", "tcp")
_STUN_PORT = 3478
_PROMPT, _TOKENS = "Once upon a time", 16


@dataclass(frozen=True, slots=True)
class Meeting:
    """What became of two machines.

    Args:
        paths: as each one's status shows the other at the end; None: no link.
        linked_s: until both had a link of any path, from when both APIs were up.
        direct_s: the same for a direct link.
        rtt_ms: of the link at the end, as the first one measures it.
        tokens_per_s: at each of the two; 0 where none came.
        problem: what went wrong, in words.
    """

    kinds: tuple[str, str]
    paths: tuple[str | None, str | None] = (None, None)
    linked_s: float | None = None
    direct_s: float | None = None
    rtt_ms: float | None = None
    tokens_per_s: tuple[float, float] = (0.0, 0.0)
    problem: str = ""

    @property
    def how(self) -> str:
        """``direct``, ``relay`` or ``not at all``: the worse of both sides."""
        if None in self.paths:
            return "not at all"
        return "direct" if set(self.paths) <= set(DIRECT) else "relay"

    @property
    def serves(self) -> bool:
        return all(self.tokens_per_s)

    @property
    def sound(self) -> bool:
        """Whether it went as well as it can."""
        return self.serves and (self.how == "direct" or could_be(*self.kinds) == "relay")


def could_be(kind: str, other: str) -> str:
    """``direct``, or ``relay`` where no direct path can exist: one side's port differs for everyone it speaks to, and
    the other lets nobody in at a port it has not written to."""

    def blind(mapper: str, filterer: str) -> bool:
        if OPEN in (mapper, filterer):
            return False
        everyone_another = KINDS[mapper].mapping is not Dependence.NOTHING
        return everyone_another and KINDS[filterer].filtering is Dependence.ADDRESS_AND_PORT

    return "relay" if blind(kind, other) or blind(other, kind) else "direct"


def pairs_of(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Every kind with every kind, itself among them."""
    return list(itertools.combinations_with_replacement(kinds, 2))


def peer_of(status: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """What a status says of a living member; empty when it knows none of that name."""
    peers = [] if status is None else status["peers"]
    return next((peer for peer in peers if peer["name"] == name and peer["state"] != "left"), {})


class Pair:
    """Two machines, ``a`` and ``b``, and the mesh they are in.

    Args:
        settle_s: how long a relayed link may take to become a direct one.
        third: what the public member is: ``relay-only``, or a ``worker`` like the others.
    """

    def __init__(
        self, lab: Lab, kinds: tuple[str, str], directory: Path, model: Path, *, third: str, settle_s: float
    ) -> None:
        self._kinds, self._settle_s, self._third = kinds, settle_s, third
        stun = ",".join(f"{lab.address(name)}:{_STUN_PORT}" for name in ("s1", "s2"))
        shared: dict[str, Any] = {"env": {"MESH_STUN": stun}}
        arguments = ("--split", "always", "--no-discovery")
        works = {**shared, "model": model, "arguments": arguments}
        relays = {**shared, "arguments": ("--relay-only", "--no-discovery")}
        self.meeting_place = MeshNode(lab, "p", directory, **(works if third == "worker" else relays))
        self.two = tuple(MeshNode(lab, name, directory, **works) for name in ("a", "b"))

    def start(self, within: float) -> None:
        """Start the public member, and let the two join through it."""
        self.meeting_place.start()
        self.meeting_place.wait(lambda status: True, within, "an API")
        token = self.meeting_place.invite(uses=2)
        for node in self.two:
            node.start(join=token)
        for node in self.two:
            node.wait(lambda status: True, within, "an API")

    def measure(self, within: float) -> Meeting:
        """See how the two come together, and let each generate."""
        began = time.monotonic()
        linked_s = self._until(lambda paths: all(paths), within)
        direct_s = None
        if linked_s is not None:
            direct = self._until(lambda paths: set(paths) <= set(DIRECT), self._settle_s)
            direct_s = None if direct is None else time.monotonic() - began
        problem, rates = "", (0.0, 0.0)
        try:
            rates = self._tokens(within)
        except (BenchError, MeshNodeError, httpx.HTTPError) as error:
            problem = f"{type(error).__name__}: {error}"
        rtt_ms = peer_of(self.two[0].status(), "b").get("rtt_ms")
        return Meeting(self._kinds, self._paths(), linked_s, direct_s, rtt_ms, rates, problem)

    def stop(self) -> None:
        stop_all([*self.two, self.meeting_place])

    def _paths(self) -> tuple[str | None, str | None]:
        a, b = self.two
        return peer_of(a.status(), "b").get("path"), peer_of(b.status(), "a").get("path")

    def _until(self, good: Callable[[tuple[str | None, str | None]], object], within: float) -> float | None:
        """Seconds until the paths are good; None when they are not in time."""
        began = time.monotonic()
        while not good(self._paths()):
            if time.monotonic() - began > within:
                return None
            time.sleep(0.05)
        return time.monotonic() - began

    def _tokens(self, within: float) -> tuple[float, float]:
        """Tokens per second at each of the two.

        Raises:
            BenchError: they do not say the same.
            MeshNodeError: the mesh does not serve with both in the ring.
        """
        rates, texts = [], set()
        for node in self.two:
            node.wait_serving(within, members=2 + (self._third == "worker"))
            began = time.monotonic()
            answer = complete(node.client, node.base_url, None, _PROMPT, _TOKENS)
            rates.append(answer.tokens / (time.monotonic() - began))
            texts.add(answer.text)
        if len(texts) > 1:
            raise BenchError(f"the two answer differently: {sorted(texts)}")
        return rates[0], rates[1]


@contextlib.contextmanager
def stun_servers(lab: Lab, machines: Iterable[str]) -> Iterator[None]:
    """A STUN server on each of the machines, listening."""
    with contextlib.ExitStack() as stack:
        for machine in machines:
            argv = [sys.executable, "-m", "bench.lab.stunserver", lab.address(machine), str(_STUN_PORT)]
            server = lab.popen(machine, argv, stdout=subprocess.PIPE, cwd=ROOT)
            assert server.stdout is not None
            stack.enter_context(server.stdout)
            stack.callback(server.kill)
            if not server.stdout.readline():
                raise BenchError(f"the STUN server on {machine} does not start")
        yield


def meet(kinds: tuple[str, str], model: Path, directory: Path, options: argparse.Namespace) -> Meeting:
    """One pair, from nothing."""
    nat = {name: kind for name, kind in zip(("a", "b"), kinds, strict=True) if kind != OPEN}
    # Without a single NAT there is no outside: an empty home makes one.
    homes = {} if nat else {"empty": ("full-cone", ())}
    machines = ("a", "b", "p", "s1", "s2")
    with Lab(machines, options.link, nat=nat, homes=homes, cores=1) as lab, stun_servers(lab, machines[3:]):
        pair = Pair(lab, kinds, directory, model, third=options.third, settle_s=options.settle)
        try:
            pair.start(options.within)
            return pair.measure(options.within)
        except MeshNodeError as error:
            return Meeting(kinds, problem=str(error))
        finally:
            pair.stop()


def meetings_table(done: Sequence[Meeting]) -> str:
    """One row per pair."""
    rows = []
    for m in done:
        serves = "{:.1f} / {:.1f}".format(*m.tokens_per_s) if m.serves else "NO"
        how = m.how if m.how == could_be(*m.kinds) or m.how == "direct" else m.how.upper()
        rows.append([*m.kinds, how, could_be(*m.kinds), _s(m.linked_s), _s(m.direct_s), _s(m.rtt_ms, 0), serves])
    header = ["one side", "other side", "connects", "could be", "linked s", "direct s", "RTT ms", "tok/s at each"]
    return tables.markdown(header, rows)


def _s(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bin/bench nat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = [*KINDS, OPEN]
    parser.add_argument("--kind", action="append", choices=kinds, help="default: every kind of NAT; none: no NAT")
    parser.add_argument("--link", default="wan20", metavar="NAME|SPEC", help="between any two of the machines")
    parser.add_argument("--third", default="relay-only", choices=("relay-only", "worker"), help="the public member")
    parser.add_argument("--model", default="demo", metavar="demo|mid|PATH")
    parser.add_argument("--settle", type=float, default=10.0, metavar="S", help="for a relayed link to become direct")
    parser.add_argument("--within", type=float, default=60.0, metavar="S", help="give up on a step after this long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and state directories here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    available, why = lab_available()
    kinds = list(dict.fromkeys(options.kind or KINDS))
    done: list[Meeting] = []
    try:
        if not available:
            raise BenchError(f"no lab here: {why}")
        model = find_model(options.model, find_programs().vocabularies)
        with contextlib.ExitStack() as stack:
            directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshbench-")))
            for pair in pairs_of(kinds):
                done.append(meet(pair, model, directory / "-and-".join(pair), options))
                print(f"{' and '.join(pair)}: {done[-1].how} {done[-1].problem}", file=sys.stderr, flush=True)
    except (BenchError, LabError, MeshError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    print(meetings_table(done))
    if options.json:
        report: dict[str, Any] = {
            "model": options.model,
            "link": options.link,
            "third": options.third,
            "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
            "pairs": [{**asdict(m), "how": m.how, "could_be": could_be(*m.kinds)} for m in done],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if len(done) == len(pairs_of(kinds)) and all(m.sound for m in done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
