"""Facts stay as long as there are any; what has been emptied is forgotten in the end (INV-9)."""

from datetime import UTC, datetime, timedelta

import pytest

from libs.postgres import Database
from services.scheduler.commands import Changes, Entity
from services.scheduler.facts import NOTHING_KNOWN, Facts
from services.scheduler.loops_history import History
from services.scheduler.store import TurnStore
from services.scheduler.store_history import HistoryStore
from tests.support.clock import ManualClock
from tests.support.fixtures import OpenDatabase
from tests.support.schemas import create_tables

NOON = datetime(2013, 7, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
ANY = NOTHING_KNOWN.patched(1, {"plan": "pro"})
EMPTIED = ANY.patched(2, {"plan": None})


class Nobody:
    """Holds no shard."""

    def __init__(self) -> None:
        self.epochs: dict[int, int] = {}


@pytest.fixture
async def db(postgres_url: str, open_database: OpenDatabase) -> Database:
    """The scheduler's tables."""
    create_tables(postgres_url, "scheduler")
    return await open_database("scheduler", postgres_url)


async def put(db: Database, facts: dict[Entity, Facts], at: datetime) -> None:
    """What a turn decided."""
    async with db.transaction() as tx:
        await TurnStore(replica="a").write(tx, [Changes(shard=0, facts=facts)], at)


async def entities(db: Database) -> list[str]:
    """Whose facts are stored."""
    async with db.transaction() as tx:
        cursor = await tx.raw.execute("SELECT entity FROM facts ORDER BY entity")
        return [row[0] for row in await cursor.fetchall()]


async def test_inv9_facts_that_were_emptied_are_forgotten_after_the_retention(db: Database) -> None:
    """Not before: a patch that comes late must find its place. Facts that say something stay, however old they are."""
    await put(db, {("acme", "gone"): EMPTIED, ("acme", "kept"): ANY}, NOON)
    await put(db, {("acme", "lately"): EMPTIED}, NOON + 2 * DAY)
    clock = ManualClock(NOON + 90 * DAY)
    history = History(store=HistoryStore(db), holder=Nobody(), clock=clock, retention=90 * DAY)
    await history.forget_facts_once()
    assert await entities(db) == ["gone", "kept", "lately"]
    clock.advance(DAY)
    await history.forget_facts_once()
    assert await entities(db) == ["kept", "lately"]


async def test_inv9_the_facts_are_looked_through_part_by_part(db: Database) -> None:
    """Each part goes on where the last one ended, whatever was deleted, and the last one says so."""
    await put(db, {(tenant, entity): EMPTIED for tenant in ("a", "b") for entity in ("x", "y", "z")}, NOON)
    store = HistoryStore(db)
    places = [place := await store.forget_facts(("", ""), before=NOON + DAY, limit=4)]
    assert len(await entities(db)) == 2
    assert place is not None
    places.append(await store.forget_facts(place, before=NOON + DAY, limit=4))
    assert places == [("b", "x"), None]
    assert await entities(db) == []
