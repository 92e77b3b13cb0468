"""NATs, without a network: who is mapped to what, who may answer, for how long."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.nat import KINDS, MAX_MAPPINGS, MAX_REMOTES, Dependence, Nat
from bench.lab.packet import ICMP, TCP, UDP, Endpoint, Flow

PUBLIC = b"\x0b\x4d\x00\x01"
CONES = [name for name in KINDS if name != "symmetric"]
TIMEOUT_S = 60.0


def make(kind: str, **options: Any) -> Nat:
    options.setdefault("timeouts_s", {ICMP: TIMEOUT_S, TCP: TIMEOUT_S, UDP: TIMEOUT_S})
    return Nat(PUBLIC, KINDS[kind], random.Random(1).random, **options)


def inside(host: int = 2, port: int = 7842) -> Endpoint:
    return Endpoint(bytes((192, 168, 1, host)), port)


def remote(host: int = 9, port: int = 3478) -> Endpoint:
    return Endpoint(bytes((11, 77, 9, host)), port)


def send(nat: Nat, source: Endpoint, goal: Endpoint, now: float = 0.0, protocol: int = UDP) -> Endpoint:
    """The outside endpoint of a packet out."""
    outside = nat.outbound(Flow(protocol, source, goal), now)
    assert outside is not None
    assert outside.goal == goal
    assert outside.source.host == PUBLIC
    return outside.source


def reaches(nat: Nat, source: Endpoint, outside: Endpoint, now: float = 0.0, protocol: int = UDP) -> Endpoint | None:
    """Whom a packet to the outside endpoint reaches."""
    flow = nat.inbound(Flow(protocol, source, outside), now)
    assert flow is None or flow.source == source
    return None if flow is None else flow.goal


@pytest.mark.parametrize(
    ("kind", "same", "other_port", "other_host"),
    [
        ("full-cone", True, True, True),
        ("address-restricted", True, True, False),
        ("port-restricted", True, False, False),
        ("symmetric", True, False, False),
    ],
)
def test_who_may_answer_follows_the_kind(kind: str, same: bool, other_port: bool, other_host: bool) -> None:
    nat = make(kind)
    outside = send(nat, inside(), remote())
    answers = [reaches(nat, who, outside) for who in (remote(), remote(port=99), remote(host=5))]
    assert answers == [inside() if passes else None for passes in (same, other_port, other_host)]
    assert nat.refused_in == answers.count(None)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_comes_in_unasked(kind: str) -> None:
    nat = make(kind)
    assert reaches(nat, remote(), Endpoint(PUBLIC, 7842)) is None


@pytest.mark.parametrize("kind", CONES)
def test_a_cone_shows_everyone_the_same_port_which_is_the_machines_own(kind: str) -> None:
    nat = make(kind)
    assert {send(nat, inside(), remote(host, port)).port for host in (1, 2) for port in (1, 2)} == {7842}


def test_a_symmetric_nat_shows_everyone_another_port() -> None:
    nat = make("symmetric")
    assert len({send(nat, inside(), remote(host, port)).port for host in (1, 2) for port in (1, 2)} | {7842}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_port_in_use_goes_to_nobody_else(kind: str) -> None:
    nat = make(kind)
    first, second = send(nat, inside(2), remote()), send(nat, inside(3), remote())
    assert first != second
    assert reaches(nat, remote(), first) == inside(2)
    assert reaches(nat, remote(), second) == inside(3)


def test_ports_may_be_drawn_by_lot() -> None:
    assert send(make("full-cone", preserve_port=False), inside(), remote()).port != 7842


@pytest.mark.parametrize("kind", KINDS)
def test_only_packets_out_keep_a_mapping_alive(kind: str) -> None:
    nat = make(kind)
    outside = send(nat, inside(), remote(), 0.0)
    assert reaches(nat, remote(), outside, 59.0) == inside()
    assert reaches(nat, remote(), outside, 61.0) is None
    assert send(nat, inside(), remote(), 62.0)
    assert send(nat, inside(), remote(), 100.0)
    assert [lease.used for lease in nat.leases(150.0)] == [100.0]
    assert not list(nat.leases(161.0))


def test_who_may_answer_is_forgotten_one_by_one() -> None:
    nat = make("port-restricted")
    outside = send(nat, inside(), remote(1), 0.0)
    send(nat, inside(), remote(2), 50.0)
    assert reaches(nat, remote(1), outside, 70.0) is None
    assert reaches(nat, remote(2), outside, 70.0) == inside()


def test_an_expired_port_may_be_another_machines() -> None:
    nat = make("port-restricted")
    assert send(nat, inside(2), remote(), 0.0).port == 7842
    assert send(nat, inside(3), remote(), 30.0).port != 7842
    assert send(nat, inside(4), remote(), 61.0).port == 7842
    assert reaches(nat, remote(), Endpoint(PUBLIC, 7842), 62.0) == inside(4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reboot_forgets_conversations(kind: str) -> None:
    nat = make(kind)
    outside = send(nat, inside(), remote())
    nat.reboot()
    assert reaches(nat, remote(), outside) is None
    assert reaches(nat, remote(), send(nat, inside(), remote())) == inside()


def test_a_new_number_shows() -> None:
    nat = make("full-cone")
    send(nat, inside(), remote())
    nat.renumber(b"\x0b\x4d\x00\x02")
    outside = nat.outbound(Flow(UDP, inside(), remote()), 1.0)
    assert outside is not None
    assert outside.source == Endpoint(b"\x0b\x4d\x00\x02", 7842)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forwarded_port_lets_everyone_in_and_answers_leave_by_it(kind: str) -> None:
    nat = make(kind)
    nat.forward(UDP, 500, inside())
    forwarded = Endpoint(PUBLIC, 500)
    for _ in range(2):
        assert reaches(nat, remote(1), forwarded) == inside()
        assert send(nat, inside(), remote(1)) == forwarded
        nat.reboot()
    # Whom the machine calls first learns the forwarded port too, except where every callee gets another.
    assert (send(nat, inside(), remote(2)) == forwarded) == (kind != "symmetric")


def test_a_forwarded_port_is_taken_from_who_has_it_and_goes_with_its_machine() -> None:
    nat = make("full-cone")
    send(nat, inside(3, 500), remote())
    nat.forward(UDP, 500, inside(2))
    assert reaches(nat, remote(), Endpoint(PUBLIC, 500)) == inside(2)
    assert send(nat, inside(3, 500), remote()).port != 500
    nat.forward(UDP, 501, inside(2))
    assert reaches(nat, remote(), Endpoint(PUBLIC, 500)) is None
    nat.forget(inside(2).host)
    assert reaches(nat, remote(), Endpoint(PUBLIC, 501)) is None
    assert len(list(nat.leases(0.0))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_tcp_and_udp_do_not_share_ports(kind: str) -> None:
    nat = make(kind)
    outside = send(nat, inside(), remote(), protocol=TCP)
    assert reaches(nat, remote(), outside) is None
    assert reaches(nat, remote(), outside, protocol=TCP) == inside()


def test_an_echo_is_answered() -> None:
    nat = make("port-restricted")
    target = remote(port=0)
    outside = send(nat, inside(port=77), target, protocol=ICMP)
    assert reaches(nat, target, outside, protocol=ICMP) == inside(port=77)
    # Nobody pings a machine behind it, so a reply from inside answers nothing.
    assert nat.outbound(Flow(ICMP, inside(port=0), remote(port=5)), 0.0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_table_takes_no_newcomers_until_something_expires(kind: str) -> None:
    nat = make(kind)
    for port in range(1, MAX_MAPPINGS + 1):
        send(nat, inside(port=port), remote(), 0.0)
    assert nat.outbound(Flow(UDP, inside(port=60000), remote()), 30.0) is None
    assert nat.refused_out == 1
    assert len(list(nat.leases(30.0))) == MAX_MAPPINGS
    send(nat, inside(port=60000), remote(), 61.0)
    assert len(list(nat.leases(61.0))) == 1


def test_one_port_speaks_to_so_many_and_no_more() -> None:
    nat = make("port-restricted")
    for port in range(1, MAX_REMOTES + 1):
        send(nat, inside(), remote(port=port), 0.0)
    assert nat.outbound(Flow(UDP, inside(), remote(port=60000)), 30.0) is None
    send(nat, inside(), remote(port=60000), 61.0)
    [lease] = nat.leases(61.0)
    assert len(lease.remotes) == MAX_REMOTES


HOSTS, PORTS, REMOTES = st.integers(2, 4), st.integers(5000, 5002), st.integers(1, 3)
OUT = st.tuples(st.just("out"), st.builds(inside, HOSTS, PORTS), st.builds(remote, REMOTES, REMOTES))
IN = st.tuples(st.just("in"), st.integers(0, 30), st.builds(remote, REMOTES, REMOTES))
STEPS = st.lists(st.tuples(st.one_of(OUT, IN), st.floats(0, 40)), max_size=60)


# A packet passes in exactly when somebody wrote out through that port to a source that the filter takes for the same,
# within the timeout, and it reaches whoever wrote; and no two writers ever share a living port.
@given(st.sampled_from(list(KINDS)), st.booleans(), STEPS)
def test_what_passes_in_is_what_the_kind_says(kind: str, preserve_port: bool, steps: list[Any]) -> None:
    nat = make(kind, preserve_port=preserve_port)
    filtering, mapping = KINDS[kind].filtering, KINDS[kind].mapping
    written: list[tuple[float, Endpoint, Endpoint, int]] = []
    now = 0.0
    for (what, first, second), pause in steps:
        now += pause
        living = [entry for entry in written if now - entry[0] <= TIMEOUT_S]
        if what == "out":
            port = send(nat, first, second, now).port
            for _, who, whom, known in living:
                same = who == first and mapping.of(whom) == mapping.of(second)
                assert (known == port) == same
            written.append((now, first, second, port))
            assert reaches(nat, second, Endpoint(PUBLIC, port), now) == first
        elif written:
            port = written[first % len(written)][3]
            allowed = {who for _, who, whom, p in living if p == port and filtering.of(whom) == filtering.of(second)}
            found = reaches(nat, second, Endpoint(PUBLIC, port), now)
            assert allowed == (set() if found is None else {found})


def test_a_rule_looks_at_as_much_as_it_says() -> None:
    assert [rule.of(remote(1, 2)) for rule in Dependence] == [None, remote(1, 0), remote(1, 2)]
