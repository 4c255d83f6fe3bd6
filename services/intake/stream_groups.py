"""Group commit: calls that come together share a transaction, its fsync, and where they may their frames.

A call joins the group that waits; while one group commits, the next one gathers. A call that is alone goes at once.
Where calls have company, a group goes when no further one has come for a while. That is counted in turns of the event
loop, not in time: a busy loop lets in one call per turn or less, and a group that goes too early leaves them to further
transactions. Measured with 64 callers: groups of 3 cost 1.5 ms of processor time per call, over all processes but the
caller's; groups of 27 cost 0.6 ms.

Calls share a frame only where they have the same tenant and the same trace: a frame is applied or put aside as a whole,
and no tenant's entries should be put aside for another's.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from msgspec import Struct

from libs.errors import Unavailable
from libs.links.frames import Outgoing, OutgoingFrame, Position, number
from libs.links.receiver import Receipt
from libs.postgres import Database, Transaction
from services.intake.commands import Command
from services.intake.stream_backlog import carrier_of

COMMITTERS = 2
"""Transactions under way at once, the second for bulk alone: while Postgres works for one, this process packs the next.
Of small calls a second one would only make smaller groups."""

BULK_ENTRIES = 500
"""So many need no company: what a transaction costs is nothing beside them."""

QUIET_TURNS = 80
"""Turns of the loop without a call, after which a group goes: 0.2 ms when the loop has nothing else to do."""

MAX_GATHER_S = 0.02
"""How long a group gathers, at most: what 64 callers at once take to be let in, where each costs 0.3 ms."""

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


class Written(Struct, frozen=True, kw_only=True):
    """A call that is durable: where its entries are, and the receipts to come for their frames."""

    positions: Sequence[Position]
    expected: Expected


class _Member(Struct, frozen=True, kw_only=True):
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
        self._waiting_entries = 0
        self._has_company = False
        self._committers: set[asyncio.Task[None]] = set()

    async def write(self, command: Command, answer: Answer) -> Written | None:
        """Make a call durable and publish it; None when its key is taken, so that it has to go alone.

        Raises Unavailable when Postgres is away.
        """
        done: asyncio.Future[Written | None] = asyncio.get_running_loop().create_future()
        carrier = carrier_of(command.tenant)
        self._waiting.append(_Member(command=command, answer=answer, carrier=carrier, done=done))
        self._waiting_entries += len(answer.entries)
        if len(self._committers) < (COMMITTERS if self._waiting_entries >= BULK_ENTRIES else 1):
            self._committers.add(asyncio.create_task(self._commit_waiting()))
        return await done

    async def _commit_waiting(self) -> None:
        try:
            while self._waiting:
                if self._has_company or len(self._waiting) > 1:
                    await self._gather()
                if group := self._take():  # The other committer may have taken them.
                    self._has_company = len(group) > 1
                    await self._commit(group)
        finally:  # Not in a callback of the task: it comes a turn later, and a call in between would wait for nobody.
            self._committers -= {asyncio.current_task()}

    async def _gather(self) -> None:
        loop = asyncio.get_running_loop()
        until, calls, quiet = loop.time() + MAX_GATHER_S, 0, 0
        while quiet < QUIET_TURNS and len(self._waiting) < MAX_CALLS and self._waiting_entries < BULK_ENTRIES:
            quiet = quiet + 1 if len(self._waiting) == calls else 0
            calls = len(self._waiting)
            await asyncio.sleep(0)
            if loop.time() >= until:
                return

    def _take(self) -> list[_Member]:
        group: list[_Member] = []
        entries = 0
        while self._waiting and len(group) < MAX_CALLS:
            entries += len(self._waiting[0].answer.entries)
            if group and entries > MAX_ENTRIES:
                break
            member = self._waiting.popleft()
            self._waiting_entries -= len(member.answer.entries)
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
