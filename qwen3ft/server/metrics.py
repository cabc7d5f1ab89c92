"""Numbers about the server in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class ServerMetrics:
    """All of them, in a registry of their own."""

    def __init__(self, answering: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "qwen3ft_requests",
            "Requests by version and status; 499 if the client left.",
            ("version", "status"),
            registry=self._registry,
        )
        self.tokens = Counter(
            "qwen3ft_tokens",
            "Tokens of prompts and answers.",
            ("version", "kind"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "qwen3ft_answer_seconds",
            "Time from a request to the end of its answer.",
            ("version",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_seconds = Histogram(
            "qwen3ft_first_text_seconds",
            "Time from a request to the first text of its answer.",
            ("version",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.changes = Counter(
            "qwen3ft_version_changes",
            "Changes of the version in use, by result.",
            ("result",),
            registry=self._registry,
        )
        self.in_use = Gauge(
            "qwen3ft_version_in_use",
            "1 for the version that answers by default.",
            ("version",),
            registry=self._registry,
        )
        gauge = Gauge(
            "qwen3ft_requests_in_progress", "Requests in progress.", registry=self._registry
        )
        gauge.set_function(answering)

    def use(self, name: str) -> None:
        """Note which version answers by default."""
        self.in_use.clear()
        self.in_use.labels(name).set(1)

    def text(self) -> bytes:
        """Return all numbers as /metrics gives them."""
        return generate_latest(self._registry)
