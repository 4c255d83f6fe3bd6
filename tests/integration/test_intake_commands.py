"""Intake's commands: what goes out for each, what the receipts turn into, and that nothing is lost on the way."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import grpc
import pytest
from carillon.intake.v1 import intake_pb2
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2
from pydantic import SecretStr

from libs import migrations
from libs.ids import derived_id
from libs.rpc_client import refusal_of
from libs.settings import PostgresSettings
from libs.sharding import shard_of
from libs.wire import to_duration, to_timestamp
from local.stack import PROJECT
from services.intake.store_tables import metadata
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import (
    LINKS,
    NOW,
    TENANT,
    IntakeWorld,
    content,
    intake_world,
    notification,
    schedule,
)


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake and its peers."""
    async with intake_world(postgres_url, open_database, open_bus) as it:
        yield it


def test_the_migrations_add_up_to_the_tables(postgres_url: str) -> None:
    """What the store queries is what the migrations make."""
    settings = PostgresSettings(url=SecretStr(postgres_url))
    migrations.upgrade(settings, "intake", PROJECT / "services" / "intake" / "migrations")
    migrations.check_models_match(settings, "intake", metadata)


async def test_a_notification_reaches_digest_before_the_answer(world: IntakeWorld) -> None:
    """APPLIED is the default of unary calls: its owner has it when the call returns (INV-1)."""
    expires = to_timestamp(NOW + timedelta(days=1))
    occurred = to_timestamp(NOW - timedelta(minutes=3))
    answer = await world.stub.Notify(
        intake_pb2.NotifyRequest(
            notifications=[notification(expire_time=expires, occur_time=occurred), notification(entity="")]
        )
    )
    assert answer.is_applied
    first, second = world.digest.entries
    assert first.tenant == TENANT
    assert first.sequence == second.sequence > 0
    assert first.notification == link_pb2.Notification(
        id=UUID(answer.results[0].id).bytes,
        content=content(),
        entity="shop-1",
        occur_time=occurred,
        expire_time=expires,
    )
    assert second.notification.occur_time == to_timestamp(NOW)
    assert not second.notification.HasField("expire_time")


async def test_a_notification_without_payload_gets_an_empty_object(world: IntakeWorld) -> None:
    """Nobody after intake meets a payload that is no JSON."""
    await world.stub.Notify(intake_pb2.NotifyRequest(notifications=[notification(content=content(payload=""))]))
    assert world.digest.entries[0].notification.content.payload == "{}"


async def test_valid_items_are_accepted_beside_invalid_ones(world: IntakeWorld) -> None:
    """Each item has its result; a wrong one names its field, and costs the others nothing."""
    answer = await world.stub.Notify(
        intake_pb2.NotifyRequest(
            notifications=[notification(), notification(content=content(payload="[1]", type="")), notification()]
        )
    )
    assert [bool(result.id) for result in answer.results] == [True, False, True]
    error = answer.results[1].error
    assert (error.code, error.field) == (3, "notifications[1].content.type")
    assert error.message == (
        "content.type must be 1-128 characters of [a-z0-9._/-]; content.payload must be a JSON object"
    )
    assert len(world.digest.entries) == 2


async def test_accepted_means_durable_and_published_later(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """With ACCEPTED nobody waits; with APPLIED and nobody there the answer comes before the deadline, no error."""
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False) as world:
        batch = intake_pb2.NotifyRequest(notifications=[notification()], wait_for=intake_pb2.WAIT_FOR_ACCEPTED)
        accepted = await world.stub.Notify(batch)
        batch.wait_for = intake_pb2.WAIT_FOR_APPLIED
        waited = await world.stub.Notify(batch, timeout=0.4)
        assert not accepted.is_applied
        assert not waited.is_applied
        assert accepted.results[0].id
        assert waited.results[0].id
        assert await world.count("outbox") == 2


async def test_a_schedule_becomes_a_timer_in_its_entitys_shard(world: IntakeWorld) -> None:
    """At, after, and a recurrence: each with what the caller gave, and when it was accepted."""
    due = to_timestamp(NOW + timedelta(hours=1))
    daily = timer_pb2.Recurrence(cron="0 9 * * 1-5", zone="Europe/Berlin")
    condition = timer_pb2.Condition(cel="has(facts.paid) && !facts.paid")
    answer = await world.stub.Schedule(
        intake_pb2.ScheduleRequest(
            schedules=[
                schedule(at_time=due, type="reminder", condition=condition),
                schedule(after=to_duration(timedelta(minutes=10)), entity="shop-2"),
                schedule(recurrence=daily, entity="shop-3"),
            ]
        )
    )
    assert answer.is_applied
    timers = {entry.schedule_timer.entity: entry.schedule_timer for entry in world.scheduler.entries}
    assert timers["shop-1"] == link_pb2.ScheduleTimer(
        id=UUID(answer.results[0].id).bytes,
        entity="shop-1",
        type="reminder",
        due_time=due,
        target=link_pb2.TimerTarget(notification=content()),
        condition=condition,
    )
    assert timers["shop-2"].due_time == to_timestamp(NOW + timedelta(minutes=10))
    assert timers["shop-3"].recurrence == daily
    assert not timers["shop-3"].HasField("due_time")
    shards = [shard_of(TENANT, entry.schedule_timer.entity, 8) for entry in world.scheduler.entries]
    assert world.scheduler.partitions == shards


async def test_a_due_time_in_the_past_is_accepted(world: IntakeWorld) -> None:
    """It fires at once; that is the scheduler's business."""
    past = to_timestamp(NOW - timedelta(days=400))
    answer = await world.stub.Schedule(intake_pb2.ScheduleRequest(schedules=[schedule(at_time=past)]))
    assert answer.results[0].id


IDS = intake_pb2.IdSelector(ids=["018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f"], entity="shop-1")
SELECTORS = [
    (
        intake_pb2.Selector(ids=IDS),
        link_pb2.TimerSelector(entity="shop-1", ids=[UUID(IDS.ids[0]).bytes]),
        link_pb2.CancelItems(entity="shop-1", timer_ids=[UUID(IDS.ids[0]).bytes]),
    ),
    (
        intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="shop-1")),
        link_pb2.TimerSelector(entity="shop-1"),
        link_pb2.CancelItems(entity="shop-1"),
    ),
    (
        intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="shop-1", type="shop.sale")),
        link_pb2.TimerSelector(entity="shop-1", type="shop.sale"),
        link_pb2.CancelItems(entity="shop-1", type="shop.sale"),
    ),
    (
        intake_pb2.Selector(timeline=intake_pb2.TimelineSelector(entity="shop-1", timeline="trial")),
        link_pb2.TimerSelector(entity="shop-1", timeline="trial"),
        link_pb2.CancelItems(entity="shop-1", timeline="trial"),
    ),
]


@pytest.mark.parametrize(("selector", "timers", "items"), SELECTORS)
async def test_cancel_goes_to_timers_and_items_and_adds_up_the_counts(
    world: IntakeWorld, selector: intake_pb2.Selector, timers: link_pb2.TimerSelector, items: link_pb2.CancelItems
) -> None:
    """INV-4: one command, the same sequence on both sides, counts from both receipts."""
    world.scheduler.results = lambda index, _: link_pb2.EntryResult(index=index, changed=3, already_left=1)
    world.digest.results = lambda index, _: link_pb2.EntryResult(index=index, changed=5, already_left=2)
    answer = await world.stub.Cancel(intake_pb2.CancelRequest(selector=selector, cause="paid"))
    assert answer == intake_pb2.CancelResponse(timers=3, items=5, already_left=3, is_applied=True)
    (to_scheduler,), (to_digest,) = world.scheduler.entries, world.digest.entries
    assert to_scheduler.cancel_timers == link_pb2.CancelTimers(selector=timers, cause="paid")
    assert to_digest.cancel_items == items
    assert to_scheduler.sequence == to_digest.sequence > 0
    assert world.scheduler.partitions == [shard_of(TENANT, "shop-1", 8)]


async def test_a_cancel_has_a_higher_sequence_than_what_was_accepted_before(world: IntakeWorld) -> None:
    """That is how receivers know what it hits, whatever the order of arrival (INV-4)."""
    await world.stub.Notify(intake_pb2.NotifyRequest(notifications=[notification()]))
    selector = intake_pb2.Selector(entity=intake_pb2.EntitySelector(entity="shop-1"))
    await world.stub.Cancel(intake_pb2.CancelRequest(selector=selector))
    notified, cancelled = world.digest.entries
    assert notified.sequence < cancelled.sequence


async def test_facts_and_timelines_go_to_their_entitys_shard(world: IntakeWorld) -> None:
    """PutFacts has no ids; a run's id follows from timeline, entity and anchor."""
    facts = await world.stub.PutFacts(
        intake_pb2.PutFactsRequest(facts=[intake_pb2.EntityFacts(entity="shop-1", facts='{"paid": null}')])
    )
    start = intake_pb2.TimelineStart(timeline="trial", entity="shop-1", anchor_time=to_timestamp(NOW))
    started = await world.stub.StartTimeline(intake_pb2.StartTimelineRequest(starts=[start]))
    again = await world.stub.StartTimeline(intake_pb2.StartTimelineRequest(starts=[start]))
    assert [result.id for result in facts.results] == [""]
    assert started.results[0].id == again.results[0].id
    first, second, _ = world.scheduler.entries
    assert first.put_facts == link_pb2.PutFacts(entity="shop-1", facts='{"paid": null}')
    assert second.start_timeline.id == UUID(started.results[0].id).bytes
    assert second.start_timeline.anchor_time == to_timestamp(NOW)
    assert len(set(world.scheduler.partitions)) == 1


async def test_an_item_its_owner_refuses_gets_the_owners_error(world: IntakeWorld) -> None:
    """A timeline nobody has stored: accepted at the door, refused by the scheduler, and the answer says so."""
    world.scheduler.results = lambda index, entry: (
        link_pb2.EntryResult(
            index=index, error_code=9, error_reason="TIMELINE_UNKNOWN", error_message="there is no timeline 'nope'"
        )
        if entry.start_timeline.timeline == "nope"
        else None
    )
    starts = [intake_pb2.TimelineStart(timeline=name, entity="shop-1") for name in ("trial", "nope")]
    answer = await world.stub.StartTimeline(intake_pb2.StartTimelineRequest(starts=starts))
    assert answer.is_applied
    assert answer.results[0].id
    assert answer.results[1] == intake_pb2.ItemResult(
        error=intake_pb2.ItemError(
            code=9, reason="TIMELINE_UNKNOWN", message="there is no timeline 'nope'", field="starts[1]"
        )
    )


async def test_a_batch_trigger_says_what_digest_did(world: IntakeWorld) -> None:
    """The logical window goes through as given, its end is now where it is absent."""
    world.digest.results = lambda index, _: link_pb2.EntryResult(index=index, changed=7, is_repeated=True)
    start = to_timestamp(NOW - timedelta(hours=4))
    answer = await world.stub.TriggerBatch(intake_pb2.TriggerBatchRequest(batch="deals", window_start_time=start))
    assert answer == intake_pb2.TriggerBatchResponse(windows=7, is_repeated=True, is_applied=True)
    assert world.digest.entries[0].trigger_batch == link_pb2.TriggerBatch(
        batch="deals", window_start_time=start, window_end_time=to_timestamp(NOW)
    )


async def test_a_thousand_items_travel_in_one_frame(world: IntakeWorld) -> None:
    """A batch costs one row and one message, not a thousand."""
    answer = await world.stub.Notify(intake_pb2.NotifyRequest(notifications=[notification() for _ in range(1_000)]))
    assert answer.is_applied
    assert len({result.id for result in answer.results}) == 1_000
    sequences = {entry.sequence for entry in world.digest.entries}
    assert len(world.digest.entries) == 1_000
    assert len(sequences) == 1


async def test_a_full_link_turns_commands_away_with_a_delay(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus
) -> None:
    """INV-9: at the limit callers hear RESOURCE_EXHAUSTED and when to come back; nothing is stored."""
    links = LINKS.model_copy(update={"max_unconfirmed_frames": 1})
    async with intake_world(postgres_url, open_database, open_bus, peers_run=False, links=links) as world:
        batch = intake_pb2.NotifyRequest(notifications=[notification()], wait_for=intake_pb2.WAIT_FOR_ACCEPTED)
        await world.stub.Notify(batch)
        await world.sender.measure_once()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await world.stub.Notify(batch)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal_of(raised.value).retry_after == timedelta(seconds=5)
        assert await world.count("outbox") == 1


async def test_streams_answer_every_batch_in_order(world: IntakeWorld) -> None:
    """The streaming twins are the unary calls in a row; their default is ACCEPTED."""

    async def batches() -> AsyncIterator[intake_pb2.NotifyStreamRequest]:
        for size in range(1, 41):
            batch = intake_pb2.NotifyRequest(notifications=[notification() for _ in range(size)])
            yield intake_pb2.NotifyStreamRequest(batch=batch)

    answers = [answer.batch async for answer in world.stub.NotifyStream(batches())]
    assert [len(answer.results) for answer in answers] == list(range(1, 41))
    assert not any(answer.is_applied for answer in answers)
    assert len(await world.digest.received(820)) == 820


async def test_a_stream_answers_without_waiting_for_the_next_batch(world: IntakeWorld) -> None:
    """A caller that sends one batch and waits for its answer before the next gets it."""
    call = world.stub.ScheduleStream()
    for _ in range(3):
        item = schedule(after=to_duration(timedelta(hours=1)))
        await call.write(intake_pb2.ScheduleStreamRequest(batch=intake_pb2.ScheduleRequest(schedules=[item])))
        answer = await asyncio.wait_for(call.read(), 10)
        assert answer.batch.results[0].id
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_a_batch_that_is_wrong_as_a_whole_ends_the_stream(world: IntakeWorld) -> None:
    """What was answered before is accepted."""

    async def batches() -> AsyncIterator[intake_pb2.NotifyStreamRequest]:
        yield intake_pb2.NotifyStreamRequest(batch=intake_pb2.NotifyRequest(notifications=[notification()]))
        yield intake_pb2.NotifyStreamRequest()

    call = world.stub.NotifyStream(batches())
    first = await call.read()
    assert first.batch.results[0].id
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_run_id_of_a_timeline_is_derived(world: IntakeWorld) -> None:
    """It is part of what other services may rely on."""
    start = intake_pb2.TimelineStart(timeline="trial", entity="shop-1", anchor_time=to_timestamp(NOW))
    answer = await world.stub.StartTimeline(intake_pb2.StartTimelineRequest(starts=[start]))
    since = (NOW - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert answer.results[0].id == str(derived_id("timeline-run", TENANT, "trial", "shop-1", since))


async def test_calls_at_once_share_transactions(world: IntakeWorld) -> None:
    """Group commit: sixty-four callers, fewer frames than that; each gets its own answer."""
    calls = [intake_pb2.NotifyRequest(notifications=[notification(entity=f"e{n}")]) for n in range(64)]
    answers = await asyncio.gather(*(world.stub.Notify(call) for call in calls))
    entries = await world.digest.received(64)
    assert all(answer.is_applied for answer in answers)
    told = {str(UUID(bytes=entry.notification.id)): entry.notification.entity for entry in entries}
    assert [told[answer.results[0].id] for answer in answers] == [f"e{n}" for n in range(64)]
    assert len({entry.sequence for entry in entries}) == 64
    (frames,) = await world.rows("SELECT count(*) FROM digest.inbox")
    assert frames[0] < 64
