"""The receiver's table: which frames have been applied (INV-1, INV-2). SQL only.

A frame's row is written first in the transaction that applies it. A second transaction with the same frame waits at the
primary key until the first has ended, and then finds the row: effects happen once, however often the frame comes.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from carillon.link.v1 import link_pb2

from libs.errors import Unavailable
from libs.ids import id_floor
from libs.postgres import Transaction

APPLIED = link_pb2.FRAME_VERDICT_APPLIED
DEAD = link_pb2.FRAME_VERDICT_DEAD


async def admit(tx: Transaction, frame_ids: Sequence[UUID]) -> dict[UUID, datetime]:
    """Claim frames for this transaction and return those never seen before, with the database's time.

    The others must have no effects.
    """
    cursor = await tx.raw.execute(
        # In order, so that two replicas with the same frames do not deadlock.
        "INSERT INTO inbox (frame_id, verdict) SELECT id, %s FROM unnest(%s::uuid[]) AS id ORDER BY id"
        " ON CONFLICT DO NOTHING RETURNING frame_id, received_at",
        (APPLIED, list(frame_ids)),
    )
    return dict(await cursor.fetchall())


async def keep_results(tx: Transaction, receipts: Mapping[UUID, link_pb2.Receipt]) -> None:
    """Keep what applying gave, so that a frame that comes again is answered as the first time."""
    if receipts:
        await tx.raw.execute(
            "UPDATE inbox SET verdict = new.verdict, results = new.results"
            " FROM unnest(%s::uuid[], %s::smallint[], %s::bytea[]) AS new (frame_id, verdict, results)"
            " WHERE inbox.frame_id = new.frame_id",
            (
                list(receipts),
                [receipt.verdict for receipt in receipts.values()],
                [receipt.SerializeToString() for receipt in receipts.values()],
            ),
        )


async def kept_receipts(tx: Transaction, frame_ids: Sequence[UUID]) -> dict[UUID, link_pb2.Receipt]:
    """The receipts of frames seen before. Raises Unavailable when one was forgotten this very moment."""
    if not frame_ids:
        return {}
    cursor = await tx.raw.execute(
        "SELECT frame_id, verdict, results FROM inbox WHERE frame_id = ANY(%s)", (list(frame_ids),)
    )
    kept = {
        frame_id: link_pb2.Receipt.FromString(results)
        if results
        else link_pb2.Receipt(frame_id=frame_id.bytes, verdict=verdict)
        for frame_id, verdict, results in await cursor.fetchall()
    }
    if len(kept) < len(set(frame_ids)):
        raise Unavailable("A frame was forgotten while its copy was looked at.", reason="FRAME_FORGOTTEN")
    return kept


async def forget_old(tx: Transaction, retention: timedelta, *, slack: timedelta, limit: int) -> int:
    """Delete at most `limit` rows older than `retention + slack`; returns how many.

    The slack keeps a frame that was judged young enough from being forgotten while its transaction runs.
    """
    row = await (await tx.raw.execute("SELECT clock_timestamp() - %s", (retention + slack,))).fetchone()
    assert row is not None
    cursor = await tx.raw.execute(
        "DELETE FROM inbox WHERE frame_id = ANY(ARRAY("
        "SELECT frame_id FROM inbox WHERE frame_id < %s ORDER BY frame_id LIMIT %s FOR UPDATE SKIP LOCKED))",
        (id_floor(row[0]), limit),
    )
    return cursor.rowcount
