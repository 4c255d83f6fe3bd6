"""What the scheduler's metrics count: each moves when the thing happens, and lateness is nobody else's fault."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import pytest

from libs.errors import ResourceExhausted
from services.scheduler import metrics
from services.scheduler.attempts import RetryPolicy
from services.scheduler.commands import Changes
from services.scheduler.conditions import NoAnswer, ServiceCondition
from services.scheduler.loops_engine import Engine
from services.scheduler.loops_leases import Leases
from services.scheduler.recurrence import Misfire, Overlap
from services.scheduler.settings import SchedulerSettings
from services.scheduler.store_leases import Situation
from services.scheduler.timer import State
from tests.support.metrics import Since, sample
from tests.support.scheduler_table import DAY, HOUR, MINUTE, NOW, SECOND, Table, hourly, step, timeline

LATENESS = "carillon_scheduler_lateness_seconds"


class Counted(Table):
    """A table whose turns are counted as the engine counts those it has committed."""

    def _write(self, changes: Changes) -> None:
        super()._write(changes)
        metrics.count_turn([changes], self.now)


def late(since: Since) -> tuple[float, float]:
    """How many firings were counted, and how late they were together, in seconds."""
    return since(f"{LATENESS}_count"), since(f"{LATENESS}_sum")


def asked(no_answer: NoAnswer = NoAnswer.SKIP) -> ServiceCondition:
    """A condition that the service `stock` decides."""
    return ServiceCondition(service="stock", no_answer=no_answer, timeout=5 * SECOND)


# Counters


def test_a_timer_whose_time_comes_is_due_and_fires() -> None:
    """Once each; and it had been accepted."""
    since, table = Since(), Counted()
    table.run(table.schedule(NOW), table.schedule(NOW + DAY))
    assert since("carillon_scheduler_timers_accepted_total") == 2
    assert since("carillon_scheduler_timers_due_total") == 1
    assert since("carillon_scheduler_timers_fired_total", target="notification") == 1


def test_what_is_skipped_is_due_and_did_not_fire() -> None:
    """It is decided as skipped, and its reason is told."""
    since, table = Since(), Counted()
    table.run(table.schedule(NOW, condition="false"))
    assert since("carillon_scheduler_timers_due_total") == 1
    assert since("carillon_scheduler_timers_fired_total", target="notification") == 0
    assert since("carillon_scheduler_timers_decided_total", state="skipped") == 1
    assert since("carillon_scheduler_timers_skipped_total", reason="condition") == 1


def test_a_condition_with_more_facts_than_a_note_holds_is_one_all_the_same() -> None:
    """The note is cut off; the reason is not lost."""
    since, table = Since(), Counted()
    table.run(table.put_facts(text="x" * 9_000), table.schedule(NOW, condition="facts.text == 'y'"))
    assert since("carillon_scheduler_timers_skipped_total", reason="condition") == 1


def test_an_occurrence_that_came_too_late_is_missed() -> None:
    """By its misfire policy."""
    since, table = Since(), Counted()
    table.turn(table.schedule(None, recurrence=hourly(misfire=Misfire.SKIP)))
    table.run(until=NOW + HOUR + 2 * MINUTE)
    assert since("carillon_scheduler_timers_skipped_total", reason="missed") == 1


def test_an_occurrence_whose_predecessor_has_no_outcome_overlaps() -> None:
    """By its overlap policy."""
    since, table = Since(), Counted()
    table.turn(table.event(None, recurrence=hourly(overlap=Overlap.SKIP), report_within=DAY))
    table.go(NOW + 2 * HOUR)
    assert since("carillon_scheduler_timers_skipped_total", reason="overlap") == 1


@pytest.mark.parametrize(("holds", "reason"), [(False, "answer"), (None, "no_answer")])
def test_what_a_service_says_no_to_and_its_silence_are_told_apart(holds: bool | None, reason: str) -> None:
    """Its no is an answer; three questions without one are none."""
    since, table = Since(), Counted()
    table.run(one := table.schedule(NOW, asked=asked()))
    table.turn(answers=[table.answer(holds)])
    table.run(until=table.rows[one.id].fire_at)
    table.go(NOW + HOUR)
    assert {one: since("carillon_scheduler_timers_skipped_total", reason=one) for one in ("answer", "no_answer")} == {
        "answer": float(reason == "answer"),
        "no_answer": float(reason == "no_answer"),
    }


def test_ends_are_counted_by_state() -> None:
    """Cancelled by an order, done by a report, failed for want of one, expired."""
    since, table = Since(), Counted()
    table.run(waiting := table.schedule(NOW + DAY))
    table.turn(table.cancel(ids=[waiting.id]))
    table.run(done := table.event(NOW))
    table.turn(table.report(done.id))
    table.run(table.event(NOW, retry=RetryPolicy(most_attempts=1)), until=SECOND)
    table.run(until=2 * MINUTE)
    table.run(table.schedule(NOW, expires_at=NOW + SECOND))
    states = ("cancelled", "done", "failed", "expired")
    assert [since("carillon_scheduler_timers_decided_total", state=one) for one in states] == [1, 1, 1, 1]


def test_what_is_tried_again_is_counted_by_why() -> None:
    """For want of a report, then because of one that it failed; the last attempt has no retry, done has none."""
    since, table = Since(), Counted()
    policy = RetryPolicy(initial=SECOND, longest=SECOND, most_attempts=3)
    table.run(one := table.event(NOW, retry=policy), other := table.event(NOW, retry=policy))
    table.turn(table.report(other.id))
    table.go(NOW + 2 * MINUTE)
    table.turn(table.report(one.id, attempt=2, error="no stock"))
    table.go(NOW + HOUR)
    assert (table.rows[one.id].state, table.rows[one.id].attempts) == (State.FAILED, 3)
    counted = {one: since("carillon_scheduler_retries_total", reason=one) for one in ("no_report", "reported")}
    assert counted == {"no_report": 1, "reported": 1}


# Lateness


def test_lateness_counts_from_the_due_time() -> None:
    """Two seconds after it, the second bucket of the objective is missed."""
    since, table = Since(), Counted()
    table.turn(table.schedule(NOW + MINUTE), table.schedule(NOW + HOUR))
    table.run(until=NOW + MINUTE + 2 * SECOND)
    assert late(since) == (1, 2)
    assert since(f"{LATENESS}_bucket", le="1.0") == 0
    table.run(until=NOW + HOUR)
    assert since(f"{LATENESS}_bucket", le="1.0") == 1


def test_what_arrives_late_is_late() -> None:
    """A link that holds it up is no excuse."""
    since, table = Since(), Counted(now=NOW + 10 * SECOND)
    table.run(table.schedule(NOW + SECOND, accepted_at=NOW))
    assert late(since) == (1, 9)


def test_what_was_due_when_it_was_asked_for_counts_from_then() -> None:
    """A caller who asks for yesterday is not served late."""
    since, table = Since(), Counted(now=NOW + 3 * SECOND)
    table.run(table.schedule(NOW - DAY, accepted_at=NOW))
    assert late(since) == (1, 3)


def test_a_timeline_that_begins_in_the_past_is_not_late() -> None:
    """Its steps count from its start."""
    since, table = Since(), Counted(timelines=[timeline(step("a", MINUTE))])
    table.run(table.start(NOW - DAY))
    assert late(since) == (1, 0)


def test_what_is_resumed_or_moved_after_its_time_counts_from_then() -> None:
    """It could not fire before."""
    since, table = Since(), Counted()
    table.turn(table.schedule(NOW + MINUTE), table.schedule(NOW + DAY, entity="f"))
    table.turn(table.pause())
    table.run(until=NOW + HOUR)
    table.run(table.resume(), table.reschedule(NOW, "f"))
    assert late(since) == (2, 0)


def test_a_backfill_is_not_late() -> None:
    """It makes up for what is long past."""
    since, table = Since(), Counted()
    schedule = table.schedule(None, recurrence=hourly(start=NOW - DAY))
    table.turn(schedule)
    table.run(table.backfill(schedule.id, NOW - 3 * HOUR, NOW))
    assert since(f"{LATENESS}_sum") == 0
    assert since("carillon_scheduler_timers_fired_total", target="notification") == 3


def test_retries_and_answers_are_not_firings_of_ones_own_time() -> None:
    """They fire, and do not count for lateness: that was the service's time."""
    since, table = Since(), Counted()
    table.run(one := table.event(NOW, retry=RetryPolicy(initial=SECOND, longest=SECOND)))
    table.go(NOW + HOUR)
    assert table.rows[one.id].attempts > 1
    table.run(table.schedule(table.now, asked=asked()))
    table.run(answers=[table.answer(True)], until=SECOND)
    assert since("carillon_scheduler_timers_fired_total", target="event") > 1
    assert since("carillon_scheduler_timers_fired_total", target="notification") == 1
    assert late(since) == (1, 0)


def test_inv9_late_starts_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten, and then counts from its due time."""
    monkeypatch.setattr(metrics, "_LATE_STARTS", 2)
    since, table = Since(), Counted()
    table.turn(*(table.schedule(NOW - (n + 1) * MINUTE, accepted_at=NOW) for n in range(3)), most_timers=0)
    assert len(metrics._due_since) == 2
    table.run()
    assert late(since) == (3, 60)
    assert metrics._due_since == {}


# Gauges


class _Engine:
    """Holds what it is given."""

    def __init__(self, **epochs: int) -> None:
        self.epochs = {int(name[1:]): epoch for name, epoch in epochs.items()}

    def wake(self) -> None:
        """Nothing sleeps."""

    def by_lane(self, shards: Iterable[int]) -> list[list[int]]:
        return [[*shards]]


class _Store:
    """Finds this, and gives nothing."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation

    async def look(self) -> Situation:
        return self._situation

    async def renew(self, held: Mapping[int, int]) -> frozenset[int]:
        return frozenset(held)

    async def take(self, _shards: object) -> list[object]:
        return []


async def test_shards_that_nobody_holds_are_told() -> None:
    """Those whose lease has run out and that were not to be had; not those of others."""
    leases = {1: -SECOND, 2: SECOND, 3: 0 * SECOND}
    situation = Situation(members={"a": SECOND, "b": SECOND}, lease_ends_in=leases)
    beating = Leases(
        engine=cast(Any, _Engine(s0=1)),
        store=cast(Any, _Store(situation)),
        replica="a",
        shard_count=4,
        ttl=SECOND,
        tombstones_after=SECOND,
        consume=cast(Any, _nothing),
        nudge=_nudged,
    )
    beating._match_consumers = _nudged  # type: ignore[method-assign]
    beating._drop = _dropped  # type: ignore[method-assign]
    beating._store.release = _dropped  # type: ignore[method-assign]
    await beating.beat()
    assert sample("carillon_scheduler_shards") == 4
    assert sample("carillon_scheduler_shards_unheld") == 2
    assert sample("carillon_scheduler_live_replicas") == 2


async def _nudged() -> None: ...


async def _dropped(*_: object, **__: object) -> None: ...


def _nothing(_shard: int) -> None: ...


class _Full:
    """A link, or the events, with room or without."""

    is_full = True

    def check_room(self, *_: object) -> None:
        if self.is_full:
            raise ResourceExhausted("full", retry_after=SECOND)


def test_a_pause_of_firing_is_told_until_there_is_room() -> None:
    """Nothing fires while a link is full."""
    link = _Full()
    engine = Engine(
        **cast(Any, dict.fromkeys(("db", "store", "codec", "settlement", "events", "asker", "clock"), None)),
        sender=cast(Any, link),
        settings=SchedulerSettings(),
        shard_count=4,
        receivers=["digest"],
    )
    engine._events = engine._sender  # type: ignore[assignment]
    engine._clock = cast(Any, Table())
    engine._clock.now = lambda: NOW  # type: ignore[method-assign]
    engine.measure()
    assert sample("carillon_scheduler_firing_paused") == 1
    link.is_full = False
    engine.measure()
    assert sample("carillon_scheduler_firing_paused") == 0
