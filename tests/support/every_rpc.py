"""Every RPC of the four services, found in their contracts, with sample requests: for tests of what holds for all."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from carillon.digest.v1 import digest_pb2 as digest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.intake.v1 import intake_pb2 as intake
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from libs.ids import new_id

CONTRACTS: dict[str, Any] = {"intake": intake, "scheduler": scheduler, "digest": digest, "dispatcher": dispatcher}


def methods(service: str) -> list[MethodDescriptor]:
    """The methods of a service's contract."""
    (descriptor,) = CONTRACTS[service].DESCRIPTOR.services_by_name.values()
    return list(descriptor.methods)


def path_of(method: MethodDescriptor) -> str:
    """As it is called on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


async def call(channel: grpc.aio.Channel, method: MethodDescriptor, request: Message) -> Any:
    """The answer to one request; of a stream the answer to its only batch."""
    read = GetMessageClass(method.output_type).FromString
    if not method.client_streaming:
        unary: Any = channel.unary_unary(path_of(method), type(request).SerializeToString, read)
        return await unary(request, timeout=20)
    many: Any = channel.stream_stream(path_of(method), type(request).SerializeToString, read)
    while True:
        try:
            (answer,) = [answer async for answer in many(iter([request]), timeout=20)]
            return answer
        except grpc.aio.AioRpcError as error:
            # gRPC's client says this of itself when the server's refusal comes while it is still writing.
            if error.details() != "Internal error from Core":
                raise


def empty(method: MethodDescriptor) -> Message:
    """A request in which nothing is set."""
    return GetMessageClass(method.input_type)()


def samples(mark: str) -> Iterator[tuple[str, str, Message]]:
    """(service, method, request): at least one request per RPC, good where nothing must be there first.

    Whatever they store has `mark` in it, lower-case letters and dashes. They are in an order in which all succeed.
    """
    yield from _digest_samples(mark)
    yield from _scheduler_samples(mark)
    yield from _intake_samples(mark)
    yield from _dispatcher_samples(mark)


def content(mark: str, *subscribers: str) -> timer.NotificationContent:
    """What a notification says."""
    return timer.NotificationContent(
        type=f"{mark}.type", subscribers=subscribers or [f"{mark}-ann"], topics=[mark], payload="{}", group_key=mark
    )


def _at(later: timedelta) -> Timestamp:
    at = Timestamp()
    at.FromDatetime(datetime.now(UTC) + later)
    return at


def _digest_samples(mark: str) -> Iterator[tuple[str, str, Message]]:
    kind, ann = f"{mark}.type", f"{mark}-ann"
    aligned = digest.AlignedCadence(cron="0 8 * * *", zone="Europe/Berlin")
    external = digest.ExternalCadence(batch=mark)
    puts: list[Message] = [
        digest.PutCadenceRequest(cadence=digest.Cadence(id=f"{mark}/daily", name=mark, aligned=aligned)),
        digest.PutCadenceRequest(cadence=digest.Cadence(id=f"{mark}/batch", name=mark, external=external)),
        digest.PutNotificationTypeRequest(
            notification_type=digest.NotificationType(id=kind, name=mark, default_cadence=f"{mark}/batch")
        ),
        digest.PutSubscribersRequest(
            subscribers=[
                digest.Subscriber(id=ann, email=f"ann@{mark}.example", webhook_url=f"https://me@{mark}.example/")
            ]
        ),
        digest.PutSubscriptionsRequest(
            subscriptions=[
                digest.Subscription(
                    id=mark, subscriber=ann, type=kind, topic=mark, choices=[digest.Choice(cadence="immediate")]
                )
            ]
        ),
        digest.PutTemplateRequest(template=digest.Template(id=kind, locale="en", subject=mark, body=mark)),
        digest.ListNotificationTypesRequest(),
        digest.ListSubscribersRequest(),
        digest.ListSubscriptionsRequest(subscriber=ann),
        digest.ListCadencesRequest(),
        digest.ListTemplatesRequest(),
        digest.ListWindowsRequest(subscriber=ann),
        digest.ListDigestsRequest(subscriber=ann),
        digest.GetLedgerRequest(),
        digest.PreviewDigestRequest(window_id=str(new_id())),
        digest.GetDigestRequest(id=str(new_id())),
        digest.ExplainRequest(id=str(new_id())),
        digest.GetTemplateRequest(id=kind, locale="en"),
        digest.PreviewTemplateRequest(template=digest.Template(id=kind, locale="en")),
        digest.DeleteTemplateRequest(id=f"{mark}.gone", locale="en"),
    ]
    for one in puts:
        yield "digest", _method_of(one), one
    for noun in ("NotificationType", "Subscriber", "Subscription", "Cadence"):
        for verb, one_id in (("Get", mark), ("Delete", f"{mark}.gone")):
            yield "digest", f"{verb}{noun}", getattr(digest, f"{verb}{noun}Request")(id=one_id)


def _scheduler_samples(mark: str) -> Iterator[tuple[str, str, Message]]:
    step = timer.TimelineStep(
        name="first",
        offset=Duration(seconds=86_400),
        condition=timer.Condition(cel="!has(facts.paid)"),
        target=timer.Target(notification=content(mark)),
    )
    for one in (
        scheduler.PutTimelineRequest(timeline=timer.Timeline(name=mark, description=mark, steps=[step])),
        scheduler.GetTimerRequest(id=str(new_id())),
        scheduler.ListTimersRequest(entity=mark, type=mark),
        scheduler.PreviewOccurrencesRequest(recurrence=timer.Recurrence(cron="0 9 * * *", zone="Europe/Berlin")),
        scheduler.PreviewOccurrencesRequest(recurrence=timer.Recurrence(rrule="FREQ=DAILY")),
        scheduler.ListTimelinesRequest(name=mark),
        scheduler.ListShardsRequest(),
        scheduler.ExplainRequest(id=mark),
    ):
        yield "scheduler", _method_of(one), one


def _intake_samples(mark: str) -> Iterator[tuple[str, str, Message]]:
    now = intake.WAIT_FOR_ACCEPTED
    notify = intake.NotifyRequest(notifications=[intake.Notification(content=content(mark), entity=mark)], wait_for=now)
    target = timer.Target(notification=content(mark))
    once = intake.Schedule(
        entity=mark,
        type=mark,
        after=Duration(seconds=1),
        target=target,
        condition=timer.Condition(cel="!has(facts.paid)"),
    )
    rule = timer.Recurrence(cron="0 9 * * *", zone="Europe/Berlin")
    again = intake.Schedule(entity=mark, type=mark, recurrence=rule, target=target)
    other = intake.Schedule(entity=mark, recurrence=timer.Recurrence(rrule="FREQ=DAILY"), target=target)
    told = timer.EventContent(type=f"{mark}.due", payload="{}", report_within=Duration(seconds=3_600))
    asked = timer.ServiceCondition(service=mark, timeout=Duration(seconds=1))
    task = intake.Schedule(
        entity=mark,
        type=mark,
        after=Duration(seconds=86_400),
        target=timer.Target(event=told),
        condition=timer.Condition(service=asked),
        retry_policy=timer.RetryPolicy(maximum_attempts=3),
    )
    schedule = intake.ScheduleRequest(schedules=[once], wait_for=now)
    request = intake.Request(batch=mark, customer=f"{mark}-ann", item=mark, providers=[f"{mark}-bob"], payload="{}")
    submit = intake.SubmitRequestRequest(requests=[request], wait_for=now)
    answer = intake.Response(request_id=str(new_id()), provider=f"{mark}-bob", payload="{}")
    record = intake.RecordResponseRequest(responses=[answer], wait_for=now)
    for one in (
        notify,
        intake.NotifyStreamRequest(batch=notify),
        schedule,
        intake.ScheduleRequest(schedules=[again], wait_for=now),
        intake.ScheduleRequest(schedules=[other], wait_for=now),
        intake.ScheduleRequest(schedules=[task], wait_for=now),
        intake.ScheduleStreamRequest(batch=schedule),
        intake.PutFactsRequest(facts=[intake.EntityFacts(entity=mark, facts='{"a": 1}')], wait_for=now),
        intake.StartTimelineRequest(starts=[intake.TimelineStart(timeline=mark, entity=mark)], wait_for=now),
        submit,
        intake.SubmitRequestStreamRequest(batch=submit),
        record,
        intake.RecordResponseStreamRequest(batch=record),
        intake.WithdrawRequestRequest(ids=[str(new_id())], cause=mark, wait_for=now),
        intake.PutItemProvidersRequest(items=[intake.ItemProviders(item=mark, providers=[f"{mark}-bob"])]),
        intake.GetRequestRequest(id=str(new_id())),
        intake.ListRequestsRequest(batch=mark, customer=f"{mark}-ann", item=mark),
        intake.TriggerBatchRequest(batch=mark, window_end_time=_at(timedelta(minutes=1)), wait_for=now),
        intake.ExplainRequest(id=str(new_id())),
        *_timer_commands(mark),
    ):
        yield "intake", _method_of(one), one


def _timer_commands(mark: str) -> Iterator[Message]:
    """Commands on timers that are not there: accepted, and then refused by the scheduler, or of no effect."""
    now, some_id, entity = intake.WAIT_FOR_ACCEPTED, str(new_id()), f"{mark}-c"
    for selector in (
        intake.Selector(ids=intake.IdSelector(ids=[some_id], entity=entity)),
        intake.Selector(entity=intake.EntitySelector(entity=entity, type=mark)),
        intake.Selector(timeline=intake.TimelineSelector(entity=entity, timeline=mark)),
    ):
        yield intake.CancelRequest(selector=selector, cause=mark, wait_for=now)
        yield intake.RescheduleRequest(selector=selector, after=Duration(seconds=1), wait_for=now)
        yield intake.PauseRequest(selector=selector, wait_for=now)
        yield intake.ResumeRequest(selector=selector, wait_for=now)
    trigger = intake.ScheduleTrigger(schedule_id=some_id, entity=entity)
    yield intake.TriggerScheduleRequest(triggers=[trigger], wait_for=now)
    backfill = intake.ScheduleBackfill(
        schedule_id=some_id, entity=entity, start_time=_at(timedelta(days=-2)), end_time=_at(timedelta(days=-1))
    )
    yield intake.BackfillScheduleRequest(backfills=[backfill], wait_for=now)
    outcome = intake.Outcome(timer_id=some_id, attempt=1, entity=entity, error=mark)
    yield intake.ReportOutcomeRequest(outcomes=[outcome], wait_for=now)


def _dispatcher_samples(mark: str) -> Iterator[tuple[str, str, Message]]:
    for channel, address in (
        ("email", f"{mark}@example.com"),
        ("webhook", f"https://{mark}.example/"),
        ("apprise", f"slack://{mark}"),
    ):
        suppression = dispatcher.Suppression(channel=channel, address=address, reason=mark)
        yield "dispatcher", "PutSuppression", dispatcher.PutSuppressionRequest(suppression=suppression)
    for one in (
        dispatcher.ListSuppressionsRequest(),
        dispatcher.DeleteSuppressionRequest(channel="email", address=f"{mark}.gone@example.com"),
        dispatcher.ListDeliveriesRequest(subscriber=f"{mark}-ann", digest_id=str(new_id())),
        dispatcher.GetDeliveryRequest(id=str(new_id())),
        dispatcher.ListDeadLettersRequest(),
        dispatcher.CountDeadLettersRequest(),
        dispatcher.RedriveRequest(delivery_ids=[str(new_id())], idempotency_key=mark),
        dispatcher.ExplainRequest(id=str(new_id())),
    ):
        yield "dispatcher", _method_of(one), one


def _method_of(request: Message) -> str:
    return request.DESCRIPTOR.name.removesuffix("Request")
