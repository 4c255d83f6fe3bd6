"""services.intake.stream_entries: what is put together from pieces is the message that was meant."""

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from libs.ids import new_id
from libs.sharding import shard_of
from services.intake.stream_entries import Entries

ENTRIES = Entries(shards=8)
TEXT = st.text(max_size=200)
CONTENT = st.builds(
    timer_pb2.NotificationContent, type=TEXT, subscribers=st.lists(TEXT), payload=st.text(max_size=2_000)
)
TIME = st.builds(Timestamp, seconds=st.integers(0, 1 << 32), nanos=st.integers(0, 999_999_999))


@given(tenant=TEXT, content=CONTENT, entity=TEXT, occur_time=TIME, expire_time=st.none() | TIME)
def test_a_notification_is_the_message_it_stands_for(
    tenant: str,
    content: timer_pb2.NotificationContent,
    entity: str,
    occur_time: Timestamp,
    expire_time: Timestamp | None,
) -> None:
    """Field by field."""
    notification_id = new_id().bytes
    made = ENTRIES.notification(
        tenant,
        notification_id,
        content.SerializeToString(),
        entity=entity,
        occur_time=occur_time.SerializeToString(),
        expire_time=None if expire_time is None else expire_time.SerializeToString(),
    )
    expected = link_pb2.Notification(
        id=notification_id, content=content, entity=entity, occur_time=occur_time, expire_time=expire_time
    )
    assert link_pb2.Entry.FromString(made.body) == link_pb2.Entry(tenant=tenant, notification=expected)
    assert (made.receiver, made.partition) == ("digest", 0)


RULES: dict[str, Message] = {
    "recurrence": timer_pb2.Recurrence(cron="0 9 * * *", zone="Europe/Berlin"),
    "condition": timer_pb2.Condition(cel="!has(facts.paid)"),
    "retry_policy": timer_pb2.RetryPolicy(maximum_attempts=3),
}
TIMES: dict[str, Message] = {
    "due_time": Timestamp(seconds=1),
    "expire_time": Timestamp(seconds=2),
    "accept_time": Timestamp(seconds=3, nanos=4),
}
NOTIFICATION = timer_pb2.NotificationContent(type="a.b", subscribers=["anna"], payload="{}")
EVENT = timer_pb2.EventContent(type="a.b", payload="{}", report_within=Duration(seconds=5))


@pytest.mark.parametrize("names", [(), *((name,) for name in (*TIMES, *RULES)), (*TIMES, *RULES)])
@pytest.mark.parametrize("is_event", [False, True])
def test_a_timer_is_the_message_it_stands_for(names: tuple[str, ...], is_event: bool) -> None:
    """With any of its parts, for either target."""
    timer_id = new_id().bytes
    parts = {name: part for name, part in (TIMES | RULES).items() if name in names}
    made = ENTRIES.timer(
        "tenant",
        timer_id,
        entity="größe",
        type="reminder",
        notification=None if is_event else NOTIFICATION.SerializeToString(),
        event=EVENT.SerializeToString() if is_event else None,
        times={name: part.SerializeToString() for name, part in parts.items() if name in TIMES},
        rules={name: part.SerializeToString() for name, part in parts.items() if name in RULES},
    )
    target = link_pb2.TimerTarget(event=EVENT) if is_event else link_pb2.TimerTarget(notification=NOTIFICATION)
    expected = link_pb2.ScheduleTimer(id=timer_id, entity="größe", type="reminder", target=target)
    for name, part in parts.items():
        getattr(expected, name).CopyFrom(part)
    assert link_pb2.Entry.FromString(made.body) == link_pb2.Entry(tenant="tenant", schedule_timer=expected)
    assert (made.receiver, made.partition) == ("scheduler", shard_of("tenant", "größe", 8))
