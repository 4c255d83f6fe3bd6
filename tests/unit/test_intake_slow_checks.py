"""Schedules that take long to check: beside the loop, a few at a time, and not for callers that have gone."""

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from carillon.intake.v1 import intake_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.rpc import Deadline, Principal
from libs.rpc_context import acting
from services.intake import rpc_items
from services.intake.rpc import SLOW_CEL_CHARACTERS, SLOW_ITEMS, IntakeRpc
from services.intake.rpc_limits import RateLimit
from tests.support.clock import ManualClock

WEEKLY = timer_pb2.Recurrence(rrule="FREQ=WEEKLY")
SLOW = [
    intake_pb2.Schedule(recurrence=WEEKLY),
    intake_pb2.Schedule(recurrence=timer_pb2.Recurrence(cron="* * * * *", count=5)),
    intake_pb2.Schedule(recurrence=timer_pb2.Recurrence(cron="* * * * *", exclusions=[Timestamp(seconds=1)])),
    intake_pb2.Schedule(condition=timer_pb2.Condition(cel="!" * SLOW_CEL_CHARACTERS + "true")),
]


class Checks:
    """Stands in for rpc_items.schedule: counts, and lets go when told to."""

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.sizes: list[int] = []
        self.threads: set[int] = set()
        self.has_begun = asyncio.Event()
        self.gate = threading.Event()

    def __call__(self, _answer: object, items: Sequence[object], **_: object) -> None:
        """Check a few items."""
        self.sizes.append(len(items))
        self.threads.add(threading.get_ident())
        self._loop.call_soon_threadsafe(self.has_begun.set)
        assert threading.get_ident() == threading.main_thread().ident or self.gate.wait(10)


class Acceptance:
    """Takes everything."""

    async def accept(self, _command: object, prepare: Any) -> Any:
        """The answer as it is."""
        return await prepare(None)

    async def accept_ready(self, _command: object, answer: Any) -> Any:
        """The same."""
        return answer


@pytest.fixture
async def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    """What was checked, and where."""
    found = Checks(loop=asyncio.get_running_loop())
    monkeypatch.setattr(rpc_items, "schedule", found)
    return found


async def schedule(items: Sequence[intake_pb2.Schedule]) -> None:
    """One call with these items."""
    rpc = IntakeRpc(
        db=cast(Any, None),
        clock=ManualClock(datetime(2026, 3, 2, tzinfo=UTC)),
        acceptance=Acceptance(),
        entries=cast(Any, None),
        requests=cast(Any, None),
        rate=RateLimit(rate=0, burst=1_000),
        answer_margin=timedelta(0),
    )
    with acting(Principal(tenant="t", subject="s"), deadline=Deadline.after(timedelta(seconds=10))):
        await rpc.Schedule(intake_pb2.ScheduleRequest(schedules=items), cast(Any, None))


async def test_what_is_quick_is_checked_at_once(checks: Checks) -> None:
    """On the loop; the same condition a thousand times is one condition."""
    cel = timer_pb2.Condition(cel="!has(facts.paid)")
    await schedule([intake_pb2.Schedule(condition=cel, recurrence=timer_pb2.Recurrence(cron="0 9 * * *"))] * 1_000)
    assert checks.sizes == [1_000]
    assert checks.threads == {threading.get_ident()}


@pytest.mark.parametrize("item", SLOW)
async def test_what_is_slow_is_checked_beside_the_loop(checks: Checks, item: intake_pb2.Schedule) -> None:
    """One slow item is enough."""
    checks.gate.set()
    await schedule([*[intake_pb2.Schedule()] * 2 * SLOW_ITEMS, item])
    assert checks.sizes == [SLOW_ITEMS, SLOW_ITEMS, 1]
    assert threading.get_ident() not in checks.threads


async def test_checking_ends_when_its_caller_has_gone(checks: Checks) -> None:
    """What is under way is finished, the rest is never begun (INV-9)."""
    call = asyncio.create_task(schedule([intake_pb2.Schedule(recurrence=WEEKLY)] * 1_000))
    async with asyncio.timeout(10):
        await checks.has_begun.wait()
    call.cancel()
    checks.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert checks.sizes == [SLOW_ITEMS]
