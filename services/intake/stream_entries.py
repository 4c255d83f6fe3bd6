"""The entries that intake sends: what each command and each request turns into, and where it goes.

Contents that callers send (scheduler.v1 messages) are carried as they came: they are checked at the door, and copying
them field by field would cost more than everything else. Notifications and timers, which come by the ten thousand, are
not even made into messages: their pieces are serialised, and put together as protobuf would (libs.wire_format).
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from uuid import UUID

from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.ids import derived_id
from libs.links.frames import Addressed, Encoded, Outgoing
from libs.sharding import shard_of
from libs.wire import to_timestamp
from libs.wire_format import length, tag_of
from services.intake.commands import Selection
from services.intake.payloads import request_payload, response_payload, summary_payload
from services.intake.requests import Closing, Request, Response

REQUEST_ENTITY = "carillon:request:"

_TENANT = tag_of(link_pb2.Entry, "tenant")
_NOTIFICATION = tag_of(link_pb2.Entry, "notification")
_NOTIFICATION_ID = tag_of(link_pb2.Notification, "id") + b"\x10"
_CONTENT = tag_of(link_pb2.Notification, "content")
_NOTIFICATION_ENTITY = tag_of(link_pb2.Notification, "entity")
_OCCUR_TIME = tag_of(link_pb2.Notification, "occur_time")
_NOTIFICATION_EXPIRE_TIME = tag_of(link_pb2.Notification, "expire_time")
_TIMER = tag_of(link_pb2.Entry, "schedule_timer")
_TIMER_ID = tag_of(link_pb2.ScheduleTimer, "id") + b"\x10"
_TIMER_ENTITY = tag_of(link_pb2.ScheduleTimer, "entity")
_TYPE = tag_of(link_pb2.ScheduleTimer, "type")
_TARGET = tag_of(link_pb2.ScheduleTimer, "target")
_TELL = tag_of(link_pb2.TimerTarget, "notification")
_RAISE = tag_of(link_pb2.TimerTarget, "event")
_TIMES = {name: tag_of(link_pb2.ScheduleTimer, name) for name in ("due_time", "expire_time", "accept_time")}
_RULES = {name: tag_of(link_pb2.ScheduleTimer, name) for name in ("recurrence", "condition", "retry_policy")}


class Entries:
    """Makes entries; `shards` is how many the scheduler has."""

    def __init__(self, *, shards: int) -> None:
        self._shards = shards

    def notification(
        self,
        tenant: str,
        notification_id: bytes,
        content: bytes,
        *,
        entity: str,
        occur_time: bytes,
        expire_time: bytes | None,
    ) -> Encoded:
        """Something happened. The id is 16 bytes; content and times are messages, serialised."""
        about = entity.encode()
        pieces = [
            *(_NOTIFICATION_ID, notification_id, _CONTENT, length(content), content),
            *(_NOTIFICATION_ENTITY, length(about), about, _OCCUR_TIME, length(occur_time), occur_time),
        ]
        if expire_time is not None:
            pieces += (_NOTIFICATION_EXPIRE_TIME, length(expire_time), expire_time)
        body = b"".join(pieces)
        return Encoded(receiver="digest", body=b"".join((_of(tenant), _NOTIFICATION, length(body), body)))

    def timer(
        self,
        tenant: str,
        timer_id: bytes,
        *,
        entity: str,
        type: str,  # noqa: A002 - the contract's word.
        notification: bytes | None,
        event: bytes | None,
        times: Mapping[str, bytes],
        rules: Mapping[str, bytes],
    ) -> Encoded:
        """Tell subscribers or a business service later: one of `notification` and `event`, serialised as all else is.

        `times` are due_time, expire_time and accept_time, `rules` are recurrence, condition and retry_policy: those
        there are; exactly one of due_time and recurrence is.
        """
        about, kind = entity.encode(), type.encode()
        tag, told = (_RAISE, event) if notification is None else (_TELL, notification)
        assert told is not None
        target = b"".join((tag, length(told), told))
        pieces = [
            *(_TIMER_ID, timer_id, _TIMER_ENTITY, length(about), about, _TYPE, length(kind), kind),
            *(_TARGET, length(target), target),
        ]
        for name, one in times.items():
            pieces += (_TIMES[name], length(one), one)
        for name, one in rules.items():
            pieces += (_RULES[name], length(one), one)
        body = b"".join(pieces)
        return Encoded(
            receiver="scheduler",
            partition=shard_of(tenant, entity, self._shards),
            body=b"".join((_of(tenant), _TIMER, length(body), body)),
        )

    def cancel(self, tenant: str, selection: Selection, *, cause: str) -> list[Addressed]:
        """Cancel timers, and what there is in open digests: an entry to the scheduler, then one to digest."""
        timers = link_pb2.CancelTimers(selector=_selector(selection), cause=cause)
        items = link_pb2.CancelItems(
            entity=selection.entity,
            type=selection.type,
            timer_ids=[one.bytes for one in selection.ids],
            timeline=selection.timeline,
        )
        return [
            self._to_scheduler(selection.entity, link_pb2.Entry(tenant=tenant, cancel_timers=timers)),
            Addressed(receiver="digest", entry=link_pb2.Entry(tenant=tenant, cancel_items=items)),
        ]

    def reschedule(self, tenant: str, selection: Selection, *, due_time: Timestamp) -> Addressed:
        """Move timers."""
        timers = link_pb2.RescheduleTimers(selector=_selector(selection), due_time=due_time)
        return self._to_scheduler(selection.entity, link_pb2.Entry(tenant=tenant, reschedule_timers=timers))

    def pause(self, tenant: str, selection: Selection, *, is_paused: bool) -> Addressed:
        """Hold timers back, or let them go on."""
        timers = link_pb2.PauseTimers(selector=_selector(selection), is_paused=is_paused)
        return self._to_scheduler(selection.entity, link_pb2.Entry(tenant=tenant, pause_timers=timers))

    def trigger_schedule(
        self, tenant: str, timer_id: UUID, *, schedule_id: UUID, entity: str, due_time: Timestamp
    ) -> Addressed:
        """Fire a schedule once more; the timer that does it gets `timer_id`."""
        trigger = link_pb2.TriggerSchedule(
            id=timer_id.bytes, schedule_id=schedule_id.bytes, entity=entity, due_time=due_time
        )
        return self._to_scheduler(entity, link_pb2.Entry(tenant=tenant, trigger_schedule=trigger))

    def backfill(
        self, tenant: str, schedule_id: UUID, *, entity: str, start_time: Timestamp, end_time: Timestamp
    ) -> Addressed:
        """Make up for a schedule's occurrences in a range."""
        backfill = link_pb2.BackfillSchedule(
            schedule_id=schedule_id.bytes, entity=entity, start_time=start_time, end_time=end_time
        )
        return self._to_scheduler(entity, link_pb2.Entry(tenant=tenant, backfill_schedule=backfill))

    def outcome(
        self, tenant: str, timer_id: UUID, *, entity: str, attempt: int, is_done: bool, error: str
    ) -> Addressed:
        """What came of an event."""
        report = link_pb2.ReportOutcome(
            timer_id=timer_id.bytes, entity=entity, attempt=attempt, is_done=is_done, error=error
        )
        return self._to_scheduler(entity, link_pb2.Entry(tenant=tenant, report_outcome=report))

    def facts(self, tenant: str, *, entity: str, facts: str) -> Addressed:
        """What is known of an entity has changed."""
        put = link_pb2.PutFacts(entity=entity, facts=facts)
        return self._to_scheduler(entity, link_pb2.Entry(tenant=tenant, put_facts=put))

    def timeline(self, tenant: str, run_id: UUID, *, timeline: str, entity: str, anchor_time: Timestamp) -> Addressed:
        """A timeline starts."""
        start = link_pb2.StartTimeline(id=run_id.bytes, timeline=timeline, entity=entity, anchor_time=anchor_time)
        return self._to_scheduler(entity, link_pb2.Entry(tenant=tenant, start_timeline=start))

    def trigger_batch(self, tenant: str, *, batch: str, start_time: Timestamp | None, end_time: Timestamp) -> Addressed:
        """A batch's windows close."""
        trigger = link_pb2.TriggerBatch(batch=batch, window_start_time=start_time, window_end_time=end_time)
        return Addressed(receiver="digest", entry=link_pb2.Entry(tenant=tenant, trigger_batch=trigger))

    def request(self, tenant: str, request: Request) -> list[Outgoing]:
        """A request is open: a timer for its answer-by date, and one notification for all its providers.

        One, because its payload is the same for all: a copy for each would make 400 MiB of a call of 4 MiB (INV-9).
        """
        entity = f"{REQUEST_ENTITY}{request.id}"
        due = link_pb2.TimerTarget(request_due=link_pb2.RequestDue(request_id=request.id.bytes))
        timer = link_pb2.ScheduleTimer(
            id=request_timer_id(request.id).bytes,
            entity=entity,
            type="request_due",
            due_time=to_timestamp(request.answer_by),
            target=due,
            accept_time=to_timestamp(request.submitted_at),
        )
        told = self._told(
            tenant,
            request,
            derived_id("request-notification", request.id),
            "request",
            request.providers,
            request_payload(request),
            occurred_at=request.submitted_at,
            expires_at=request.answer_by,
        )
        return [self._to_scheduler(entity, link_pb2.Entry(tenant=tenant, schedule_timer=timer)), told]

    def response(self, tenant: str, request: Request, response: Response) -> Outgoing:
        """A provider has answered: the customer hears."""
        return self._told(
            tenant,
            request,
            derived_id("response-notification", response.id),
            "response",
            (request.customer,),
            response_payload(request, response),
            occurred_at=response.received_at,
        )

    def withdrawal(self, tenant: str, request: Request, *, cause: str) -> list[Addressed]:
        """A request is taken back: whatever waits for anybody because of it goes, its answer-by date included."""
        return self.cancel(tenant, Selection(entity=f"{REQUEST_ENTITY}{request.id}"), cause=cause)

    def summary(self, closing: Closing) -> Outgoing:
        """The answer-by date has come: the customer hears everything. It occurs at that date, however late we are."""
        return self._told(
            closing.tenant,
            closing.request,
            derived_id("summary-notification", closing.request.id),
            "summary",
            (closing.request.customer,),
            summary_payload(closing),
            occurred_at=closing.request.answer_by,
        )

    def _told(
        self,
        tenant: str,
        request: Request,
        notification_id: UUID,
        kind: str,
        subscribers: Sequence[str],
        payload: str,
        *,
        occurred_at: datetime,
        expires_at: datetime | None = None,
    ) -> Outgoing:
        content = timer_pb2.NotificationContent(
            type=f"{request.batch}/{kind}", subscribers=subscribers, payload=payload, group_key=request.item
        )
        return self.notification(
            tenant,
            notification_id.bytes,
            content.SerializeToString(),
            entity=f"{REQUEST_ENTITY}{request.id}",
            occur_time=to_timestamp(occurred_at).SerializeToString(),
            expire_time=None if expires_at is None else to_timestamp(expires_at).SerializeToString(),
        )

    def _to_scheduler(self, entity: str, entry: link_pb2.Entry) -> Addressed:
        return Addressed(receiver="scheduler", partition=shard_of(entry.tenant, entity, self._shards), entry=entry)


@lru_cache(1_024)
def _of(tenant: str) -> bytes:
    """An entry's field that says whose it is."""
    name = tenant.encode()
    return _TENANT + length(name) + name


def _selector(selection: Selection) -> link_pb2.TimerSelector:
    return link_pb2.TimerSelector(
        entity=selection.entity,
        type=selection.type,
        ids=[one.bytes for one in selection.ids],
        timeline=selection.timeline,
    )


def request_timer_id(request_id: UUID) -> UUID:
    """The timer of a request's answer-by date."""
    return derived_id("request-timer", request_id)
