"""What ``/metrics`` shows, in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Mapping

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        """Starts everything at zero."""
        self._registry = CollectorRegistry()
        self.connections = Gauge("univla_connections", "Robots connected", registry=self._registry)
        self.waiting = Gauge(
            "univla_queue_requests", "Requests waiting for a batch", registry=self._registry
        )
        self._requests = Counter(
            "univla_requests",
            "Requests by outcome: ok, reset, bad_request, busy, unreadable, error",
            ["outcome"],
            registry=self._registry,
        )
        self._invalid = Counter(
            "univla_invalid_chunks",
            "Answers whose tokens decoded to no whole chunk",
            registry=self._registry,
        )
        self._seconds = Histogram(
            "univla_request_seconds",
            "Time from a request's arrival to its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._parts = Counter(
            "univla_policy_seconds",
            "Time spent in the policy, by part",
            ["part"],
            registry=self._registry,
        )
        self._batch = Histogram(
            "univla_batch_rows",
            "Requests answered together",
            buckets=_ROWS,
            registry=self._registry,
        )

    def refused(self, outcome: str) -> None:
        """Counts a request that got no actions."""
        self._requests.labels(outcome).inc()

    def answered(self, seconds: float, batch: int, *, valid: bool) -> None:
        """Counts a request that got actions."""
        self._requests.labels("ok").inc()
        self._invalid.inc(0 if valid else 1)
        self._seconds.observe(seconds)
        self._batch.observe(batch)

    def computed(self, milliseconds: Mapping[str, float]) -> None:
        """Adds the parts of one call of the policy."""
        for part, spent in milliseconds.items():
            self._parts.labels(part).inc(spent / 1e3)

    def text(self) -> bytes:
        """The page."""
        return prometheus_client.generate_latest(self._registry)
