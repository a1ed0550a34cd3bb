"""What /metrics shows, in Prometheus's form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llama_acc.core.generate.service import Service

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        engine = service.engine
        self._requests = Counter(
            "llama_acc_requests", "HTTP requests that have been answered", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("llama_acc_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter("llama_acc_generated_tokens", "Tokens generated", registry=registry)
        self.first_token = Histogram(
            "llama_acc_first_token_seconds",
            "From a request to the first token of a reply",
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "llama_acc_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, registry=registry
        )
        for name, about, value in (
            ("slots", "Replies that can be under way at a time", lambda: engine.slots),
            ("running", "Replies under way", lambda: len(engine.running)),
            ("waiting", "Requests that wait for a slot", lambda: len(engine.waiting)),
        ):
            Gauge(f"llama_acc_{name}", about, registry=registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        """Counts a request."""
        self._requests.labels(path, status).inc()
