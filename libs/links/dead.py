"""Frames that can never be applied as they are: kept whole, with the reason, until somebody redrives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from carillon.link.v1 import link_pb2

from libs.ids import id_floor, new_id
from libs.links.frames import OutgoingFrame
from libs.links.outbox import insert_frames
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


async def redrive(
    tx: Transaction, frame_ids: Sequence[UUID], *, receiver: str, first_sweep: timedelta, retention: timedelta
) -> int:
    """Send dead frames anew to `receiver`, which is the caller itself; returns how many there were.

    In one transaction a frame leaves `dead_frame` and enters our own outbox, under a new id: from there on it is a
    frame like any other, unconfirmed until it is applied. Under its old id it stays dead, so that copies still under
    way have no effects. Not redriven: what is no frame, and what was older than the inbox's `retention` when it was
    buried, because it may have been applied before.
    """
    cursor = await tx.raw.execute(
        "SELECT frame_id, partition, payload, entries, buried_at FROM dead_frame"
        " WHERE frame_id = ANY(%s) AND sender <> '' ORDER BY frame_id FOR UPDATE",
        (list(frame_ids),),
    )
    rows = [row for row in await cursor.fetchall() if row[0] >= id_floor(row[4] - retention)]
    frames = []
    for _, partition, payload, entries, _ in rows:
        frame_id = new_id()
        frame = link_pb2.Frame.FromString(payload)
        frame.id = frame_id.bytes
        frames.append(
            OutgoingFrame(
                id=frame_id,
                receiver=receiver,
                partition=partition,
                payload=frame.SerializeToString(),
                entries=entries,
                headers={},
            )
        )
    await insert_frames(tx, frames, first_sweep=first_sweep)
    await tx.raw.execute("DELETE FROM dead_frame WHERE frame_id = ANY(%s)", ([row[0] for row in rows],))
    return len(rows)
