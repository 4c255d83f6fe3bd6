"""Frames that can never be applied as they are: kept whole, with the reason, until somebody redrives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from libs.postgres import Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFrame:
    """A frame put aside; `reason` is at most 2,048 characters."""

    frame_id: UUID
    sender: str
    partition: int
    entries: int
    reason: str
    buried_at: datetime


async def bury(
    tx: Transaction,
    frame_id: UUID,
    *,
    sender: str,
    partition: int,
    payload: bytes,
    entries: int,
    reason: str,
    deliveries: int,
) -> None:
    """Put a frame aside; a second time changes nothing."""
    await tx.raw.execute(
        "INSERT INTO dead_frame (frame_id, sender, partition, payload, entries, reason, deliveries)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (frame_id, sender, partition, payload, entries, reason, deliveries),
    )


async def dead_frames(tx: Transaction, *, limit: int) -> list[DeadFrame]:
    """Newest first."""
    cursor = await tx.raw.execute(
        "SELECT frame_id, sender, partition, entries, reason, buried_at FROM dead_frame"
        " ORDER BY buried_at DESC, frame_id LIMIT %s",
        (limit,),
    )
    return [
        DeadFrame(frame_id=i, sender=sender, partition=part, entries=entries, reason=reason, buried_at=at)
        for i, sender, part, entries, reason, at in await cursor.fetchall()
    ]


async def count_dead(tx: Transaction) -> int:
    """How many frames are put aside."""
    row = await (await tx.raw.execute("SELECT count(*) FROM dead_frame")).fetchone()
    assert row is not None
    return int(row[0])


async def redrive(tx: Transaction, frame_ids: Sequence[UUID], *, receiver: str, first_sweep: timedelta) -> int:
    """Put dead frames back on their way to `receiver`, which is the caller itself; returns how many there were.

    A frame moves to our own outbox and out of our inbox, in one transaction: from there on it is a frame like any other,
    unconfirmed until it is applied. What is dead because of its age stays dead: its id does not get younger.
    """
    cursor = await tx.raw.execute(
        "WITH risen AS (DELETE FROM dead_frame WHERE frame_id = ANY(%(ids)s) RETURNING *),"
        " forgotten AS (DELETE FROM inbox WHERE frame_id IN (SELECT frame_id FROM risen))"
        " INSERT INTO outbox (frame_id, receiver, partition, payload, headers, entries, next_publish_at)"
        " SELECT frame_id, %(receiver)s, partition, payload, '{}', entries, clock_timestamp() + %(first)s FROM risen",
        {"ids": list(frame_ids), "receiver": receiver, "first": first_sweep},
    )
    return cursor.rowcount
