"""The link tables in the fake Postgres: what libs.links.{inbox,outbox,dead} do in SQL.

`installed()` puts these functions in the place of theirs, so that the real Sender, Settlement and Receiver run on them.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID

from carillon.link.v1 import link_pb2

from libs.links import dead, inbox, outbox
from libs.links.frames import OutgoingFrame
from libs.links.outbox import Backlog, DueFrame
from tests.simulation.postgres import Key, Session, Tx


@dataclass(frozen=True, slots=True)
class InboxRow:
    """A frame that was admitted."""

    verdict: int
    received_at: datetime
    receipt: link_pb2.Receipt | None = None


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A frame without a receipt."""

    frame: OutgoingFrame
    next_publish_at: datetime
    publishes: int = 0


async def admit(tx: Tx, frame_ids: Sequence[UUID]) -> dict[UUID, datetime]:
    """inbox.admit"""

    def statement(session: Session) -> Generator[Key, None, dict[UUID, datetime]]:
        fresh = {}
        for frame_id in sorted(frame_ids):
            row = InboxRow(inbox.APPLIED, session.now)
            if (yield from session.insert(f"{tx.schema}.inbox", frame_id, row)):
                fresh[frame_id] = row.received_at
        return fresh

    found: dict[UUID, datetime] = await tx.run(statement)
    return found


async def keep_results(tx: Tx, receipts: Mapping[UUID, link_pb2.Receipt]) -> None:
    """inbox.keep_results"""

    def statement(session: Session) -> Generator[Key, None, None]:
        for frame_id, receipt in sorted(receipts.items()):
            if (row := session.get(f"{tx.schema}.inbox", frame_id)) is not None:
                kept = replace(row, verdict=receipt.verdict, receipt=receipt)
                yield from session.put(f"{tx.schema}.inbox", frame_id, kept)

    if receipts:
        await tx.run(statement)


async def kept_receipts(tx: Tx, frame_ids: Sequence[UUID]) -> dict[UUID, link_pb2.Receipt]:
    """inbox.kept_receipts"""

    def statement(session: Session) -> Generator[Key, None, dict[UUID, link_pb2.Receipt]]:
        yield from ()
        rows = {frame_id: session.get(f"{tx.schema}.inbox", frame_id) for frame_id in frame_ids}
        return {
            frame_id: row.receipt or link_pb2.Receipt(frame_id=frame_id.bytes, verdict=row.verdict)
            for frame_id, row in rows.items()
        }

    found: dict[UUID, link_pb2.Receipt] = await tx.run(statement) if frame_ids else {}
    return found


async def insert_frames(tx: Tx, frames: Sequence[OutgoingFrame], *, first_sweep: timedelta) -> None:
    """outbox.insert_frames"""

    def statement(session: Session) -> Generator[Key, None, None]:
        for frame in frames:
            yield from session.put(f"{tx.schema}.outbox", frame.id, OutboxRow(frame, session.now + first_sweep))

    if frames:
        await tx.run(statement)


async def take_due(tx: Tx, *, first: timedelta, longest: timedelta, limit: int) -> list[DueFrame]:
    """outbox.take_due"""
    table = f"{tx.schema}.outbox"

    def statement(session: Session) -> Generator[Key, None, list[DueFrame]]:
        due: list[DueFrame] = []
        for frame_id, row in sorted(session.scan(table)):
            if row.next_publish_at <= session.now and len(due) < limit and session.try_lock(table, frame_id):
                wait = min(longest, first * 2**row.publishes)
                taken = replace(row, publishes=row.publishes + 1, next_publish_at=session.now + wait)
                yield from session.put(table, frame_id, taken)
                due.append(DueFrame(frame=taken.frame, publishes=taken.publishes))
        return due

    found: list[DueFrame] = await tx.run(statement)
    return found


async def make_all_due(tx: Tx, receiver: str) -> None:
    """outbox.make_all_due"""
    table = f"{tx.schema}.outbox"

    def statement(session: Session) -> Generator[Key, None, None]:
        for frame_id, row in sorted(session.scan(table)):
            if row.frame.receiver == receiver and row.next_publish_at > session.now:
                yield table, frame_id
                if (now_there := session.get(table, frame_id)) is not None:
                    yield from session.put(table, frame_id, replace(now_there, next_publish_at=session.now))

    await tx.run(statement)


async def confirm(tx: Tx, frame_ids: Sequence[UUID]) -> Counter[str]:
    """outbox.confirm"""
    table = f"{tx.schema}.outbox"

    def statement(session: Session) -> Generator[Key, None, Counter[str]]:
        receivers: Counter[str] = Counter()
        for frame_id in sorted(frame_ids):
            yield table, frame_id
            if (row := session.get(table, frame_id)) is not None:
                yield from session.put(table, frame_id, None)
                receivers[row.frame.receiver] += 1
        return receivers

    found: Counter[str] = await tx.run(statement)
    return found


async def backlogs(tx: Tx) -> list[Backlog]:
    """outbox.backlogs"""

    def statement(session: Session) -> Generator[Key, None, list[Backlog]]:
        yield from ()
        frames = Counter(row.frame.receiver for _, row in session.scan(f"{tx.schema}.outbox"))
        return [Backlog(receiver=receiver, frames=count, oldest_s=0.0) for receiver, count in frames.items()]

    found: list[Backlog] = await tx.run(statement)
    return found


async def bury(tx: Tx, frame_id: UUID, *, reason: str, **_: Any) -> None:
    """dead.bury"""

    def statement(session: Session) -> Generator[Key, None, None]:
        yield from session.insert(f"{tx.schema}.dead_frame", frame_id, reason)

    await tx.run(statement)


@contextmanager
def installed() -> Iterator[None]:
    """Have the real link code use these functions."""
    with ExitStack() as stack:
        for module, functions in (
            (inbox, (admit, keep_results, kept_receipts)),
            (outbox, (insert_frames, take_due, make_all_due, confirm, backlogs)),
            (dead, (bury,)),
        ):
            for function in functions:
                stack.enter_context(patch.object(module, function.__name__, function))
        yield
