"""Timers whose condition a business service decides, through the whole scheduler."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import new_id
from libs.postgres import Transaction
from libs.wire import to_duration
from services.scheduler.commands import Changes
from services.scheduler.conditions import MAX_ASKS
from services.scheduler.store import TurnStore
from services.scheduler.timer import State
from tests.support.condition_service import ConditionService, hangs_up, responds, says, waits_for
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_world import until
from tests.support.scheduler_world import START, SchedulerWorld, scheduler_world

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
TIMEOUT = 5 * SECOND
AGAIN = [TIMEOUT + wait for wait in (SECOND, 2 * SECOND, 4 * SECOND)]
"""How long the shard waits for an answer, each time."""

MOMENT = timedelta(milliseconds=1)
"""Clocks that stand still do not exist: what is answered takes its turn just after the question."""

FAIL = timer_pb2.NO_ANSWER_POLICY_FAIL
FIRE = timer_pb2.NO_ANSWER_POLICY_FIRE
SKIP = timer_pb2.NO_ANSWER_POLICY_SKIP


@pytest.fixture
async def service() -> AsyncIterator[ConditionService]:
    """A service that says yes unless told otherwise."""
    async with ConditionService(says(True)).listening() as it:
        yield it


@pytest.fixture
async def world(
    postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus, service: ConditionService
) -> AsyncIterator[SchedulerWorld]:
    """A world with one replica that knows the service as `crm`."""
    async with scheduler_world(postgres_url, open_database, open_bus) as it:
        await it.start("a", condition_services={"crm": service.url})
        await it.until_held("a")
        yield it


def asking(
    world: SchedulerWorld,
    entity: str,
    *,
    name: str = "crm",
    policy: timer_pb2.NoAnswerPolicy.ValueType = FAIL,
    **more: Any,
) -> tuple[UUID, link_pb2.Entry]:
    """A timer that is due in a minute, if the service agrees; and its id."""
    condition = timer_pb2.Condition(
        service=timer_pb2.ServiceCondition(service=name, timeout=to_duration(TIMEOUT), no_answer_policy=policy)
    )
    timer_id = new_id()
    return timer_id, world.peer.timer(entity, START + MINUTE, id=timer_id, condition=condition, **more)


async def until_stored(world: SchedulerWorld, timer_id: UUID, **expected: object) -> dict[str, Any]:
    """Wait until a timer is stored with these values; all there are."""
    found: dict[str, Any] = {}

    async def look() -> bool:
        columns = ("state", "asks", "last_error", "note", "fire_at", "decided_at")
        async with world.db.read() as tx:
            cursor = await tx.raw.execute(f"SELECT {', '.join(columns)} FROM timer WHERE id = %s", (timer_id,))
            row = await cursor.fetchone()
        found.update(zip(columns, row or (), strict=False))
        return all(found.get(column) == value for column, value in expected.items())

    try:
        await until(look, timeout_s=10)
    except TimeoutError:
        raise AssertionError(f"{expected} never came; there is {found}") from None
    return found


async def fires_nothing_more(world: SchedulerWorld, entity: str, before: int) -> None:
    """A turn of the same shard passes in which only its own timer fires."""
    await world.peer.send(world.peer.timer(entity, START))
    got = await world.peer.received(before + 1)
    assert len(got) == before + 1
    await world.until_confirmed()
    assert len(world.peer.notifications) == before + 1


async def test_a_timer_fires_when_its_service_says_so(world: SchedulerWorld, service: ConditionService) -> None:
    """Not before it is due, once, with the verdict on record; the service is told what it is about."""
    service.behaviour = says(True, reason="still a customer")
    timer_id, entry = asking(world, "order-1", type="reminder")
    await world.peer.send(entry, world.peer.entry(put_facts=link_pb2.PutFacts(entity="order-1", facts='{"n": 1}')))
    world.clock.advance(MINUTE + MOMENT)
    (fired,) = await world.peer.received(1)
    assert (fired.entity, fired.timer_id) == ("order-1", timer_id.bytes)
    assert fired.occur_time.ToDatetime(tzinfo=START.tzinfo) == START + MINUTE
    stored = await until_stored(world, timer_id, state=State.SCHEDULED, asks=0, last_error=None)
    assert stored["note"] == '{"asked": "crm", "holds": true, "reason": "still a customer"}'
    assert service.questions == [
        {
            "tenant": "acme",
            "entity": "order-1",
            "timer_id": str(timer_id),
            "type": "reminder",
            "due_time": "2013-07-01T12:01:00+00:00",
            "facts": {"n": 1},
        }
    ]
    await fires_nothing_more(world, "order-1", 1)


async def test_a_timer_is_skipped_when_its_service_says_no(world: SchedulerWorld, service: ConditionService) -> None:
    """With the reason on record."""
    service.behaviour = says(False, reason="has left")
    timer_id, entry = asking(world, "order-1")
    await world.peer.send(entry)
    world.clock.advance(MINUTE + MOMENT)
    stored = await until_stored(world, timer_id, state=State.SKIPPED, asks=0)
    assert stored["note"] == '{"asked": "crm", "holds": false, "reason": "has left"}'
    assert stored["decided_at"] == START + MINUTE + MOMENT
    await fires_nothing_more(world, "order-1", 0)


async def ask_until_it_is_over(world: SchedulerWorld, timer_ids: Sequence[UUID], error: str) -> None:
    """Let the deadline of each question pass, after the answer to it has come."""
    world.clock.advance(MINUTE + MOMENT)
    for asks, wait in enumerate(AGAIN, start=1):
        for timer_id in timer_ids:
            await until_stored(world, timer_id, state=State.ASKING, asks=asks, last_error=error)
        world.clock.advance(wait + MOMENT)


async def test_silence_comes_to_what_the_policy_says(world: SchedulerWorld, service: ConditionService) -> None:
    """After three questions: failed with the last error, fired, or skipped; each on record."""
    service.behaviour = responds(500, text="out of cheese")
    timers = {policy: asking(world, f"e{policy}", policy=policy) for policy in (FAIL, FIRE, SKIP)}
    ids = {policy: timer_id for policy, (timer_id, _) in timers.items()}
    await world.peer.send(*(entry for _, entry in timers.values()))
    await ask_until_it_is_over(world, list(ids.values()), "it answered 500 out of cheese")
    failed = await until_stored(world, ids[FAIL], state=State.FAILED)
    assert failed["last_error"] == "crm gave no answer: it answered 500 out of cheese"
    assert [one.timer_id for one in await world.peer.received(1)] == [ids[FIRE].bytes]
    skipped = await until_stored(world, ids[SKIP], state=State.SKIPPED)
    assert '"no_answer": "SKIP"' in skipped["note"]
    assert '"no_answer": "FIRE"' in (await until_stored(world, ids[FIRE], state=State.SCHEDULED))["note"]
    assert len(service.questions) == 3 * MAX_ASKS
    await fires_nothing_more(world, f"e{FIRE}", 1)


async def test_a_service_that_comes_back_is_asked_again(world: SchedulerWorld, service: ConditionService) -> None:
    """The first question finds nobody, the second is answered."""
    service.behaviour = hangs_up
    timer_id, entry = asking(world, "order-1")
    await world.peer.send(entry)
    world.clock.advance(MINUTE + MOMENT)
    await until_stored(world, timer_id, state=State.ASKING, asks=1, last_error="Server disconnected")
    service.behaviour = says(True)
    world.clock.advance(AGAIN[0] + MOMENT)
    assert [one.timer_id for one in await world.peer.received(1)] == [timer_id.bytes]
    await until_stored(world, timer_id, state=State.SCHEDULED, asks=1)


async def test_a_name_that_is_not_registered_fails_in_words(world: SchedulerWorld) -> None:
    """The error says which name and which setting, while it is asked about and in the end."""
    timer_id, entry = asking(world, "order-1", name="crn")
    await world.peer.send(entry)
    error = "there is no service 'crn' in CARILLON_SCHEDULER_CONDITION_SERVICES"
    await ask_until_it_is_over(world, [timer_id], error)
    failed = await until_stored(world, timer_id, state=State.FAILED)
    assert failed["last_error"] == f"crn gave no answer: {error}"


async def test_inv1_another_replica_asks_again_when_the_owner_is_gone(
    world: SchedulerWorld, service: ConditionService
) -> None:
    """It was asked and had not answered when its owner went; the successor asks at the deadline, and it fires once."""
    gate = asyncio.Event()
    service.behaviour = waits_for(gate, says(True))
    timer_id, entry = asking(world, "order-1")
    await world.peer.send(entry)
    world.clock.advance(MINUTE + MOMENT)
    await service.asked(1)
    await world.stop("a")
    gate.set()
    await world.start("b", condition_services={"crm": service.url})
    await world.until_held("b")
    await until_stored(world, timer_id, state=State.ASKING, asks=0)
    world.clock.advance(AGAIN[0] + MOMENT)
    assert [one.timer_id for one in await world.peer.received(1)] == [timer_id.bytes]
    assert len(service.questions) == 2
    await fires_nothing_more(world, "order-1", 1)


async def test_inv1_an_answer_that_is_lost_with_its_turn_is_asked_for_again(
    world: SchedulerWorld, service: ConditionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn that took the answer in does not commit."""
    write = TurnStore.write
    failures = [RuntimeError("the answer is lost")]

    async def refusing(self: TurnStore, tx: Transaction, changes: Sequence[Changes], now: datetime) -> None:
        has_verdict = any(timer.holds for one in changes for timer in one.updates.values())
        if has_verdict and failures:
            raise failures.pop()
        await write(self, tx, changes, now)

    monkeypatch.setattr(TurnStore, "write", refusing)
    timer_id, entry = asking(world, "order-1")
    await world.peer.send(entry)
    world.clock.advance(MINUTE + MOMENT)

    async def is_lost() -> bool:
        return not failures

    await until(is_lost)
    await world.until_held("a")
    world.clock.advance(AGAIN[0] + MOMENT)
    assert [one.timer_id for one in await world.peer.received(1)] == [timer_id.bytes]
    await until_stored(world, timer_id, asks=0)
    await fires_nothing_more(world, "order-1", 1)


async def test_a_timer_that_is_asked_about_holds_up_no_sibling(
    world: SchedulerWorld, service: ConditionService
) -> None:
    """Of the same entity: those with the same due time fire meanwhile, and so does one that is due later."""
    gate = asyncio.Event()
    service.of_entity["order-1"] = waits_for(gate, says(True))
    timer_id, entry = asking(world, "order-1")
    other_id, other = asking(world, "order-2")
    peer = world.peer
    await peer.send(entry, other, peer.timer("order-1", START + MINUTE), peer.timer("order-1", START + MINUTE + SECOND))
    world.clock.advance(MINUTE + MOMENT)
    assert other_id.bytes in {one.timer_id for one in await peer.received(2)}
    world.clock.advance(SECOND)
    await peer.received(3)
    gate.set()
    assert (await peer.received(4))[3].timer_id == timer_id.bytes


async def test_inv4_a_timer_that_is_cancelled_while_it_is_asked_about_does_not_fire(
    world: SchedulerWorld, service: ConditionService
) -> None:
    """The cancel counts it as upcoming; the answer that comes then changes nothing."""
    gate = asyncio.Event()
    service.behaviour = waits_for(gate, says(True))
    timer_id, entry = asking(world, "order-1")
    await world.peer.send(entry)
    world.clock.advance(MINUTE + MOMENT)
    await service.asked(1)
    (result,) = await world.peer.send(world.peer.cancel("order-1"))
    assert (result.changed, result.already_left) == (1, 0)
    gate.set()
    await fires_nothing_more(world, "order-1", 0)
    stored = await until_stored(world, timer_id, state=State.CANCELLED)
    assert stored["note"] == "a test says so"
    world.clock.advance(MINUTE + MOMENT)
    await fires_nothing_more(world, "order-1", 1)
    assert len(service.questions) == 1


async def test_many_are_asked_about_at_once_and_fire_once_each(
    world: SchedulerWorld, service: ConditionService
) -> None:
    """Two hundred, half of them with a yes; more than there are connections."""
    service.of_entity = {f"e{n}": says(False) for n in range(100)}
    timers = [asking(world, f"e{n}") for n in range(200)]
    await world.peer.send(*(entry for _, entry in timers))
    world.clock.advance(MINUTE + MOMENT)
    got = await world.peer.received(100, timeout=30)
    assert sorted(one.timer_id for one in got) == sorted(timer_id.bytes for timer_id, _ in timers[100:])
    for timer_id, _ in timers[:100]:
        await until_stored(world, timer_id, state=State.SKIPPED)
    await fires_nothing_more(world, "e199", 100)
    assert len(service.questions) == 200
