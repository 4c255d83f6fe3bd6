"""Tells intake what the plan says: the calls of one kind in one request, every request repeatable by its key."""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

import grpc
import stamina
from carillon.intake.v1 import intake_pb2 as intake
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1.timer_pb2 import NotificationContent
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from local.demo import story
from local.demo.plan import Answer, Ask, Call, Delay, Start, Stop

_APPLIED = intake.WAIT_FOR_APPLIED
_MOST = 1000  # Items in one request; the contract's limit.
_DEADLINE_S = 10.0
_PATIENCE_S = 60.0
_RETRIED = {
    grpc.StatusCode.UNAVAILABLE,  # The service is down, or coming back.
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # It has too much to do.
    grpc.StatusCode.DEADLINE_EXCEEDED,  # Nobody knows; the key makes asking again harmless.
}

A = TypeVar("A")


class Refused(Exception):
    """Intake refused something that it should have accepted."""


class Caller:
    """Everything the demo tells intake. `counts` is what was accepted, by the story's names."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = IntakeServiceStub(channel)
        self._requests: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    async def tell(self, calls: Sequence[Call]) -> None:
        """Make these calls and wait until they have been applied, or at least are durable.

        Cancels come after all others, because a cancel has to find what was started before it.
        """
        by_kind: defaultdict[type[Call], list[Any]] = defaultdict(list)
        for call in calls:
            by_kind[type(call)].append(call)
        tell: Mapping[type[Call], Callable[[Sequence[Any]], Awaitable[None]]] = {
            Delay: self._notify,
            Ask: self._submit,
            Answer: self._answer,
            Start: self._start,
        }
        await asyncio.gather(*(tell[kind](part) for kind in tell for part in _parts(by_kind[kind])))
        await asyncio.gather(*(self._cancel(stop) for stop in by_kind[Stop]))

    async def put_facts(self, flown: Mapping[str, int]) -> None:
        """Tell how often each aircraft has flown."""
        for part in _parts(list(flown.items())):
            request = intake.PutFactsRequest(
                facts=[
                    intake.EntityFacts(entity=story.aircraft(tail), facts=json.dumps({"flights": flights}))
                    for tail, flights in part
                ],
                idempotency_key=_key("facts", part[0][0], str(part[0][1]), str(len(part))),
                wait_for=_APPLIED,
            )
            self._count("facts", (await repeated(self._stub.PutFacts, request)).results)

    async def trigger(self, end: datetime) -> None:
        """Close the batch's windows, as a CronJob would every four hours."""
        request = intake.TriggerBatchRequest(
            batch=story.BATCH,
            window_start_time=_timestamp(end - story.SHIFT),
            window_end_time=_timestamp(end),
            wait_for=_APPLIED,
        )
        await repeated(self._stub.TriggerBatch, request)
        self.counts["triggers"] += 1

    async def _notify(self, delays: Sequence[Delay]) -> None:
        request = intake.NotifyRequest(
            notifications=[
                intake.Notification(
                    content=NotificationContent(
                        type=story.DELAYED,
                        topics=[f"carrier:{delay.flight.carrier}", f"origin:{delay.flight.origin}"],
                        payload=json.dumps({"title": _late(delay), "flight": delay.flight.key}),
                    ),
                    entity=f"flight.{delay.flight.key}",
                    occur_time=_timestamp(delay.at),
                )
                for delay in delays
            ],
            idempotency_key=_key("delays", delays[0].flight.key, delays[-1].flight.key),
            wait_for=_APPLIED,
        )
        self._count("delays", (await repeated(self._stub.Notify, request)).results)

    async def _submit(self, asks: Sequence[Ask]) -> None:
        request = intake.SubmitRequestRequest(
            requests=[
                intake.Request(
                    batch=story.BATCH,
                    customer=story.passenger(ask.flight.key),
                    item=f"{ask.flight.origin}-{ask.flight.destination}",
                    providers=[story.desk(carrier) for carrier in ask.carriers],
                    payload=json.dumps({"title": f"{ask.flight.name} was cancelled", "flight": ask.flight.key}),
                    answer_within=_duration(story.ANSWER_WITHIN.total_seconds()),
                )
                for ask in asks
            ],
            idempotency_key=_key("requests", asks[0].flight.key, asks[-1].flight.key),
            wait_for=_APPLIED,
        )
        answer = await repeated(self._stub.SubmitRequest, request)
        for ask, result in zip(asks, answer.results, strict=True):
            if ask.carriers:
                self._count("requests", [result])
                self._requests[ask.flight.key] = result.id
            elif result.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]:
                self.counts["requests_refused"] += 1
            else:
                raise Refused(f"A request without any provider was not refused with FAILED_PRECONDITION: {result}")

    async def _answer(self, answers: Sequence[Answer]) -> None:
        request = intake.RecordResponseRequest(
            responses=[
                intake.Response(
                    request_id=self._requests[answer.flight.key],
                    provider=story.desk(answer.carrier),
                    payload=json.dumps({"title": f"{answer.carrier} has a seat", "carrier": answer.carrier}),
                )
                for answer in answers
            ],
            idempotency_key=_key("responses", answers[0].flight.key, answers[0].carrier, str(len(answers))),
            wait_for=_APPLIED,
        )
        self._count("responses", (await repeated(self._stub.RecordResponse, request)).results)

    async def _start(self, starts: Sequence[Start]) -> None:
        request = intake.StartTimelineRequest(
            starts=[
                intake.TimelineStart(
                    timeline=story.TRIAL, entity=story.aircraft(start.tail), anchor_time=_timestamp(start.at)
                )
                for start in starts
            ],
            idempotency_key=_key("starts", starts[0].tail, starts[-1].tail),
            wait_for=_APPLIED,
        )
        self._count("timelines", (await repeated(self._stub.StartTimeline, request)).results)

    async def _cancel(self, stop: Stop) -> None:
        request = intake.CancelRequest(
            selector=intake.Selector(entity=intake.EntitySelector(entity=story.aircraft(stop.tail))),
            cause="flown to a maintenance base",
            idempotency_key=_key("cancel", stop.tail),
            wait_for=_APPLIED,
        )
        await repeated(self._stub.Cancel, request)
        self.counts["cancels"] += 1

    def _count(self, name: str, results: Iterable[intake.ItemResult]) -> None:
        for result in results:
            if result.HasField("error"):
                raise Refused(f"One of the {name} was not accepted: {result.error}")
            self.counts[name] += 1


async def repeated(method: Callable[..., Awaitable[A]], request: object) -> A:
    """Call until it is answered: a service that was killed only delays it. Other errors are raised as they are."""
    async for attempt in stamina.retry_context(
        on=_is_passing, attempts=None, timeout=_PATIENCE_S, wait_initial=0.05, wait_max=1.0, wait_jitter=0.05
    ):
        with attempt:
            return await method(request, timeout=_DEADLINE_S)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _is_passing(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _RETRIED


def _parts(calls: Sequence[A]) -> Iterator[Sequence[A]]:
    return (calls[at : at + _MOST] for at in range(0, len(calls), _MOST))


def _key(*parts: str) -> str:
    return ":".join(("demo", *parts))


def _late(delay: Delay) -> str:
    minutes = (delay.at - delay.flight.scheduled_at) // timedelta(minutes=1)
    return f"{delay.flight.name} left {minutes} minutes late"


def _timestamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds))
