"""Trying again what may be tried again, with growing pauses, and saying so."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final, TypeVar

import grpc
import stamina
import typer
from stamina.instrumentation import RetryDetails, set_on_retry_hooks

from cli.connection import refusal_text
from libs.rpc_client import refusal_of

_MAY_PASS: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
ResultT = TypeVar("ResultT")


async def persistently(call: Callable[[], Awaitable[ResultT]], *, attempts: int, within: timedelta) -> ResultT:
    """The result of a call that is harmless to repeat; the last error when attempts or time have run out.

    Tried again is what was UNAVAILABLE or DEADLINE_EXCEEDED, and what was refused for now, when the service said.
    """
    set_on_retry_hooks([_say])  # Stamina's own would log to standard output.
    context = stamina.retry_context(on=_pause, attempts=attempts, timeout=within, wait_initial=0.5, wait_max=20.0)
    async for attempt in context:
        with attempt:
            return await call()
    raise AssertionError("stamina raises the last error")


def _pause(error: Exception) -> bool | float:
    """Whether to try again, or after how many seconds at least."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        after = refusal_of(error).retry_after
        return after.total_seconds() if after is not None else False
    return error.code() in _MAY_PASS


def _say(details: RetryDetails) -> None:
    error = details.caused_by
    text = refusal_text(error) if isinstance(error, grpc.aio.AioRpcError) else str(error)
    typer.echo(f"Trying again in {details.wait_for:.1f} s: {text}", err=True)
