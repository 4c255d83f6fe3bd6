"""Requests that are over: forgotten when they are old enough, and not read when somebody asks for those that wait."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import grpc
import pytest
from carillon.intake.v1 import intake_pb2

from libs.history import History
from libs.ids import new_id
from libs.wire import to_duration
from services.intake import metrics
from services.intake.requests import State
from services.intake.store_requests import RequestStore
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.intake_world import NOW, TENANT, IntakeWorld, intake_world, request

DAY = timedelta(days=1)

_FILL = """
    INSERT INTO request (tenant, id, batch, customer, item, providers, payload, submitted_at, answer_by, state,
        responses, closed_at)
    SELECT %s, uuidv7(), 'deals', 'carl', 'lamp', '{paul}', '{}', now(), now(), %s, 0, now()
    FROM generate_series(1, %s)"""

_READ = """
    SELECT pg_stat_get_xact_tuples_returned(oid) + pg_stat_get_xact_tuples_fetched(oid)
    FROM pg_class WHERE oid = 'request'::regclass"""


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, open_bus: OpenBus) -> AsyncIterator[IntakeWorld]:
    """Intake and its peers."""
    async with intake_world(postgres_url, open_database, open_bus) as it:
        yield it


@pytest.fixture
def history(world: IntakeWorld) -> History:
    """What the process keeps, for 90 days; ten are deleted at once."""
    return History(
        db=world.db,
        forget=RequestStore().forget,
        at_once=10,
        clock=world.clock,
        retention=90 * DAY,
        forgotten=metrics.FORGOTTEN_REQUESTS,
    )


async def submit(world: IntakeWorld, *items: str) -> dict[str, str]:
    """Requests that are answered within a day; their ids by item."""
    requests = [request(item=item, answer_within=to_duration(DAY)) for item in items]
    answer = await world.stub.SubmitRequest(intake_pb2.SubmitRequestRequest(requests=requests))
    return {item: result.id for item, result in zip(items, answer.results, strict=True)}


async def respond(world: IntakeWorld, *ids: str) -> None:
    """One answer to each."""
    responses = [intake_pb2.Response(request_id=one, provider="paul") for one in ids]
    await world.stub.RecordResponse(intake_pb2.RecordResponseRequest(responses=responses))


async def end(world: IntakeWorld, request_id: str, at: datetime) -> None:
    """It ended then, as the log has it."""
    statement = "UPDATE request SET state = %s, closed_at = %s WHERE id = %s"
    await world.execute(statement, State.CLOSED.value, at, request_id)


async def test_inv9_a_request_is_forgotten_with_its_answers_when_it_was_over_for_its_retention(
    world: IntakeWorld, history: History
) -> None:
    """Not before, and not while it waits or because it was withdrawn early: what counts is the answer-by date too."""
    ids = await submit(world, "over", "late", "waiting")
    await respond(world, *ids.values())
    await end(world, ids["over"], NOW + DAY / 2)
    await end(world, ids["late"], NOW + 2 * DAY)
    world.clock.set(NOW + 91 * DAY - timedelta(seconds=1))
    assert await history.forget_once() == 0
    world.clock.set(NOW + 91 * DAY)
    assert await history.forget_once() == 1
    assert await world.rows("SELECT item FROM request ORDER BY item") == [("late",), ("waiting",)]
    assert await world.count("response") == 2
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.stub.GetRequest(intake_pb2.GetRequestRequest(id=ids["over"]))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    world.clock.set(NOW + 1_000 * DAY)
    assert await history.forget_once() == 1
    assert await world.rows("SELECT item FROM request") == [("waiting",)]


async def test_inv9_forgetting_goes_on_in_small_transactions_until_nothing_is_left(
    world: IntakeWorld, history: History
) -> None:
    """Of all tenants; what another replica has in hand is left to it."""
    for tenant in ("a", "b"):
        await world.execute(_FILL, tenant, State.EXPIRED.value, 25)
    world.clock.set(datetime.now(NOW.tzinfo) + 1_000 * DAY)
    async with world.db.transaction() as tx:
        await tx.raw.execute("SELECT FROM request WHERE tenant = 'a' ORDER BY id LIMIT 1 FOR UPDATE")
        assert await history.forget_once() == 49
    assert await history.forget_once() == 1


@pytest.mark.parametrize("states", [(State.OPEN,), (State.OPEN, State.ANSWERED)])
async def test_listing_what_waits_does_not_read_what_is_over(world: IntakeWorld, states: tuple[State, ...]) -> None:
    """However long the history is: two wait, and two are read, each for its size and for itself."""
    await submit(world, "lamp", "chair")
    await world.execute(_FILL, TENANT, State.CLOSED.value, 3_000)
    await world.execute("ANALYZE request")
    async with world.db.read() as tx:
        found, has_more = await RequestStore().page(
            tx, TENANT, batch="", customer="", item="", states=states, before=new_id(), limit=100
        )
        row = await (await tx.raw.execute(_READ)).fetchone()
    assert {one.item for one in found} == {"lamp", "chair"}
    assert not has_more
    assert row is not None
    assert row[0] <= 10
