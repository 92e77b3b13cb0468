"""The lab itself: before it measures anything, it is measured."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.lab import LINKS, Lab, LabError, Link, lab_available, namespaces, selfcheck
from tests.eventually import eventually

AVAILABLE, WHY = lab_available()
pytestmark = [pytest.mark.lab, pytest.mark.skipif(not AVAILABLE, reason=f"no lab here: {WHY}")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(["a", "b", "c"], link="lan") as made:
        yield made


class Post:
    """A UDP socket per machine, to see who hears whom."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.sockets = {node: lab.socket(node, kind=socket.SOCK_DGRAM) for node in lab.nodes}
        for node, made in self.sockets.items():
            made.bind((lab.address(node), 7000))
            made.settimeout(0.3)

    def arrives(self, a: str, b: str) -> bool:
        self.sockets[a].sendto(b"x", (self.lab.address(b), 7000))
        try:
            return self.sockets[b].recv(64) == b"x"
        except TimeoutError:
            return False


@pytest.mark.parametrize("name", ["lan", "wan40"])
def test_packets_arrive_when_the_link_says(name: str) -> None:
    with Lab(["a", "b"], link=name) as lab:
        best = min(
            selfcheck.percentile(selfcheck.timing_errors(lab, "a", "b", LINKS[name], 200, 0.003)[0], 0.99)
            for _ in range(2)
        )
    assert best < 0.002


def test_tcp_fills_a_slow_link() -> None:
    with Lab(["a", "b"], link="wan20") as lab:
        rate = selfcheck.throughput(lab, "a", "b", seconds=1.5, settle_s=0.7)
        counter = lab.counters()["a", "b"]
    assert 0.85 * 5e6 < rate < 5e6
    assert counter.bytes > 1.5 * rate
    assert 1400 < counter.bytes / counter.packets <= 1500


def test_tcp_comes_near_a_gigabit_on_the_lan() -> None:
    with Lab(["a", "b"], link="lan") as lab:
        rate = selfcheck.throughput(lab, "a", "b", seconds=1, settle_s=0.3)
        counter = lab.counters()["a", "b"]
    assert rate > 40e6  # 117e6 on a quiet machine
    assert 1400 < counter.bytes / counter.packets <= 1500


def test_a_cut_is_one_way_or_both_and_heals(lab: Lab) -> None:
    post = Post(lab)
    lab.cut("a", "b", both=False)
    assert not post.arrives("a", "b")
    assert post.arrives("b", "a")
    assert post.arrives("a", "c")
    lab.cut("a", "b")
    assert not post.arrives("b", "a")
    lab.heal("a", "b")
    assert post.arrives("a", "b")
    lab.part(["a"], ["b", "c"])
    assert not post.arrives("a", "c")
    assert post.arrives("b", "c")
    lab.heal_all()
    assert post.arrives("a", "c")


def test_a_link_changes_while_in_use(lab: Lab) -> None:
    lab.set_link("a", "b", Link(delay_s=0.05))
    assert selfcheck.round_trip_s(lab, "a", "b", 3) == pytest.approx(0.1, abs=0.02)
    lab.set_link("a", "b", "lan")
    assert selfcheck.round_trip_s(lab, "a", "b", 3) < 0.02


def test_counters_count_every_ip_byte_of_each_direction(lab: Lab) -> None:
    post = Post(lab)
    lab.reset_counters()
    for _ in range(5):
        assert post.arrives("a", "b")
    counters = lab.counters(reset=True)
    assert (counters["a", "b"].bytes, counters["a", "b"].packets) == (5 * 29, 5)
    assert counters["b", "a"].bytes == 0
    assert lab.counters()["a", "b"].bytes == 0


def test_multicast_reaches_everybody_else(lab: Lab) -> None:
    group, port = "224.0.0.251", 5353
    listeners = {node: lab.socket(node, kind=socket.SOCK_DGRAM) for node in ("b", "c")}
    for node, listener in listeners.items():
        listener.bind(("", port))
        membership = socket.inet_aton(group) + socket.inet_aton(lab.address(node))
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        listener.settimeout(2)
    lab.socket("a", kind=socket.SOCK_DGRAM).sendto(b"who is here", (group, port))
    for listener in listeners.values():
        heard, (sender, _) = listener.recvfrom(64)
        assert (heard, sender) == (b"who is here", lab.address("a"))


def test_machines_speak_ipv6_when_asked() -> None:
    with Lab(["a", "b"], ipv6=True) as lab:
        listener = lab.socket("b", socket.AF_INET6)
        listener.bind((lab.address("b", ipv6=True), 8000))
        listener.listen()
        caller = lab.socket("a", socket.AF_INET6)
        caller.settimeout(2)
        caller.connect((lab.address("b", ipv6=True), 8000))


def serve(lab: Lab, node: str, host: str, directory: Path) -> None:
    lab.popen(
        node,
        [sys.executable, "-m", "http.server", "8000", "--bind", host, "--directory", directory],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def test_http_is_spoken_from_inside_a_machine(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"x" * 300_000)
    serve(lab, "b", "127.0.0.1", tmp_path)

    def answers() -> bool:
        try:
            return lab.http("b", "GET", "http://localhost:8000/page").status_code == 200
        except OSError:
            return False
        except Exception as error:
            return "refused" not in str(error)

    await eventually(answers, within=10)
    with lab.stream("b", "GET", "http://127.0.0.1:8000/page") as response:
        assert sum(map(len, response.iter_bytes())) == 300_000
    async with lab.async_client("b") as client:
        assert len((await client.get("http://127.0.0.1:8000/page")).content) == 300_000
    # Every machine has a loopback of its own.
    with pytest.raises(Exception, match="refused"):
        lab.http("a", "GET", "http://127.0.0.1:8000/page")


def test_labs_side_by_side_do_not_meet(lab: Lab) -> None:
    with Lab(["a", "b"], link="wan20") as other:
        assert Post(other).arrives("a", "b")
        assert lab.namespace("a") != other.namespace("a")
        assert other.counters()["a", "b"].packets == 1
    assert Post(lab).arrives("a", "b")


def test_closing_leaves_nothing_behind(lab: Lab) -> None:
    sleeper = lab.popen("a", ["sh", "-c", "trap '' TERM INT HUP; (setsid sleep 1000 &) ; sleep 1000"])
    deadline = time.monotonic() + 5
    while len(lab.pids("a")) < 3 and time.monotonic() < deadline:
        os.sched_yield()
    pids, names = lab.pids("a"), [lab.namespace(node) for node in lab.nodes]
    assert sleeper.pid in pids
    assert len(pids) >= 3
    lab.close()
    assert not [name for name in names if namespaces.path_of(name).exists()]
    assert not [pid for pid in pids if namespaces.start_time(pid) is not None]


OWNER = """
import sys, time
from bench.lab import Lab
lab = Lab(["a", "b"])
lab.open()
sleeper = lab.popen("b", ["sleep", "1000"])
print(lab._prefix, lab._router.pid, sleeper.pid, flush=True)
time.sleep(1000)
"""


def start_owner() -> tuple[subprocess.Popen[str], str, int, int]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    prefix, router, sleeper = owner.stdout.readline().split()
    return owner, prefix, int(router), int(sleeper)


def left_of(prefix: str) -> list[Path]:
    return list(namespaces.DIRECTORY.glob(f"{prefix}*"))


async def test_a_lab_goes_with_its_killed_owner() -> None:
    owner, prefix, router, sleeper = start_owner()
    assert len(left_of(prefix)) == 2
    owner.kill()
    owner.wait()
    await eventually(lambda: not left_of(prefix), within=5)
    await eventually(lambda: namespaces.start_time(router) is None)
    assert namespaces.start_time(sleeper) is None


async def test_leftovers_are_swept_when_owner_and_router_were_killed() -> None:
    owner, prefix, router, sleeper = start_owner()
    os.kill(router, signal.SIGSTOP)  # so that it cannot clean up when its parent goes
    owner.kill()
    owner.wait()
    os.kill(router, signal.SIGKILL)
    await eventually(lambda: namespaces.start_time(router) is None)
    assert len(left_of(prefix)) == 2
    await asyncio.to_thread(namespaces.sweep)
    assert not left_of(prefix)
    assert namespaces.start_time(sleeper) is None


def test_a_living_owners_lab_is_not_swept(lab: Lab) -> None:
    assert lab.namespace("a") not in namespaces.sweep()
    assert Post(lab).arrives("a", "b")


def test_a_dead_router_is_an_error_and_still_leaves_nothing(lab: Lab) -> None:
    assert lab._router is not None
    lab._router.kill()
    with pytest.raises(LabError, match="router"):
        for _ in range(100):
            lab.counters()
    lab.close()
    assert not left_of(lab._prefix)


def test_machine_names_are_checked() -> None:
    for nodes in (["a", "a"], ["A"], ["../x"], [""]):
        with pytest.raises(LabError, match="names"):
            Lab(nodes)
