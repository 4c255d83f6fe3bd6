"""What tests of the scheduler's API ask again and again."""

from typing import Any

import grpc
import pytest
from carillon.scheduler.v1 import scheduler_pb2, timer_pb2

from libs.rpc_client import refusal_of
from tests.support.link_world import until


async def violations_of(call: Any) -> dict[str, str]:
    """What is wrong with each field, of a call that must be refused as INVALID_ARGUMENT."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return {one.field: one.description for one in refusal_of(caught.value).violations}


async def listed(stub: Any, **filters: Any) -> list[timer_pb2.Timer]:
    """All pages; no timer twice."""
    timers: list[timer_pb2.Timer] = []
    token = ""
    while True:
        answer = await stub.ListTimers(scheduler_pb2.ListTimersRequest(page_token=token, **filters))
        timers += answer.timers
        token = answer.next_page_token
        if not token:
            assert len({timer.id for timer in timers}) == len(timers)
            return timers


async def until_in(stub: Any, state: str, count: int, **filters: Any) -> list[timer_pb2.Timer]:
    """Wait until there are `count` timers in this state."""

    async def found() -> list[timer_pb2.Timer]:
        timers = await listed(stub, states=[timer_pb2.TimerState.Value(f"TIMER_STATE_{state}")], **filters)
        return timers if len(timers) == count else []

    return await until(found)
