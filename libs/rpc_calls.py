"""What happens around every handler: trace, count, admit, authenticate, bound in time, decode, answer.

Handlers are wrapped where they are registered, not by gRPC's interceptors: so the methods are known beforehand (bounded
labels, series that start at 0), a request is decoded by us (a malformed one is the caller's INVALID_ARGUMENT; gRPC
itself would call it our INTERNAL), and health checks can be left out. Every handler ends in a status; what it raises
is turned into one by `libs.rpc_errors`. Cancellation, by the caller or a drain, passes through untouched.

To gRPC all requests are streams, of which we read one message where the contract says so: on the wire it is the same,
but gRPC would read a request before anybody knows of the call. So a call is counted, and its caller's credential
checked, before its request is waited for, under its deadline (INV-9): a slow upload is a call in progress.

An RPC whose servicer does not override the generated method answers UNIMPLEMENTED with a sentence saying so.
"""

from __future__ import annotations  # gRPC's classes are generic in its stubs only.

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import INVALID_SPAN, Span

from libs.auth import Authenticator, Metadata
from libs.errors import (
    CarillonError,
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from libs.rpc_context import Call, Deadline, enter_call
from libs.rpc_errors import InternalError, code_of, status_of
from libs.rpc_metrics import MethodMetrics, RpcMetrics
from libs.settings import GrpcSettings
from libs.telemetry.exemplars import exemplar_of
from libs.telemetry.logs import get_logger
from libs.telemetry.traces import is_on, note_status, server_span

_log = get_logger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

T = TypeVar("T")
Decode = Callable[[bytes], Any]
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_CLOCKS_DIFFER_S = 0.05
"""The caller may notice so much before us that its deadline has passed."""
_MAX_OPEN_CALLS = 1000
"""Of open methods, health checks that is: each client that watches health has one for as long as it is connected."""
_MALFORMED = "The request is not a valid protobuf message of this method"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One RPC: `service` is the full name, as in carillon.intake.v1.IntakeService."""

    service: str
    name: str
    is_open: bool
    is_stream: bool

    @property
    def path(self) -> str:
        """As it is named on the wire, without the leading slash."""
        return f"{self.service}/{self.name}"


@dataclass(frozen=True, slots=True)
class _Limits:
    """How long calls may take: those whose caller sets no deadline, and all others."""

    default_s: float
    longest_s: float

    @classmethod
    def of(cls, default: timedelta, longest: timedelta) -> Self:
        return cls(default.total_seconds(), longest.total_seconds())


class Calls:
    """Wraps handlers, and holds what all calls of a server share."""

    def __init__(self, settings: GrpcSettings, *, authenticator: Authenticator, metrics: RpcMetrics) -> None:
        self._max_in_flight = settings.max_concurrent_rpcs
        self._unary = _Limits.of(settings.default_deadline, settings.max_deadline)
        self._stream = _Limits.of(settings.max_stream_duration, settings.max_stream_duration)
        self._authenticator = authenticator
        self._metrics = metrics
        self._is_traced = is_on()
        self._in_flight = 0
        self._open_in_flight = 0
        self._is_draining = False
        self._has_ended = asyncio.Event()
        self._has_refused = asyncio.Event()

    async def drain(self, limit_s: float, *, quiet_s: float, most_quiet_s: float) -> None:
        """Refuse new calls; returns when those in progress have ended and nobody has called for `quiet_s`.

        At the latest after `limit_s`, of which at most `most_quiet_s` go by waiting for quiet. Open methods go on.
        """
        self._is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._in_flight:
                    self._has_ended.clear()
                    await self._has_ended.wait()
                async with asyncio.timeout(most_quiet_s):
                    while await self._is_called_within(quiet_s):
                        pass

    async def _is_called_within(self, quiet_s: float) -> bool:
        self._has_refused.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._has_refused.wait(), quiet_s)
        return self._has_refused.is_set()

    def wrap(self, method: Method, handler: Handler) -> Handler:
        """The same RPC, with everything that happens around it. Open methods need no credential, have no deadline."""
        behavior, decode = _behavior_of(handler), handler.request_deserializer or _as_it_is
        metrics = self._metrics.of(method.service, method.name)

        async def work(requests: AsyncIterator[bytes], context: Context) -> Any:
            is_many = handler.request_streaming
            request = _decoded_many(requests, decode) if is_many else await _only_request(context, decode)
            results = behavior(request, context)
            return await (_many(results, context) if handler.response_streaming else results)

        async def wrapped(requests: AsyncIterator[bytes], context: Context) -> Any:
            return await self._run(method, metrics, context, lambda: work(requests, context))

        make: Callable[..., Handler] = grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
        return make(wrapped, request_deserializer=None, response_serializer=handler.response_serializer)

    async def _run(
        self, method: Method, metrics: MethodMetrics, context: Context, work: Callable[[], Awaitable[T]]
    ) -> T:
        """One call from arrival to status: the outermost frame of every handler."""
        started, code = time.perf_counter(), grpc.StatusCode.UNKNOWN
        span: Span = INVALID_SPAN
        metrics.started()
        try:
            metadata: Metadata = context.invocation_metadata() or ()  # Made anew each time it is asked for.
            carrier, is_traced = _carrier(metadata), self._is_traced
            with server_span(method.service, method.name, carrier, is_traced=is_traced) as span:
                try:
                    result = await self._answer(method, context, metadata, work, span)
                    code = _code_set(context)
                    return result
                except asyncio.CancelledError:
                    code = _code_of_cancellation(context)
                    raise
                except grpc.aio.AbortError:
                    code = _code_set(context)
                    raise
                except Exception as failure:  # noqa: BLE001 - the outermost frame of a call; it logs and counts.
                    error = _explained(failure, method, context)
                    code = code_of(error)
                finally:
                    note_status(span, code)
            await context.abort_with_status(status_of(error))
        finally:
            metrics.ended(code, time.perf_counter() - started, exemplar_of(span))

    async def _answer(
        self, method: Method, context: Context, metadata: Metadata, work: Callable[[], Awaitable[T]], span: Span
    ) -> T:
        if method.is_open:
            return await self._answer_open(work)
        given_s: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say.
        limits = self._stream if method.is_stream else self._unary
        seconds = limits.default_s if given_s is None else min(given_s, limits.longest_s)
        deadline = Deadline(asyncio.get_running_loop().time() + seconds)
        self._enter()
        try:
            if seconds == given_s:  # gRPC itself keeps it, and cancels us: a timer of ours would cost 15 µs.
                return await self._admit(metadata, deadline, work, span)
            timeout = deadline.timeout()
            try:
                async with timeout:
                    return await self._admit(metadata, deadline, work, span)
            except TimeoutError:
                if not timeout.expired():
                    raise
                raise DeadlineExceeded(metadata={"method": method.path}) from None
        finally:
            self._in_flight -= 1
            self._has_ended.set()

    async def _answer_open(self, work: Callable[[], Awaitable[T]]) -> T:
        """Health has calls of its own, so that it answers while there are too many of the others."""
        if self._open_in_flight >= _MAX_OPEN_CALLS:
            raise _too_many_calls(_MAX_OPEN_CALLS)
        self._open_in_flight += 1
        try:
            return await work()
        finally:
            self._open_in_flight -= 1

    async def _admit(self, metadata: Metadata, deadline: Deadline, work: Callable[[], Awaitable[T]], span: Span) -> T:
        _check_metadata(metadata)
        principal = await self._authenticator.authenticate(metadata)
        span.set_attribute("carillon.tenant", principal.tenant)
        enter_call(Call(principal=principal, deadline=deadline))
        return await work()

    def _enter(self) -> None:
        """Count one of the calls that a server answers at once; ResourceExhausted when none is free (INV-9)."""
        if self._is_draining:
            self._has_refused.set()
            raise Unavailable("This process is stopping and has done nothing; call again.", reason="STOPPING")
        if self._in_flight >= (limit := self._max_in_flight):
            raise _too_many_calls(limit)
        self._in_flight += 1


def _too_many_calls(limit: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"This process is answering {limit} calls, as many as it may at once.",
        retry_after=timedelta(seconds=1),
        reason="TOO_MANY_CALLS",
        metadata={"limit": str(limit)},
    )


def _behavior_of(handler: Handler) -> Callable[[Any, Context], Any]:
    behavior: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    return cast("Callable[[Any, Context], Any]", behavior)


async def _many(results: Any, context: Context) -> None:
    """Write what an async generator yields; a coroutine has written with the context itself."""
    if not hasattr(results, "__aiter__"):
        await results
        return
    async for result in results:
        await context.write(result)


def _as_it_is(request: bytes) -> bytes:
    return request


async def _only_request(context: Context, decode: Decode) -> Any:
    """The request, decoded; DecodeError becomes the caller's mistake."""
    request: Any = await context.read()
    if request is grpc.aio.EOF:
        raise InvalidArgument(message="The request has not arrived as a whole.", reason="MALFORMED_REQUEST")
    return _decoded_one(request, decode)


def _decoded_one(request: bytes, decode: Decode) -> Any:
    try:
        return decode(request)
    except (DecodeError, UnicodeDecodeError) as err:
        raise InvalidArgument(
            message=f"{_MALFORMED}, or one of its strings is not valid UTF-8.", reason="MALFORMED_REQUEST"
        ) from err


async def _decoded_many(requests: AsyncIterator[bytes], decode: Decode) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded_one(request, decode)


def _check_metadata(metadata: Metadata) -> None:
    """Metadata is printable ASCII unless its key ends in -bin (gRPC over HTTP2, `ASCII-Value`)."""
    wrong = [
        FieldViolation(f"metadata[{key!r}]", "must be printable ASCII; binary values need a key that ends in -bin")
        for key, value in metadata
        if isinstance(value, str) and not (value.isascii() and value.isprintable())
    ]
    if wrong:
        raise InvalidArgument(wrong, reason="MALFORMED_METADATA")


def _carrier(metadata: Metadata) -> dict[str, str]:
    """The metadata that trace propagation reads."""
    return {key: value for key, value in metadata if isinstance(value, str) and key in ("traceparent", "tracestate")}


def _code_set(context: Context) -> grpc.StatusCode:
    """What the handler set itself, as health does; OK when it set nothing. gRPC gives a number or a StatusCode."""
    code: Any = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code, grpc.StatusCode.OK)


def _code_of_cancellation(context: Context) -> grpc.StatusCode:
    """Why gRPC cancels a handler: its caller's deadline, which both sides keep, or the caller or a drain before it."""
    left_s: float | None = context.time_remaining()
    is_overdue = left_s is not None and left_s < _CLOCKS_DIFFER_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_overdue else grpc.StatusCode.CANCELLED


def _explained(failure: Exception, method: Method, context: Context) -> CarillonError:
    """What the caller is told. Everything unexpected is logged here, once, with its traceback."""
    if isinstance(failure, NotImplementedError) and _code_set(context) is grpc.StatusCode.UNIMPLEMENTED:
        return Unimplemented(
            f"{method.path} is part of the contract and not built yet.", metadata={"method": method.path}
        )
    if isinstance(failure, CarillonError) and code_of(failure) is not grpc.StatusCode.INTERNAL:
        _log.debug("Refused a call.", method=method.path, reason=failure.reason, error=failure.message)
        return failure
    error = InternalError()
    _log.error("A call failed unexpectedly.", method=method.path, error_id=error.error_id, exc_info=failure)
    return error
