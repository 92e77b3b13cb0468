"""What Prometheus reads of a node."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from mesh.proxy.core import Counters
from mesh.proxy.metrics import Metrics, NodeGauges, Peer
from tests.fakes.clock import FakeClock


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_requests_are_counted_by_what_became_of_them() -> None:
    metrics = Metrics(lambda: Counters(active=1, held=2, completed=3, resumed=4, failed=2))
    metrics.failed("queue_full")
    metrics.failed("queue_full")
    seen = read(metrics)
    assert [seen[f"mesh_requests_{name}", ()] for name in ("active", "held")] == [1, 2]
    assert [seen[f"mesh_requests_{name}_total", ()] for name in ("completed", "resumed")] == [3, 4]
    assert seen["mesh_requests_failed_total", (("code", "queue_full"),)] == 2


def test_two_nodes_of_one_process_count_apart() -> None:
    one, two = Metrics(Counters), Metrics(Counters)
    one.failed("x")
    assert ("mesh_requests_failed_total", (("code", "x"),)) not in read(two)


def test_a_streams_times_leave_out_how_long_it_stood_still() -> None:
    clock = FakeClock()
    metrics = Metrics(Counters)
    times = metrics.watch(clock)
    clock.advance(0.5)
    times.delivered(0)  # a preamble
    clock.advance(0.5)
    times.delivered(1)
    for _ in range(5):
        clock.advance(0.1)
        times.delivered(1)
    clock.advance(2.0)
    times.lost()  # noticed late
    times.lost()
    clock.advance(1.0)
    times.delivered(1)
    clock.advance(0.1)
    times.delivered(1)
    times.done()
    seen = read(metrics)
    assert seen["mesh_time_to_first_token_seconds_sum", ()] == 1.0
    assert round(seen["mesh_stream_pause_seconds_sum", ()], 6) == 3.0
    assert seen["mesh_stream_pause_seconds_count", ()] == 1
    assert round(seen["mesh_time_per_token_seconds_sum", ()], 6) == round(0.6 / 7, 6)
    assert seen["mesh_tokens_streamed_total", ()] == 8
    assert seen["mesh_request_seconds_count", ()] == 1


def test_the_mesh_is_shown_as_this_node_sees_it() -> None:
    metrics = Metrics(Counters)
    peers = [Peer("a" * 26, 'At"tic\n', 4.5), Peer("b" * 26, "cellar", None)]
    build = {"version": "0.1.0", "engine": "abc", "backend": "cpu"}
    metrics.node = lambda: NodeGauges(epoch=7, serving=True, members=3, restarts=2, peers=peers, build=build)
    seen = read(metrics)
    assert (seen["mesh_epoch", ()], seen["mesh_serving", ()], seen["mesh_members", ()]) == (7, 1, 3)
    assert seen["mesh_restarts_total", ()] == 2
    assert seen["mesh_peer_rtt_seconds", (("name", 'At"tic\n'), ("peer", "a" * 26))] == 0.0045
    assert not [labels for name, labels in seen if name == "mesh_peer_rtt_seconds" and ("name", "cellar") in labels]
    assert seen["mesh_build_info", tuple(sorted(build.items()))] == 1
