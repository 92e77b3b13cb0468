"""What happened to the requests of this node, and how the mesh looks from here, as Prometheus reads it.

One object owns all of it, in a registry of its own. What is counted elsewhere already (the core's counters, the node's
view) is asked for when somebody scrapes, and not kept twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from mesh.clock import Clock
from mesh.proxy.core import Counters

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
_PAUSE_S = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60)
_REQUEST_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Peer:
    """One linked member. ``rtt_ms``: None before the first measurement."""

    id: str
    name: str
    rtt_ms: float | None


@dataclass(frozen=True, slots=True)
class NodeGauges:
    """The mesh as this node sees it.

    Args:
        epoch: number of the layout it follows.
        serving: a model is served.
        members: alive ones, this node included.
        restarts: layouts that were started anew since this node runs, the first included.
        build: labels of ``mesh_build_info``.
    """

    epoch: int
    serving: bool
    members: int
    restarts: int
    peers: Sequence[Peer]
    build: dict[str, str]


class Metrics:
    """Args:
    counters: of the requests, from their owner.
    """

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self.node: Callable[[], NodeGauges] | None = None
        """Set by the node; without it there are requests only."""
        self._counters = counters
        registry = self._registry = CollectorRegistry()
        self._failed = Counter(
            "mesh_requests_failed", "Requests ended in an error of ours.", ["code"], registry=registry
        )
        self._ttft = Histogram(
            "mesh_time_to_first_token_seconds",
            "From a streaming request's arrival to the first token its client got.",
            buckets=_TTFT_S,
            registry=registry,
        )
        self._token = Histogram(
            "mesh_time_per_token_seconds",
            "Between tokens of a stream, its mean, pauses over a loss left out.",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._pause = Histogram(
            "mesh_stream_pause_seconds",
            "How long a stream stood still because an engine was lost.",
            buckets=_PAUSE_S,
            registry=registry,
        )
        self._request = Histogram(
            "mesh_request_seconds",
            "From arrival to the last byte, answered ones.",
            buckets=_REQUEST_S,
            registry=registry,
        )
        self.tokens_streamed = 0
        registry.register(_Asked(self._collect))

    def failed(self, code: str) -> None:
        """A request ended in the failure ``code``."""
        self._failed.labels(code).inc()

    def watch(self, clock: Clock) -> StreamTimes:
        """The stopwatch of one request that just arrived."""
        return StreamTimes(clock, self, self._ttft, self._token, self._pause, self._request)

    def render(self) -> bytes:
        """All of it in Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)

    def _collect(self) -> Iterable[Metric]:
        counters = self._counters()
        yield GaugeMetricFamily("mesh_requests_active", "Requests an engine is answering.", counters.active)
        yield GaugeMetricFamily("mesh_requests_held", "Requests that wait for a layout.", counters.held)
        yield CounterMetricFamily("mesh_requests_completed", "Answers delivered whole.", counters.completed)
        yield CounterMetricFamily("mesh_requests_resumed", "Those of them that outlived an engine.", counters.resumed)
        yield CounterMetricFamily(
            "mesh_tokens_streamed", "Tokens whose text was streamed to clients.", self.tokens_streamed
        )
        if self.node is not None:
            yield from _node(self.node())


class StreamTimes:
    """What one request's timing adds to the histograms."""

    def __init__(
        self, clock: Clock, metrics: Metrics, ttft: Histogram, token: Histogram, pause: Histogram, request: Histogram
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._ttft, self._token, self._pause, self._request = ttft, token, pause, request
        self._arrived = clock.now()
        self._first: float | None = None
        self._newest = 0.0
        self._count = 0
        self._standing_since: float | None = None
        self._stood_s = 0.0

    def delivered(self, tokens: int) -> None:
        """The client got that many more tokens' text; 0: a preamble, or an engine that does not say."""
        now = self._clock.now()
        if self._standing_since is not None:
            self._stood_s += now - self._standing_since
            self._pause.observe(now - self._standing_since)
            self._standing_since = None
        if not tokens:
            return
        if self._first is None:
            self._first = now
            self._ttft.observe(now - self._arrived)
        self._newest = now
        self._count += tokens
        self._metrics.tokens_streamed += tokens  # an integer: this is done for every token

    def lost(self) -> None:
        """The engine is gone; what the client got before stands still from now on."""
        if self._first is not None and self._standing_since is None:
            self._standing_since = self._newest

    def done(self) -> None:
        """The client has its whole answer."""
        self._request.observe(self._clock.now() - self._arrived)
        if self._first is not None and self._count > 1:
            self._token.observe(max(0.0, self._newest - self._first - self._stood_s) / (self._count - 1))


class _Asked:
    """A collector that is a function."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> Iterable[Metric]:
        return ()


def _node(gauges: NodeGauges) -> Iterable[Metric]:
    yield GaugeMetricFamily("mesh_epoch", "Number of the layout this node follows.", gauges.epoch)
    yield GaugeMetricFamily("mesh_serving", "1 while a model is served.", int(gauges.serving))
    yield GaugeMetricFamily("mesh_members", "Members alive, this one included.", gauges.members)
    yield CounterMetricFamily("mesh_restarts", "Layouts started since this node runs.", gauges.restarts)
    rtt = GaugeMetricFamily("mesh_peer_rtt_seconds", "Round trip to a linked member.", labels=["peer", "name"])
    for peer in gauges.peers:
        if peer.rtt_ms is not None:
            rtt.add_metric([peer.id, peer.name], peer.rtt_ms / 1000)
    yield rtt
    yield InfoMetricFamily("mesh_build", "What runs here.", gauges.build)
