"""Between the contract's messages and the dispatcher's nouns."""

from collections.abc import Sequence
from itertools import accumulate

from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.explain.v1 import explain_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.wire import to_timestamp
from services.dispatcher.records import AttemptRecord, Content, DeadLetterCount, DeliveryRecord, StoryEntry

MAX_ANSWER_BYTES = 3 << 20


def delivery_of(one: DeliveryRecord) -> pb.Delivery:
    """As callers see it."""
    return pb.Delivery(
        id=str(one.id),
        digest_id=str(one.digest_id),
        subscriber=one.subscriber,
        channel=one.channel,
        address=one.address,
        subject=one.subject,
        state=pb.DeliveryState.ValueType(one.state),
        attempts=one.attempts,
        last_error=one.last_error,
        create_time=to_timestamp(one.created_at),
        end_time=to_timestamp(one.ended_at) if one.ended_at else None,
        next_attempt_time=to_timestamp(one.next_attempt_at) if one.next_attempt_at else None,
        priority=timer_pb2.Priority.ValueType(one.priority),
        reason=one.reason,
        list_id=one.list_id,
        parked_until_time=to_timestamp(one.parked_until) if one.parked_until else None,
    )


def fitting(deliveries: Sequence[pb.Delivery]) -> int:
    """How many of them, at least one where there is one, fit into an answer; gRPC takes 4 MiB."""
    ends = accumulate(one.ByteSize() for one in deliveries)
    return max(1, sum(end <= MAX_ANSWER_BYTES for end in ends))


def content_of(one: Content) -> pb.DeliveryContent:
    """As callers see it."""
    return pb.DeliveryContent(html=one.html, text=one.text, json=one.json)


def count_of(one: DeadLetterCount) -> pb.DeadLetterCount:
    """As callers see it."""
    return pb.DeadLetterCount(
        channel=one.channel,
        state=pb.DeliveryState.ValueType(one.state),
        reason=one.reason,
        count=one.count,
        first_time=to_timestamp(one.first_at),
        last_time=to_timestamp(one.last_at),
    )


def attempt_of(one: AttemptRecord) -> pb.Attempt:
    """As callers see it."""
    return pb.Attempt(
        number=one.number,
        start_time=to_timestamp(one.started_at),
        end_time=to_timestamp(one.ended_at) if one.ended_at else None,
        is_sent=one.is_sent,
        reply=one.reply,
        reason=one.reason,
    )


def entry_of(one: StoryEntry) -> explain_pb2.Entry:
    """As callers see it."""
    return explain_pb2.Entry(
        time=to_timestamp(one.at),
        service="dispatcher",
        kind=one.kind,
        sentence=one.sentence,
        details=one.details,
        related_ids=map(str, one.related_ids),
        is_expected=one.is_expected,
    )
