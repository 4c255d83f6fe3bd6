"""How the calls of a gRPC server are counted and timed.

Labels are bounded: service and method come from the contract, never from the wire, and code from gRPC's seventeen.
Not `service`: Prometheus gives its targets a label of that name where it finds them through the operator.
"""

from collections.abc import Callable, Iterable
from functools import cache

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from libs.telemetry.exemplars import Exemplar

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# What handlers and interceptors answer with: these exist from the start, at 0, so that the first one is seen as an
# increase. UNKNOWN, OUT_OF_RANGE and DATA_LOSS nobody answers with.
_ALWAYS_THERE = (
    *(grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.INVALID_ARGUMENT),
    *(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS),
    *(grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION),
    *(grpc.StatusCode.ABORTED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL),
    *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED),
)


class RpcMetrics:
    """The metrics of one process's gRPC server; make one per registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "carillon_rpc_requests_total",
            "Calls answered, by their status code.",
            ("rpc_service", "method", "code"),
            registry=registry,
        )
        self._duration = Histogram(
            "carillon_rpc_duration_seconds",
            "Time from a call's arrival at the handler to its end; of a stream, the whole stream.",
            ("rpc_service", "method"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "carillon_rpc_in_flight", "Calls being answered now.", ("rpc_service", "method"), registry=registry
        )

    def of(self, service: str, method: str) -> "MethodMetrics":
        """One method's series; make them once, since finding a series by its labels costs more than changing it."""
        return MethodMetrics(
            requests=cache(lambda code: self._requests.labels(service, method, code.name)),
            duration=self._duration.labels(service, method),
            in_flight=self._in_flight.labels(service, method),
        )

    def know(self, service: str, methods: Iterable[str]) -> None:
        """Start every series of these methods at 0."""
        for method in methods:
            self._duration.labels(service, method)
            self._in_flight.labels(service, method)
            for code in _ALWAYS_THERE:
                self._requests.labels(service, method, code.name)


class MethodMetrics:
    """The series of one method. The calls in flight are a number of our own, read when somebody asks /metrics."""

    def __init__(
        self, *, requests: Callable[[grpc.StatusCode], Counter], duration: Histogram, in_flight: Gauge
    ) -> None:
        self._requests = requests
        self._ok = requests(grpc.StatusCode.OK)
        self._duration = duration
        self._calls = 0
        in_flight.set_function(lambda: self._calls)

    def started(self) -> None:
        """A call has arrived."""
        self._calls += 1

    def ended(self, code: grpc.StatusCode, seconds: float, exemplar: Exemplar | None = None) -> None:
        """A call that had started is over; `exemplar` leads to its trace."""
        self._calls -= 1
        (self._ok if code is grpc.StatusCode.OK else self._requests(code)).inc()
        self._duration.observe(seconds, exemplar)
