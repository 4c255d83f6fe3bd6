"""The sender's table: frames that have no receipt yet. SQL only; `sender.py` moves them.

Waiting times are the database's clock, never business time: a test clock must not make frames wait for hours.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from psycopg.types.json import Jsonb

from libs.links.frames import OutgoingFrame
from libs.postgres import FEW_ROWS, Transaction, copy_rows

_COLUMNS = ("frame_id", "receiver", "partition", "payload", "headers", "entries", "next_publish_at")
_TYPES = ("uuid", "text", "int4", "bytea", "jsonb", "int4", "timestamptz")

# The subquery is an array, computed once: in a join the planner may run it again and again, each time locking others.
_TAKE_DUE = """
    UPDATE outbox SET
        publishes = publishes + 1,
        next_publish_at = clock_timestamp()
            + least(%(longest)s, %(first)s * power(2, least(publishes, 20))) * (0.75 + random() / 4)
    WHERE frame_id = ANY(ARRAY(
        SELECT frame_id FROM outbox WHERE next_publish_at <= clock_timestamp()
        ORDER BY frame_id LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
    RETURNING frame_id, receiver, partition, payload, headers, entries, publishes"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DueFrame:
    """A frame without a receipt, to be published once more; `publishes` counts the sweeps, from 1."""

    frame: OutgoingFrame
    publishes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What one link has not had confirmed."""

    receiver: str
    frames: int
    oldest_s: float


async def insert_frames(tx: Transaction, frames: Sequence[OutgoingFrame], *, first_sweep: timedelta) -> None:
    """Write frames in the sender's transaction; a sweeper takes over those without a receipt after `first_sweep`."""
    if not frames:
        return
    if len(frames) <= FEW_ROWS:
        # As `copy_rows` does, but with the database's clock in the same statement: this is the case of unary calls.
        values = ", ".join(["(%s, %s, %s, %s, %s, %s, clock_timestamp() + %s)"] * len(frames))
        await tx.raw.execute(
            f"INSERT INTO outbox ({', '.join(_COLUMNS)}) VALUES {values}",  # noqa: S608 - constants of this module.
            [
                value
                for f in frames
                for value in (f.id, f.receiver, f.partition, f.payload, Jsonb(f.headers), f.entries, first_sweep)
            ],
        )
        return
    row = await (await tx.raw.execute("SELECT clock_timestamp() + %s", (first_sweep,))).fetchone()
    assert row is not None
    await copy_rows(
        tx,
        "outbox",
        _COLUMNS,
        ((f.id, f.receiver, f.partition, f.payload, Jsonb(f.headers), f.entries, row[0]) for f in frames),
        types=_TYPES,
    )


async def take_due(tx: Transaction, *, first: timedelta, longest: timedelta, limit: int) -> list[DueFrame]:
    """Frames whose receipt is overdue, oldest first; each waits twice as long for its next sweep."""
    await tx.raw.execute("SET LOCAL synchronous_commit = off")
    cursor = await tx.raw.execute(_TAKE_DUE, {"first": first, "longest": longest, "limit": limit})
    rows = sorted(await cursor.fetchall())
    return [
        DueFrame(
            frame=OutgoingFrame(id=i, receiver=to, partition=part, payload=payload, entries=entries, headers=headers),
            publishes=publishes,
        )
        for i, to, part, payload, headers, entries, publishes in rows
    ]


async def make_all_due(tx: Transaction, receiver: str) -> None:
    """Have everything for `receiver` published again at the next sweep; for when its stream was lost."""
    await tx.raw.execute(
        # In order, as `confirm`, with which it would deadlock otherwise.
        "UPDATE outbox SET next_publish_at = clock_timestamp() WHERE frame_id = ANY(ARRAY("
        "SELECT frame_id FROM outbox WHERE receiver = %s AND next_publish_at > clock_timestamp()"
        " ORDER BY frame_id FOR UPDATE))",
        (receiver,),
    )


async def confirm(tx: Transaction, frame_ids: Sequence[UUID]) -> Counter[str]:
    """Forget frames that have their receipt, and count them by receiver; those already gone are no error."""
    # A lost confirmation costs one more publication, so it need not wait for the disk.
    await tx.raw.execute("SET LOCAL synchronous_commit = off")
    # In order, so that two replicas with the same receipts do not deadlock.
    cursor = await tx.raw.execute(
        "DELETE FROM outbox WHERE frame_id = ANY(ARRAY("
        "SELECT frame_id FROM outbox WHERE frame_id = ANY(%s) ORDER BY frame_id FOR UPDATE)) RETURNING receiver",
        (list(frame_ids),),
    )
    return Counter(row[0] for row in await cursor.fetchall())


async def backlogs(tx: Transaction) -> list[Backlog]:
    """What is unconfirmed now, per receiver, exactly."""
    cursor = await tx.raw.execute(
        "SELECT receiver, count(*), extract(epoch FROM clock_timestamp() - min(created_at))::float8"
        " FROM outbox GROUP BY receiver"
    )
    return [Backlog(receiver=to, frames=frames, oldest_s=age) for to, frames, age in await cursor.fetchall()]
