"""Frames that can never be applied as they are: kept whole, with the reason, until somebody redrives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from libs.ids import id_beside, id_floor
from libs.links.frames import OutgoingFrame, decoded
from libs.links.outbox import insert_frames
from libs.postgres import Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFrame:
    """A frame put aside; `reason` is at most 2,048 characters, `sender` empty when it was no frame."""

    frame_id: UUID
    sender: str
    partition: int
    entries: int
    reason: str
    buried_at: datetime
    size_bytes: int


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


async def dead_frames(
    tx: Transaction, *, limit: int, sender: str = "", after: tuple[datetime, UUID] | None = None
) -> list[DeadFrame]:
    """Newest first; of one sender, where it is given; those after a `buried_at` and an id, where these are given."""
    cursor = await tx.raw.execute(
        "SELECT frame_id, sender, partition, entries, reason, buried_at, octet_length(payload) FROM dead_frame"
        " WHERE (%(sender)s = '' OR sender = %(sender)s)"
        " AND (%(at)s::timestamptz IS NULL OR (buried_at, frame_id) < (%(at)s::timestamptz, %(id)s::uuid))"
        " ORDER BY buried_at DESC, frame_id DESC LIMIT %(limit)s",
        {"sender": sender, "at": after and after[0], "id": after and after[1], "limit": limit},
    )
    return [_dead_frame(row) for row in await cursor.fetchall()]


async def dead_frame(tx: Transaction, frame_id: UUID) -> tuple[DeadFrame, bytes] | None:
    """One of them, with what was received."""
    cursor = await tx.raw.execute(
        "SELECT frame_id, sender, partition, entries, reason, buried_at, octet_length(payload), payload"
        " FROM dead_frame WHERE frame_id = %s",
        (frame_id,),
    )
    row = await cursor.fetchone()
    return None if row is None else (_dead_frame(row[:-1]), bytes(row[-1]))


def _dead_frame(row: tuple[Any, ...]) -> DeadFrame:
    frame_id, sender, partition, entries, reason, buried_at, size_bytes = row
    return DeadFrame(
        frame_id=frame_id,
        sender=sender,
        partition=partition,
        entries=entries,
        reason=reason,
        buried_at=buried_at,
        size_bytes=size_bytes,
    )


async def count_dead(tx: Transaction) -> int:
    """How many frames are put aside."""
    row = await (await tx.raw.execute("SELECT count(*) FROM dead_frame")).fetchone()
    assert row is not None
    return int(row[0])


async def redrive(
    tx: Transaction, frame_ids: Sequence[UUID], *, receiver: str, first_sweep: timedelta, retention: timedelta
) -> tuple[list[UUID], list[OutgoingFrame]]:
    """Send dead frames anew to `receiver`, which is the caller itself.

    Returns the old ids of those that are sent, and the frames; publish these after the commit, or leave it to the
    sweeper.

    In one transaction a frame leaves `dead_frame` and enters our own outbox, under a new id: from there on it is a
    frame like any other, unconfirmed until it is applied. Under its old id it stays dead, so that copies still under
    way have no effects. The new id is of the old one's time, because what is in the frame is no younger than before.
    Not redriven: what is no frame, and what is older than the inbox's `retention`. It may have been applied before,
    and a cancel accepted after it may have been forgotten (INV-4).
    """
    cursor = await tx.raw.execute(
        "SELECT frame_id, partition, payload, entries, clock_timestamp() FROM dead_frame"
        " WHERE frame_id = ANY(%s) AND sender <> '' ORDER BY frame_id FOR UPDATE",
        (list(frame_ids),),
    )
    rows = [row for row in await cursor.fetchall() if row[0] >= id_floor(row[4] - retention)]
    frames = []
    for old_id, partition, payload, entries, _ in rows:
        frame_id = id_beside(old_id)
        frame = decoded(payload)
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
    return [row[0] for row in rows], frames
