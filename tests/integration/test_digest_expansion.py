"""Expansion in detail: what is stored, what comes twice at once, windows that change meanwhile, what is scanned."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from datetime import timedelta
from typing import Any, LiteralString, cast

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2

from libs.ids import id_time, new_id
from libs.links.receiver import IncomingFrame
from libs.postgres import FEW_ROWS, Transaction
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type, a daily cadence and a subscriber who has it."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        await rig.put_daily()
        await rig.put_subscriber("ann")
        await rig.subscribe("ann", "daily")
        yield rig


async def rows(rig: Rig, statement: LiteralString, *values: object) -> list[tuple[Any, ...]]:
    """What a query returns."""
    async with rig.db.read() as tx:
        return await (await tx.raw.execute(statement, values)).fetchall()


async def until_blocked(rig: Rig, doing: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
    """Start something that has to wait for a lock of ours, and return when it does."""
    task = asyncio.create_task(doing)
    async with asyncio.timeout(10):
        while not await rows(rig, "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
            assert not task.done(), "it did not wait"
            await asyncio.sleep(0.01)  # Postgres tells nobody that somebody waits.
    return task


def trying(rig: Rig) -> list[link_pb2.Entry]:
    """Notifications with everything that Postgres's formats could trip over."""
    texts = ["plain", "", 'quo"te, {brace} \\ and NULL', "Zürich ✈ 東京", "null"]
    return [
        rig.notification(
            *(["ann", text, "ann"] if number % 2 else []),
            topics=[text, "t"] if number % 3 else [],
            entity=text,
            payload={"text": text},
            at=START - timedelta(days=11_000, microseconds=number),
            expires=START + timedelta(days=1, microseconds=number) if number % 2 else None,
            timer_id=new_id().bytes if number % 3 else b"",
            timeline=text,
        )
        for number, text in enumerate(texts)
    ]


async def test_what_is_sent_alone_has_the_same_window_when_postgres_has_forgotten_it(rig: Rig) -> None:
    """As after a restore: its Message-ID follows from the window, so a mailbox can tell that it has it already."""
    await rig.subscribe("ann", "immediate")
    entry = rig.notification("ann", at=START)
    other = rig.notification("ann", at=START)
    await rig.apply(entry, other)
    windows = await rows(rig, "SELECT notification_id, window_id FROM item ORDER BY 1")
    assert len({window_id for _, window_id in windows}) == 2
    assert {window_id.version for _, window_id in windows} == {7}
    assert {id_time(window_id) for _, window_id in windows} == {START}
    async with rig.db.transaction() as tx:
        await tx.raw.execute("DELETE FROM notification")
        await tx.raw.execute("DELETE FROM item")
        await tx.raw.execute("DELETE FROM digest_window")
    await rig.apply(other, entry)
    assert await rows(rig, "SELECT notification_id, window_id FROM item ORDER BY 1") == windows


async def test_notifications_are_stored_as_they_came_however_many_come_at_once(rig: Rig) -> None:
    """Few are inserted and many copied, in a form of our own making: no difference in any column."""
    entries = trying(rig)
    assert len(entries) <= FEW_ROWS < 2 * len(entries)
    again = []
    for entry in entries:
        other = link_pb2.Entry()
        other.CopyFrom(entry)
        other.notification.id = new_id().bytes
        again += [entry, other]
    await rig.apply(*(one for one in again[1::2]))
    few = await rows(rig, "SELECT * FROM notification ORDER BY id")
    async with rig.db.transaction() as tx:
        await tx.raw.execute("DELETE FROM notification")
        await tx.raw.execute("DELETE FROM item")
    await rig.apply(*again)
    stored = {row[1]: row[2:] for row in await rows(rig, "SELECT * FROM notification")}
    assert len(stored) == 2 * len(entries)
    for before in few:
        assert stored[before[1]] == before[2:]
    (first,) = await rows(rig, "SELECT subscribers, topics, occurred_at FROM notification WHERE id = %s", few[1][1])
    assert first == (["ann", "", "ann"], ["", "t"], START - timedelta(days=11_000, microseconds=1))


async def test_of_many_those_that_came_before_are_left_out(rig: Rig) -> None:
    """The primary key finds them while they are copied; the others are stored all the same."""
    known = [rig.notification("ann", entity=f"{number}") for number in range(3)]
    await rig.apply(*known)
    await rig.apply(*known, *(rig.notification("ann") for _ in range(20)), known[0])
    assert len(await rig.items()) == 23
    assert await rows(rig, "SELECT count(*) FROM notification") == [(23,)]


async def test_the_same_notification_in_two_transactions_at_once_is_one(rig: Rig) -> None:
    """Whoever comes second waits for the first one's commit, and has nothing to do then; it does not fail."""
    entry, others = rig.notification("ann"), [rig.notification("ann") for _ in range(10)]
    async with rig.db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO notification SELECT %s, %s, 'flight.delayed', '', '', '{}', '{}', '{}', now(), NULL, NULL,"
            " NULL, '', '', 0, now(), 2, 0",
            (rig.tenant, new_id_of(entry)),
        )
        task = await until_blocked(rig, rig.apply(entry, *others))
    await task
    assert len(await rig.items()) == 10


def new_id_of(entry: link_pb2.Entry) -> str:
    """A notification's id, as Postgres reads it."""
    return entry.notification.id.hex()


async def test_one_choice_of_a_leading_cadence_by_two_ways_is_one_item(rig: Rig) -> None:
    """By two topics, of which one leaves the style to the cadence and the other says the same: told once."""
    await rig.put_rolling(duration=timedelta(hours=1), is_leading=True)
    await rig.subscribe("ann", "rolling", topic="UA")
    await rig.subscribe("ann", "rolling", topic="EWR", style=pb.STYLE_SUMMARY)
    await rig.apply(rig.notification(topics=["UA", "EWR"]))
    assert len(await rig.items()) == 1


async def change_window(tx: Transaction, assignment: LiteralString) -> None:
    """Change the open window, as whoever closes or moves one does."""
    await tx.raw.execute("UPDATE digest_window SET " + assignment + " WHERE state = 1")


@pytest.mark.parametrize(
    ("assignment", "windows"),
    [("state = 2", [1, 1]), ("priority = priority", [2])],
    ids=["it closes", "it stays open"],
)
async def test_an_item_waits_for_whoever_changes_its_window_and_lands_where_it_belongs(
    rig: Rig, assignment: LiteralString, windows: Sequence[int]
) -> None:
    """INV-7: in the next window if this one has begun to close meanwhile; in the same one if its row is another now."""
    await rig.apply(rig.notification("ann"))
    async with rig.db.transaction() as tx:
        await change_window(tx, assignment)
        task = await until_blocked(rig, rig.apply(rig.notification("ann")))
    await task
    found = await rows(rig, "SELECT count(*) FROM item GROUP BY window_id ORDER BY min(changed_at), window_id")
    assert [count for (count,) in found] == windows


async def test_a_window_that_closed_after_it_was_found_takes_nothing_in(rig: Rig) -> None:
    """INV-7: also where its row's place has gone to another window before it could be locked."""
    await rig.put_subscriber("bob")
    await rig.subscribe("bob", "daily")
    await rig.apply(rig.notification("ann"), rig.notification("bob"))
    ann, bob = [row[0] for row in await rows(rig, "SELECT id FROM digest_window ORDER BY subscriber")]
    async with rig.db.transaction() as tx:
        await tx.raw.execute("UPDATE digest_window SET state = 2 WHERE id = %s", (ann,))
        task = await until_blocked(rig, rig.apply(rig.notification("ann"), rig.notification("bob")))
    await task
    assert await rows(rig, "SELECT count(*) FROM item WHERE window_id = %s", ann) == [(1,)]
    assert await rows(rig, "SELECT count(*) FROM item WHERE window_id = %s", bob) == [(2,)]


async def test_several_items_of_one_frame_open_one_window(rig: Rig) -> None:
    """Whatever else it opens, each subscriber's items are together, and each window asks for one timer."""
    await rig.put_external("batch", "batch")
    for name in ("bob", "eve"):
        await rig.put_subscriber(name)
        await rig.subscribe(name, "daily", "batch")
    await rig.apply(*(rig.notification("ann", "bob", "eve") for _ in range(15)))
    found = await rows(
        rig,
        "SELECT w.subscriber, w.cadence, count(*) FROM item JOIN digest_window w ON w.id = window_id"
        " GROUP BY w.id, 1, 2 ORDER BY 1, 2",
    )
    expected = [("ann", "daily"), ("bob", "batch"), ("bob", "daily"), ("eve", "batch"), ("eve", "daily")]
    assert found == [(*one, 15) for one in expected]
    assert len(await rig.outgoing("scheduler")) == 5


async def test_an_item_joins_the_window_that_somebody_else_was_opening(rig: Rig) -> None:
    """Both find none; the second one waits for the first one's commit and puts its items there, opening the rest."""
    await rig.put_subscriber("bob")
    await rig.subscribe("bob", "daily")
    async with rig.db.transaction() as tx:
        frame = link_pb2.Frame(id=new_id().bytes, entries=[rig.notification("ann")])
        await rig.inlet.apply(tx, [IncomingFrame(id=new_id(), frame=frame, message=cast(Any, None))])
        task = await until_blocked(rig, rig.apply(rig.notification("ann"), rig.notification("bob")))
    await task
    found = await rows(rig, "SELECT subscriber, count(*) FROM item GROUP BY window_id, 1 ORDER BY 1")
    assert found == [("ann", 2), ("bob", 1)]
    assert len(await rows(rig, "SELECT FROM digest_window")) == 2


@pytest.mark.parametrize("entries", [1, 40])
async def test_no_table_that_grows_is_read_from_end_to_end(rig: Rig, entries: int) -> None:
    """Even where they are small, so that Postgres would like to, and the statistics say so. Types are few."""
    await rig.subscribe("ann", "daily", topic="UA")
    await rig.apply(*(rig.notification("ann", topics=["UA"]) for _ in range(30)))
    async with rig.db.transaction() as tx:
        await tx.raw.execute("ANALYZE")
    entry = [rig.notification("ann", topics=["UA", f"t{number}"]) for number in range(entries)]
    frame = link_pb2.Frame(id=new_id().bytes, sender="intake", receiver="digest", entries=entry)
    async with rig.db.transaction() as tx:
        await rig.inlet.apply(tx, [IncomingFrame(id=new_id(), frame=frame, message=cast(Any, None))])
        cursor = await tx.raw.execute(
            "SELECT relname FROM pg_stat_xact_user_tables WHERE schemaname = 'digest' AND seq_scan > 0"
        )
        assert {row[0] for row in await cursor.fetchall()} <= {"notification_type"}
