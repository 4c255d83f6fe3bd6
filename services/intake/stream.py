"""Intake's end of the links: commands go out in the transaction that accepts them, requests come back when due.

    Acceptance.accept: claim key → prepare → sequence → pack → outbox → keep the answer → COMMIT → publish → wait
    Acceptance.accept_ready: the same, with nothing to prepare, in one transaction with other calls (stream_groups)

The sequence is taken after `prepare` has its locks, so that of two commands on one request the later has the higher
one: a withdrawal must cancel what the response just before it has sent.

What a repeated call gets (same idempotency key, same content): the answer of the first call as far as it is known, at
once. It waits for the first call's commit, but never for receipts: `is_applied` and the counts are those the first call
was answered with, and stay false and 0 where it had not waited, or ended before they were known.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol, TypeVar
from uuid import UUID

from carillon.link.v1 import link_pb2
from msgspec.structs import replace

from libs.clock import Clock
from libs.errors import Unavailable
from libs.links.frames import Outgoing, OutgoingFrame, Position, number
from libs.links.receiver import Applied, IncomingFrame, PoisonFrame
from libs.postgres import Database, Transaction
from libs.telemetry.logs import get_logger
from libs.trace_points import NOWHERE, Point
from services.intake import metrics
from services.intake.commands import NOTHING, Command, EntryOutcome
from services.intake.payloads import MAX_ANSWERS_BYTES
from services.intake.requests import Closing, State
from services.intake.stream_backlog import Backlogs, carrier_of
from services.intake.stream_entries import Entries
from services.intake.stream_groups import Expected, Groups

log = get_logger(__name__)

REPEATS_AT_ONCE = 4
"""Transactions at once of calls that had come ready, and whose key was taken. One that waits for a process that stands
still has a connection for as long; they must not have them all."""

CLOSED_AT_ONCE = 500
"""Requests closed by one round of statements: bounds what is in memory at 500 × 384 KiB; normally it is under 1 MiB."""

MAX_OUTGOING_BYTES = 64 << 20
"""Frames that one fetch publishes by itself; the sweeper publishes what is beyond."""


class Sender(Protocol):
    """What is needed of libs.links.sender."""

    def check_room(self, receivers: Sequence[str]) -> None: ...
    def pack(
        self, addressed: Sequence[Outgoing], carrier: Mapping[str, str] | None = None
    ) -> tuple[list[OutgoingFrame], list[Position]]: ...
    async def insert(self, tx: Transaction, frames: Sequence[OutgoingFrame]) -> None: ...
    def expect(self, frames: Sequence[OutgoingFrame]) -> Expected: ...
    def publish(self, frames: Sequence[OutgoingFrame]) -> None: ...
    async def collect(self, expected: Expected, timeout: timedelta) -> Mapping[UUID, link_pb2.Receipt]: ...


class Commands(Protocol):
    """What accepting needs of the store."""

    async def claim(self, tx: Transaction, command: Command) -> bytes | None: ...
    async def next_sequence(self, tx: Transaction) -> int: ...
    async def claim_all(self, tx: Transaction, commands: Sequence[tuple[Command, bytes]]) -> list[int | None]: ...
    async def keep_answer(self, tx: Transaction, command: Command, answer: bytes) -> None: ...
    async def improve_answer(self, db: Database, command: Command, answer: bytes) -> None: ...


class Sequences(Protocol):
    """Where sequences come from."""

    async def next_sequence(self, tx: Transaction) -> int: ...


class DueRequests(Protocol):
    """What closing requests needs of the store."""

    async def close_due(
        self, tx: Transaction, due: Sequence[tuple[str, UUID]], now: datetime, *, answers_bytes: int
    ) -> list[Closing]: ...


class Answer(Protocol):
    """The answer to a call, in the making."""

    @property
    def entries(self) -> Sequence[Outgoing]:
        """What goes out because of the call."""
        ...

    @property
    def accepted(self) -> int:
        """How many of the call's items are accepted."""
        ...

    @property
    def refused(self) -> int:
        """How many are not."""
        ...

    def serialized(self) -> bytes:
        """As it stands."""
        ...

    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None:
        """Say what came of the entries, one outcome each; `is_applied` only when all have been applied."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


class _NothingAccepted(Exception):
    """Rolls the transaction back: nothing is stored, the idempotency key included."""


class Acceptance:
    """Makes commands durable and passes them on."""

    def __init__(self, *, db: Database, sender: Sender, store: Commands, backlogs: Backlogs) -> None:
        self._db = db
        self._sender = sender
        self._backlogs = backlogs
        self._store = store
        self._groups = Groups(db=db, sender=sender, store=store)
        self._repeating = asyncio.Semaphore(REPEATS_AT_ONCE)

    async def accept_ready(self, command: Command, answer: AnswerT) -> AnswerT | bytes:
        """As `accept`, for what needs nothing of the database: it shares its transaction with others (group commit)."""
        self._check_room(command)
        written = await self._groups.write(command, answer) if answer.entries else None
        if written is None:  # There is nothing to accept, or the key is taken.

            async def prepare(_: Transaction) -> AnswerT:
                return answer

            return await self._accept(command, prepare, self._repetition())
        _count(command, answer)
        if command.timeout is not None:
            expected = {place.frame_id: written.expected[place.frame_id] for place in written.positions}
            await self._settle(command, answer, expected, written.positions)
        return answer

    async def accept(self, command: Command, prepare: Callable[[Transaction], Awaitable[AnswerT]]) -> AnswerT | bytes:
        """Accept a command; returns its answer, or the serialized one of the call that it repeats.

        `prepare` makes the state changes and the entries, in the transaction. Raises ResourceExhausted when a link or
        the tenant's share is full, AlreadyExists when the key had other content, Unavailable when Postgres is away.
        After the commit nothing raises.
        """
        return await self._accept(command, prepare, self._db.transaction())

    async def _accept(
        self,
        command: Command,
        prepare: Callable[[Transaction], Awaitable[AnswerT]],
        transaction: AbstractAsyncContextManager[Transaction],
    ) -> AnswerT | bytes:
        self._check_room(command)
        answer: AnswerT | None = None
        try:
            async with transaction as tx:
                kept = await self._store.claim(tx, command)
                if kept is not None:
                    metrics.REPEATS.labels(command.method).inc()
                    return kept
                answer = await prepare(tx)
                if not answer.entries:
                    raise _NothingAccepted
                sequence = await self._store.next_sequence(tx)
                frames, positions = await self._write(tx, command.tenant, answer.entries, sequence)
                if command.key:
                    await self._store.keep_answer(tx, command, answer.serialized())
        except _NothingAccepted:
            assert answer is not None
            answer.settle([], is_applied=True)
            _count(command, answer)
            return answer
        _count(command, answer)
        expected = self._sender.expect(frames) if command.timeout is not None else {}
        self._sender.publish(frames)
        if command.timeout is not None:
            await self._settle(command, answer, expected, positions)
        return answer

    @asynccontextmanager
    async def _repetition(self) -> AsyncIterator[Transaction]:
        async with self._repeating, self._db.transaction() as tx:
            yield tx

    def _check_room(self, command: Command) -> None:
        self._sender.check_room(command.receivers)
        self._backlogs.check_room(command.tenant)

    async def _write(
        self, tx: Transaction, tenant: str, entries: Sequence[Outgoing], sequence: int
    ) -> tuple[list[OutgoingFrame], list[Position]]:
        number(entries, sequence)
        frames, positions = self._sender.pack(entries, carrier_of(tenant))
        await self._sender.insert(tx, frames)
        return frames, positions

    async def _settle(
        self, command: Command, answer: Answer, expected: Expected, positions: Sequence[Position]
    ) -> None:
        assert command.timeout is not None
        receipts = await self._sender.collect(expected, command.timeout)
        is_applied = all(
            frame_id in receipts and receipts[frame_id].verdict == link_pb2.FRAME_VERDICT_APPLIED
            for frame_id in expected
        )
        answer.settle(outcomes_of(receipts, positions), is_applied=is_applied)
        if not is_applied:
            metrics.NOT_YET_APPLIED.labels(command.method).inc()
        if command.key and receipts:
            try:
                await self._store.improve_answer(self._db, command, answer.serialized())
            except Unavailable as error:  # The answer kept with the commit stays; it says less, and nothing wrong.
                log.info("An answer was not kept as it became.", method=command.method, error=str(error))


def _count(command: Command, answer: Answer) -> None:
    metrics.items_of(command.method, "accepted").inc(answer.accepted)
    if answer.refused:
        metrics.items_of(command.method, "refused").inc(answer.refused)


def outcomes_of(receipts: Mapping[UUID, link_pb2.Receipt], positions: Sequence[Position]) -> list[EntryOutcome]:
    """What the receipts say, one outcome per entry in the order given to pack; NOTHING where they say nothing."""
    said = {
        Position(frame_id=frame_id, index=result.index): _outcome(result)
        for frame_id, receipt in receipts.items()
        for result in receipt.results
    }
    return [said.get(position, NOTHING) for position in positions] if said else [NOTHING] * len(positions)


def _outcome(result: link_pb2.EntryResult) -> EntryOutcome:
    return EntryOutcome(
        changed=result.changed,
        already_left=result.already_left,
        is_repeated=result.is_repeated,
        code=result.error_code,
        reason=result.error_reason,
        message=result.error_message,
    )


class Closings:
    """Closes requests at their answer-by date: what comes in from the scheduler."""

    def __init__(
        self, *, clock: Clock, sender: Sender, sequences: Sequences, requests: DueRequests, entries: Entries
    ) -> None:
        self._clock = clock
        self._sender = sender
        self._sequences = sequences
        self._requests = requests
        self._entries = entries

    async def apply(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        """See libs.links.receiver.Apply. A request that is over already is not closed again, and sends nothing."""
        due, causes = _due(frames), _causes(frames)
        wanted = sorted(set(due.values()))
        now = self._clock.now()
        sequence = await self._sequences.next_sequence(tx)
        closed: set[tuple[str, UUID]] = set()
        states: Counter[State] = Counter()
        outgoing: list[OutgoingFrame] = []
        for start in range(0, len(wanted), CLOSED_AT_ONCE):
            chunk = wanted[start : start + CLOSED_AT_ONCE]
            closings = await self._requests.close_due(tx, chunk, now, answers_bytes=MAX_ANSWERS_BYTES)
            written = await self._write_summaries(tx, closings, sequence, causes)
            closed.update((one.tenant, one.request.id) for one in closings)
            states.update(one.state for one in closings)
            if sum(len(frame.payload) for frame in outgoing + written) <= MAX_OUTGOING_BYTES:
                outgoing += written
        return Applied(results=_results(due, closed), outgoing=outgoing, on_commit=partial(_count_closed, states))

    async def _write_summaries(
        self, tx: Transaction, closings: Sequence[Closing], sequence: int, causes: Mapping[tuple[str, UUID], Point]
    ) -> list[OutgoingFrame]:
        summaries = [self._entries.summary(one) for one in closings]
        if causes:
            traces = (causes.get((one.tenant, one.request.id), NOWHERE) for one in closings)
            summaries = [replace(one, trace=trace) for one, trace in zip(summaries, traces, strict=True)]
        number(summaries, sequence)
        frames, _ = self._sender.pack(summaries)
        await self._sender.insert(tx, frames)
        return frames


def _count_closed(states: Mapping[State, int]) -> None:
    for state, requests in states.items():
        metrics.CLOSED_REQUESTS.labels(state.name.lower()).inc(requests)


def _due(frames: Sequence[IncomingFrame]) -> dict[tuple[UUID, int], tuple[str, UUID]]:
    """(tenant, request id) per (frame id, index); raises PoisonFrame for anything but requests that are due."""
    due: dict[tuple[UUID, int], tuple[str, UUID]] = {}
    for one in frames:
        for index, entry in enumerate(one.frame.entries):
            kind = entry.WhichOneof("kind")
            if kind != "request_due":
                raise PoisonFrame(f"entry {index} is a {kind or 'kind that we do not know'}; intake takes request_due")
            if len(entry.request_due.request_id) != 16:
                raise PoisonFrame(f"entry {index} has no request_id of 16 bytes")
            due[one.id, index] = (entry.tenant, UUID(bytes=entry.request_due.request_id))
    return due


def _causes(frames: Sequence[IncomingFrame]) -> dict[tuple[str, UUID], Point]:
    """What closes the requests that are due, of those that are traced; the frames are ones that `_due` has taken."""
    return {
        (entry.tenant, UUID(bytes=entry.request_due.request_id)): frame.trace_of(entry)
        for frame in frames
        if frame.is_traced
        for entry in frame.frame.entries
    }


def _results(
    due: Mapping[tuple[UUID, int], tuple[str, UUID]], closed: set[tuple[str, UUID]]
) -> dict[UUID, list[link_pb2.EntryResult]]:
    results: dict[UUID, list[link_pb2.EntryResult]] = {}
    for (frame_id, index), key in due.items():
        if key in closed:
            results.setdefault(frame_id, []).append(link_pb2.EntryResult(index=index, changed=1))
    return results
