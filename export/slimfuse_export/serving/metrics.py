"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "slimfuse_requests", "Requests by path and status.", ("path", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "slimfuse_request_seconds", "From a request's first byte to its answer.", ("path",),
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self.rows = Histogram(
            "slimfuse_batch_inputs", "Inputs that ran together.",
            registry=self.registry, buckets=_ROWS,
        )  # fmt: skip
        self.model = Histogram(
            "slimfuse_model_seconds", "Of one call of the model.",
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self.waiting = Gauge(
            "slimfuse_queue_inputs", "Inputs that wait or run.", registry=self.registry
        )

    def batch(self, rows: int, seconds: float) -> None:
        """Count a call of the model."""
        self.rows.observe(rows)
        self.model.observe(seconds)
