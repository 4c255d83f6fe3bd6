"""From what callers send to entries: one function per call, each item checked and turned into what goes out.

Everything here is decided from the request and `now` alone. Commands on timers that exist are in rpc_timers; what needs
the database (requests, responses) is in rpc_requests.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from carillon.intake.v1 import intake_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from libs.errors import FieldViolation, Violations
from libs.ids import derived_id, new_id_forms
from libs.links.frames import Outgoing
from libs.wire import to_timestamp
from services.intake import rpc_checks as checks
from services.intake import rpc_checks_timers as timer_checks
from services.intake.payloads import MAX_FACTS_BYTES
from services.intake.rpc_answers import BatchAnswer, TriggerAnswer, refusal_of

MAX_ITEMS = 1_000
MAX_PAST = timedelta(days=30)
MAX_AHEAD = timedelta(minutes=5)


class Entries(Protocol):
    """See services.intake.stream_entries."""

    def notification(
        self,
        tenant: str,
        notification_id: bytes,
        content: bytes,
        *,
        entity: str,
        occur_time: bytes,
        expire_time: bytes | None,
    ) -> Outgoing: ...
    def timer(
        self,
        tenant: str,
        timer_id: bytes,
        *,
        entity: str,
        type: str,  # noqa: A002
        notification: bytes | None,
        event: bytes | None,
        times: Mapping[str, bytes],
        rules: Mapping[str, bytes],
    ) -> Outgoing: ...
    def facts(self, tenant: str, *, entity: str, facts: str) -> Outgoing: ...
    def timeline(
        self, tenant: str, run_id: UUID, *, timeline: str, entity: str, anchor_time: Timestamp
    ) -> Outgoing: ...
    def trigger_batch(
        self, tenant: str, *, batch: str, start_time: Timestamp | None, end_time: Timestamp
    ) -> Outgoing: ...


def notify(
    request: intake_pb2.NotifyRequest, *, tenant: str, now: datetime, entries: Entries
) -> BatchAnswer[intake_pb2.NotifyResponse]:
    """Notifications."""
    answer = BatchAnswer(intake_pb2.NotifyResponse(), "notifications")
    now_us, now_time = checks.microseconds_of(now), to_timestamp(now).SerializeToString()
    for item in request.notifications:
        found: list[FieldViolation] = []
        content = checks.check_content(found, "content", item.content)
        if entity := item.entity:
            checks.check_entity(found, "entity", entity)
        occur_time, expire_time = now_time, None
        if item.HasField("occur_time"):
            least_us, most_us = now_us - _us(MAX_PAST), now_us + _us(MAX_AHEAD)
            checks.check_instant(found, "occur_time", item.occur_time, least_us=least_us, most_us=most_us)
            occur_time = item.occur_time.SerializeToString()
        if item.HasField("expire_time"):
            checks.check_instant(found, "expire_time", item.expire_time, after_us=now_us)
            expire_time = item.expire_time.SerializeToString()
        if found:
            answer.refuse(refusal_of(found))
            continue
        item_id, notification_id = new_id_forms()
        entry = entries.notification(
            tenant, notification_id, content, entity=entity, occur_time=occur_time, expire_time=expire_time
        )
        answer.accept(item_id, (entry,))
    return answer


def schedule(
    answer: BatchAnswer[intake_pb2.ScheduleResponse],
    items: Iterable[intake_pb2.Schedule],
    *,
    tenant: str,
    now: datetime,
    entries: Entries,
) -> None:
    """Schedules, one-shot and recurring: the call's next `items`, added to its answer."""
    accept_time = to_timestamp(now).SerializeToString()
    for item in items:
        found: list[FieldViolation] = []
        entity, kind = item.entity, item.type
        checks.check_entity(found, "entity", entity)
        checks.check_timer_type(found, "type", kind)
        times, rules = _check_when(found, item, now)
        notification, event = _check_target(found, item)
        if item.HasField("condition"):
            timer_checks.check_condition(found, "condition", item.condition)
            rules["condition"] = item.condition.SerializeToString()
        if item.HasField("retry_policy"):
            _check_retry_policy(found, item)
            rules["retry_policy"] = item.retry_policy.SerializeToString()
        if found:
            answer.refuse(refusal_of(found))
            continue
        if "recurrence" in rules:
            times["accept_time"] = accept_time
        item_id, timer_id = new_id_forms()
        entry = entries.timer(
            tenant,
            timer_id,
            entity=entity,
            type=kind,
            notification=notification,
            event=event,
            times=times,
            rules=rules,
        )
        answer.accept(item_id, (entry,))


def _check_when(
    found: checks.Found, item: intake_pb2.Schedule, now: datetime
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The due time and the expiry, and the recurrence, as far as there are any, serialised."""
    times, rules = dict[str, bytes](), dict[str, bytes]()
    due_us = -1
    match item.WhichOneof("when"):
        case "at_time":
            due_us = checks.check_instant(found, "at_time", item.at_time)
            times["due_time"] = item.at_time.SerializeToString()
        case "after":
            due_time = checks.check_after(found, "after", item.after, now)
            if due_time is not None:
                due_us = checks.microseconds(due_time)
                times["due_time"] = due_time.SerializeToString()
        case "recurrence":
            timer_checks.check_overlap(found, "recurrence", item.recurrence, item.target)
            timer_checks.check_rule(found, "recurrence", item.recurrence, now)
            rules["recurrence"] = item.recurrence.SerializeToString()
        case _:
            found.append(FieldViolation("at_time", "one of at_time, after and recurrence must be given"))
    if item.HasField("expire_time"):
        after_us = max(checks.microseconds_of(now), due_us)
        checks.check_instant(found, "expire_time", item.expire_time, after_us=after_us)
        times["expire_time"] = item.expire_time.SerializeToString()
    return times, rules


def _check_target(found: checks.Found, item: intake_pb2.Schedule) -> tuple[bytes | None, bytes | None]:
    """The notification or the event, serialised."""
    target = item.target
    match target.WhichOneof("kind"):
        case "notification":
            return checks.check_content(found, "target.notification", target.notification), None
        case "event":
            timer_checks.check_event(found, "target.event", target.event)
            return None, target.event.SerializeToString()
    found.append(FieldViolation("target", "must have a notification or an event"))
    return None, None


def _check_retry_policy(found: checks.Found, item: intake_pb2.Schedule) -> None:
    if item.target.HasField("event"):
        timer_checks.check_retry_policy(found, "retry_policy", item.retry_policy)
    elif item.target.HasField("notification"):
        found.append(FieldViolation("retry_policy", "is for event targets only"))


def put_facts(
    request: intake_pb2.PutFactsRequest, *, tenant: str, entries: Entries
) -> BatchAnswer[intake_pb2.PutFactsResponse]:
    """Facts."""
    answer = BatchAnswer(intake_pb2.PutFactsResponse(), "facts")
    for item in request.facts:
        found: list[FieldViolation] = []
        checks.check_entity(found, "entity", item.entity)
        checks.check_object(found, "facts", item.facts, MAX_FACTS_BYTES)
        if found:
            answer.refuse(refusal_of(found))
        else:
            answer.accept("", (entries.facts(tenant, entity=item.entity, facts=item.facts),))
    return answer


def start_timeline(
    request: intake_pb2.StartTimelineRequest, *, tenant: str, now: datetime, entries: Entries
) -> BatchAnswer[intake_pb2.StartTimelineResponse]:
    """Starts of timelines. A run's id follows from what it is, so a second start is the same run."""
    answer = BatchAnswer(intake_pb2.StartTimelineResponse(), "starts")
    now_time = to_timestamp(now)
    for item in request.starts:
        found: list[FieldViolation] = []
        checks.check_timeline_name(found, "timeline", item.timeline)
        checks.check_entity(found, "entity", item.entity)
        if item.HasField("anchor_time"):
            checks.check_instant(found, "anchor_time", item.anchor_time)
        if found:
            answer.refuse(refusal_of(found))
            continue
        anchor_time = item.anchor_time if item.HasField("anchor_time") else now_time
        anchor_us = checks.microseconds(anchor_time)
        run_id = derived_id("timeline-run", tenant, item.timeline, item.entity, anchor_us)
        entry = entries.timeline(tenant, run_id, timeline=item.timeline, entity=item.entity, anchor_time=anchor_time)
        answer.accept(str(run_id), (entry,))
    return answer


def trigger_batch(
    request: intake_pb2.TriggerBatchRequest, *, tenant: str, now: datetime, entries: Entries
) -> TriggerAnswer:
    """A batch's trigger. Raises InvalidArgument."""
    violations = Violations()
    found: list[FieldViolation] = []
    now_us = checks.microseconds_of(now)
    checks.check_batch_name(found, "batch", request.batch)
    end_us, end_time = now_us, to_timestamp(now)
    if request.HasField("window_end_time"):
        end_time = request.window_end_time
        end_us = checks.check_instant(found, "window_end_time", end_time, most_us=now_us + _us(MAX_AHEAD))
    if request.HasField("window_start_time"):
        start_us = checks.check_instant(found, "window_start_time", request.window_start_time)
        if start_us >= end_us >= 0:
            found.append(FieldViolation("window_start_time", "must be before window_end_time"))
    violations.extend(found)
    violations.raise_if_any()
    start_time = request.window_start_time if request.HasField("window_start_time") else None
    return TriggerAnswer(entries.trigger_batch(tenant, batch=request.batch, start_time=start_time, end_time=end_time))


def check_size(count: int, name: str, most: int = MAX_ITEMS) -> None:
    """A call has 1 to `most` items. Raises InvalidArgument."""
    violations = Violations()
    if not 1 <= count <= most:
        violations.add(name, f"must have 1-{most:,} entries per call, got {count:,}")
    violations.raise_if_any()


def _us(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)
