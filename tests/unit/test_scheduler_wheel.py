"""The timing wheel against a sorted list."""

from datetime import datetime, timedelta
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.scheduler.timer import Timer
from services.scheduler.wheel import SLOTS, TICK, Wheel
from tests.support.scheduler_table import MINUTE, NOW, SECOND, ids, timer

# Within a tick, within a round, several rounds away, and in the past.
_offsets = st.one_of(
    st.integers(-100_000, 100_000),
    st.integers(0, 60_000_000),
    st.integers(0, 10 * SLOTS * TICK // timedelta(microseconds=1)),
).map(lambda us: timedelta(microseconds=us))
_operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), _offsets),
        st.tuples(st.just("remove"), st.lists(st.integers(0, 200), max_size=5)),
        st.tuples(st.just("take"), st.tuples(_offsets, st.integers(1, 8))),
        st.tuples(st.just("cut"), st.integers(1, 8)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(_operations)
def test_inv5_the_wheel_gives_what_a_sorted_list_gives(operations: list[tuple[str, object]]) -> None:
    """Adding, removing, taking over jumps of the clock and cutting agree with a sorted list after every operation."""
    wheel, now = Wheel(NOW), NOW
    model: list[Timer] = []
    made: list[Timer] = []
    for name, argument in operations:
        match name, argument:
            case "add", timedelta() as offset:
                one = timer(now + offset, UUID(int=len(made) * 7919 % 104_729 + 1))
                made.append(one)
                wheel.add(one)
                model = sorted([*model, one], key=lambda it: it.mark)
            case "remove", list() as indexes if made:
                gone = {made[index % len(made)].id for index in indexes} | {UUID(int=0)}  # Nobody's.
                wheel.remove(gone)
                model = [it for it in model if it.id not in gone]
            case "take", (timedelta() as offset, int() as limit):
                now = max(now, now + offset)
                due = [it for it in model if it.fire_at <= now][:limit]
                assert wheel.take_due(now, limit) == due
                model = model[len(due) :]
            case "cut", int() as keep:
                kept = model[:keep]
                assert wheel.cut(keep) == (kept[-1].mark if len(model) > keep else None)
                model = kept
        assert len(wheel) == len(model)
        assert wheel.next_at() == (model[0].fire_at if model else None)
    assert wheel.take_due(datetime.max.replace(tzinfo=NOW.tzinfo), 1_000) == model


def test_a_timer_that_moves_is_found_at_its_new_time_only() -> None:
    """Taken out, whether the clock has passed it or not, and put in again."""
    wheel = Wheel(NOW)
    one, passed = timer(NOW + MINUTE), timer(NOW + SECOND)
    wheel.add(one)
    wheel.add(passed)
    assert wheel.take_due(NOW + SECOND, 0) == []
    wheel.remove([one.id, passed.id])
    moved = [replace(one, fire_at=NOW + 2 * SECOND), replace(passed, fire_at=NOW + 3 * SECOND)]
    for each in moved:
        wheel.add(each)
    assert wheel.next_at() == NOW + 2 * SECOND
    assert wheel.take_due(NOW + MINUTE, 9) == moved


def test_timers_of_the_same_instant_come_in_the_order_of_their_ids() -> None:
    """Whatever order they were added in, also when the clock has passed them already."""
    wheel = Wheel(NOW)
    for number in (3, 1):
        wheel.add(timer(NOW + SECOND, UUID(int=number)))
    assert wheel.take_due(NOW, 9) == []
    wheel.take_due(NOW + SECOND, 0)
    wheel.add(timer(NOW + SECOND, UUID(int=2)))
    assert ids(wheel.take_due(NOW + SECOND, 9)) == [UUID(int=1), UUID(int=2), UUID(int=3)]


def test_a_timer_later_in_the_same_tick_is_not_taken_early() -> None:
    """A tick is 50 ms; a timer fires at its microsecond."""
    wheel = Wheel(NOW)
    wheel.add(timer(NOW + timedelta(microseconds=1)))
    assert wheel.take_due(NOW, 9) == []
    assert len(wheel.take_due(NOW + timedelta(microseconds=1), 9)) == 1


def test_a_timer_rounds_ahead_waits_in_its_slot_for_its_round() -> None:
    """Two timers share a slot, a whole round apart."""
    wheel = Wheel(NOW)
    wheel.add(timer(NOW + MINUTE + SLOTS * TICK, UUID(int=1)))
    wheel.add(timer(NOW + MINUTE, UUID(int=2)))
    assert ids(wheel.take_due(NOW + MINUTE, 9)) == [UUID(int=2)]
    assert wheel.next_at() == NOW + MINUTE + SLOTS * TICK


def test_a_timer_is_in_once_however_often_it_is_added() -> None:
    """A page may bring what is here already."""
    wheel = Wheel(NOW)
    one = timer(NOW + SECOND)
    wheel.add(one)
    wheel.add(one)
    assert one.id in wheel
    assert wheel.take_due(NOW + SECOND, 9) == [one]
    assert one.id not in wheel
