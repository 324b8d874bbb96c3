"""A span for each request, over OTLP/HTTP, once an endpoint is given (extra `otel`). Attribute names are vLLM's."""

from __future__ import annotations

from importlib.util import find_spec

from flover.server.records import EndRecord

NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def check_tracing() -> None:
    """ValueError if what it needs is not installed."""
    for name in NEEDED:
        try:
            found = find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ValueError(f'otlp_traces_endpoint needs {name}: pip install -e ".[otel]"')


class Tracing:
    """Makes a span of each record; a thread of the SDK sends them in batches, and drops what cannot be sent."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "flover"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("flover")

    def __call__(self, record: EndRecord) -> None:
        start = int(record.arrival * 1e9)
        span = self._tracer.start_span("llm_request", start_time=start)
        values: dict[str, str | float | None] = {
            "gen_ai.request.id": record.label or record.request_id,
            "gen_ai.usage.prompt_tokens": record.prompt_tokens,
            "gen_ai.usage.completion_tokens": record.output_tokens,
            "gen_ai.usage.num_sequences": record.choices,
            "gen_ai.latency.time_in_queue": record.queue,
            "gen_ai.latency.time_to_first_token": record.ttft,
            "gen_ai.latency.e2e": record.e2e,
            "flover.outcome": record.outcome,
            "flover.reason": record.reason,
        }
        span.set_attributes({name: value for name, value in values.items() if value is not None})
        if record.outcome == "failed":
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, record.error or record.reason))
        span.end(end_time=start + int(record.e2e * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
