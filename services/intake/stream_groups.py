"""Group commit: calls that come together share a transaction, its fsync, and where they may their frames.

A call joins the group that waits; while one group commits, the next one gathers. Nobody waits for company: under light
load a group is one call, under heavy load a few transactions carry them all.

Calls share a frame only where they have the same tenant and the same trace: a frame is applied or put aside as a whole,
and no tenant's entries should be put aside for another's.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from libs.errors import Unavailable
from libs.links.frames import Outgoing, OutgoingFrame, Position, number
from libs.links.receiver import Receipt
from libs.postgres import Database, Transaction
from services.intake.commands import Command
from services.intake.stream_backlog import carrier_of

COMMITTERS = 2
"""Transactions under way at once: while Postgres works for one, this process packs the next."""

MAX_CALLS = 256
MAX_ENTRIES = 4_000
"""In one transaction, at least one call."""

Expected = Mapping[UUID, "asyncio.Future[Receipt]"]


class Sender(Protocol):
    """What is needed of libs.links.sender."""

    def pack(
        self, addressed: Sequence[Outgoing], carrier: Mapping[str, str] | None = None
    ) -> tuple[list[OutgoingFrame], list[Position]]: ...
    async def insert(self, tx: Transaction, frames: Sequence[OutgoingFrame]) -> None: ...
    def expect(self, frames: Sequence[OutgoingFrame]) -> Expected: ...
    def publish(self, frames: Sequence[OutgoingFrame]) -> None: ...


class Commands(Protocol):
    """See services.intake.store.CommandStore."""

    async def claim_all(self, tx: Transaction, commands: Sequence[tuple[Command, bytes]]) -> list[int | None]: ...


class Answer(Protocol):
    """The answer to a call, complete but for what its receipts will say."""

    @property
    def entries(self) -> Sequence[Outgoing]: ...
    def serialized(self) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A call that is durable: where its entries are, and the receipts to come for their frames."""

    positions: Sequence[Position]
    expected: Expected


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    command: Command
    answer: Answer
    carrier: dict[str, str]
    done: "asyncio.Future[Written | None]"


class Groups:
    """The calls of one process."""

    def __init__(self, *, db: Database, sender: Sender, store: Commands) -> None:
        self._db = db
        self._sender = sender
        self._store = store
        self._waiting: deque[_Member] = deque()
        self._committers: set[asyncio.Task[None]] = set()

    async def write(self, command: Command, answer: Answer) -> Written | None:
        """Make a call durable and publish it; None when its key is taken, so that it has to go alone.

        Raises Unavailable when Postgres is away.
        """
        done: asyncio.Future[Written | None] = asyncio.get_running_loop().create_future()
        carrier = carrier_of(command.tenant)
        self._waiting.append(_Member(command=command, answer=answer, carrier=carrier, done=done))
        if len(self._committers) < COMMITTERS:
            self._committers.add(task := asyncio.create_task(self._commit_waiting()))
            task.add_done_callback(self._committers.discard)
        return await done

    async def _commit_waiting(self) -> None:
        while group := self._take():
            await self._commit(group)

    def _take(self) -> list[_Member]:
        group: list[_Member] = []
        entries = 0
        while self._waiting and len(group) < MAX_CALLS:
            entries += len(self._waiting[0].answer.entries)
            if group and entries > MAX_ENTRIES:
                break
            member = self._waiting.popleft()
            if not member.done.cancelled():  # Its caller has left.
                group.append(member)
        return group

    async def _commit(self, group: Sequence[_Member]) -> None:
        try:
            await self._write(group)
        except Exception as err:  # noqa: BLE001 - outermost frame of a group: each call hears of it.
            if len(group) > 1 and not isinstance(err, Unavailable):
                for member in group:  # One of them is to blame.
                    await self._commit([member])
                return
            for member in group:
                if not member.done.done():
                    member.done.set_exception(err)

    async def _write(self, group: Sequence[_Member]) -> None:
        async with self._db.transaction() as tx:
            answers = [(one.command, one.answer.serialized() if one.command.key else b"") for one in group]
            sequences = await self._store.claim_all(tx, answers)
            claimed = [(one, number) for one, number in zip(group, sequences, strict=True) if number is not None]
            for member, sequence in claimed:
                number(member.answer.entries, sequence)
            frames, positions = self._pack([member for member, _ in claimed])
            await self._sender.insert(tx, frames)
        expected = self._sender.expect(frames) if any(one.command.timeout is not None for one in group) else {}
        self._sender.publish(frames)
        for member in group:
            if not member.done.done():
                places = positions.get(id(member))
                member.done.set_result(None if places is None else Written(positions=places, expected=expected))

    def _pack(self, members: Sequence[_Member]) -> tuple[list[OutgoingFrame], dict[int, list[Position]]]:
        together: dict[tuple[str, tuple[tuple[str, str], ...]], list[_Member]] = {}
        for member in members:
            together.setdefault((member.command.tenant, tuple(sorted(member.carrier.items()))), []).append(member)
        frames: list[OutgoingFrame] = []
        positions: dict[int, list[Position]] = {}
        for sharing in together.values():
            addressed = [one for member in sharing for one in member.answer.entries]
            packed, places = self._sender.pack(addressed, sharing[0].carrier)
            frames += packed
            start = 0
            for member in sharing:
                end = start + len(member.answer.entries)
                positions[id(member)] = places[start:end]
                start = end
        return frames, positions
