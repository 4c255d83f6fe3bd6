"""services.digest.stream_stencil."""

from datetime import UTC, datetime, timedelta

from carillon.link.v1 import link_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.ids import new_id
from libs.wire import to_timestamp
from services.digest.commands import WindowTimer
from services.digest.stream_stencil import Stencil

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
instants = st.timedeltas(timedelta(0), timedelta(days=80_000)).map(lambda age: EPOCH + age)


@given(tenant=st.text(min_size=1), due=instants, now=instants, sequence=st.integers(1, (1 << 63) - 1))
def test_what_is_put_together_is_what_protobuf_makes_of_the_same_values(
    tenant: str, due: datetime, now: datetime, sequence: int
) -> None:
    """Whatever the common fields are, and as often as one stencil is filled in."""
    stencil = Stencil.of(tenant, due, sequence=sequence, now=now)
    for _ in range(2):
        timer = WindowTimer(tenant=tenant, window_id=new_id(), due_at=due)
        window = link_pb2.CloseWindow(window_id=timer.window_id.bytes, due_time=to_timestamp(due))
        whole = link_pb2.Entry(
            tenant=tenant,
            sequence=sequence,
            schedule_timer=link_pb2.ScheduleTimer(
                id=timer.id.bytes,
                entity=timer.entity,
                due_time=to_timestamp(due),
                target=link_pb2.TimerTarget(close_window=window),
                accept_time=to_timestamp(now),
            ),
        )
        body = stencil.filled(timer.id.bytes, timer.entity, timer.window_id.bytes)
        assert link_pb2.Entry.FromString(body) == whole
