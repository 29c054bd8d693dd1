"""Traces: a span for every call, with one inside for every stage it went through, sent by OTLP.

Off by default, and OpenTelemetry is imported only where it is on. A caller's W3C traceparent is continued,
with its decision to sample; spans wait in a bounded queue and are sent by a thread, so a collector that is
away costs no call anything.
Sources: https://www.w3.org/TR/trace-context/, https://opentelemetry.io/docs/specs/semconv/rpc/grpc/.
"""

import asyncio
import time
from collections.abc import Iterable
from contextvars import Token
from typing import TYPE_CHECKING, Any

from services.trace import CURRENT, Trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_HEADERS = ("traceparent", "tracestate")


class TracingUnavailable(RuntimeError):
    """Traces were asked for, and what makes them is not installed; one sentence."""


class TracedCall:
    """One call from `Tracing.begin` to `end`."""

    __slots__ = ("_span", "_token", "trace")

    def __init__(self, span: Any, trace: Trace, token: "Token[Trace | None]") -> None:
        self._span, self.trace, self._token = span, trace, token

    def end(self, code: str) -> None:
        """The call ended with this code; in the task that it began in."""
        from opentelemetry.trace import StatusCode

        self.trace.close()
        CURRENT.reset(self._token)
        self._span.set_attribute("rpc.response.status_code", code)
        if code not in ("OK", "CANCELLED"):
            self._span.set_status(StatusCode.ERROR, code)
        self._span.end()


class Tracing:
    """Makes traces and hands them to an exporter."""

    def __init__(self, exporter: "SpanExporter", *, share: float, release: str) -> None:
        """`share` of the calls that come without a decision is traced."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "ringfort", "service.version": release})
        # Its own exit handler would run after everything it needs is gone; `close` is called instead.
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(share), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1_000))
        self._tracer = self._provider.get_tracer("ringfort", release)
        self._extract = TraceContextTextMapPropagator().extract
        self._inside, self._server = set_span_in_context, SpanKind.SERVER

    @classmethod
    def otlp(cls, endpoint: str, *, share: float, release: str) -> "Tracing":
        """Traces to a collector at http:// or https://HOST:PORT; TracingUnavailable without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise TracingUnavailable(
                f"telemetry.otlp: {error.name} is not installed: pip install 'ringfort[otel]'"
            ) from None
        insecure = endpoint.startswith("http://")
        return cls(OTLPSpanExporter(endpoint, insecure=insecure, timeout=2), share=share, release=release)

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> TracedCall | None:
        """A call has come, with its metadata; None where it is not sampled."""
        carrier = {name: str(value) for name, value in metadata if name in _HEADERS}
        parent = self._extract(carrier) if carrier else None
        span = self._tracer.start_span(
            method, parent, self._server, {"rpc.system.name": "grpc", "rpc.method": method}
        )
        if not span.is_recording():
            return None
        inside = self._inside(span)
        start = self._tracer.start_span

        def add(name: str, seconds: float, ago_s: float) -> None:
            end_ns = time.time_ns() - round(ago_s * 1e9)
            start(name, inside, start_time=end_ns - round(seconds * 1e9)).end(end_ns)

        trace = Trace(f"{span.get_span_context().trace_id:032x}", add)
        return TracedCall(span, trace, CURRENT.set(trace))

    async def close(self) -> None:
        """Send what waits, as far as that takes a few seconds, and end."""
        await asyncio.to_thread(self._provider.shutdown)
