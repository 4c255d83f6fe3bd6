"""services.intake.stream_groups: which calls share a transaction, and which a frame."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
from carillon.link.v1 import link_pb2

from libs.errors import Unavailable
from libs.links.frames import Addressed, Outgoing, OutgoingFrame, Position, pack
from libs.postgres import Database, Transaction
from services.intake import stream_groups
from services.intake.commands import Command
from services.intake.stream_groups import BULK_ENTRIES, MAX_CALLS, Groups, Written


@dataclass
class Call:
    """An answer with one entry for digest."""

    name: str = ""
    entries: list[Outgoing] = field(default_factory=list)

    def __post_init__(self) -> None:
        entry = link_pb2.Entry(notification=link_pb2.Notification(entity=self.name))
        self.entries = [Addressed(receiver="digest", entry=entry)]

    def serialized(self) -> bytes:
        """Nothing to say."""
        return b""


@dataclass
class World:
    """Stands in for database, sender and store. `bad`: entities whose transaction fails; `taken`: keys in use."""

    bad: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)
    error: Exception = field(default_factory=lambda: ValueError("cannot be written"))
    transactions: list[list[OutgoingFrame]] = field(default_factory=list)
    published: list[OutgoingFrame] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    sequence: int = 0
    begun: int = 0

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        """One that commits when the gate is open."""
        self.begun += 1
        frames: list[OutgoingFrame] = []
        yield frames
        await self.gate.wait()
        if any(name in self.bad for frame in frames for name in entities(frame)):
            raise self.error
        self.transactions.append(frames)

    def pack(
        self, addressed: Sequence[Outgoing], carrier: Mapping[str, str] | None = None
    ) -> tuple[list[OutgoingFrame], list[Position]]:
        """As libs.links.sender."""
        return pack("intake", addressed, dict(carrier or {}))

    async def insert(self, tx: Transaction, frames: Sequence[OutgoingFrame]) -> None:
        """Into the transaction's list."""
        cast(Any, tx).extend(frames)

    def expect(self, frames: Sequence[OutgoingFrame]) -> dict[Any, Any]:
        """A receipt to come for each frame."""
        return {frame.id: asyncio.get_running_loop().create_future() for frame in frames}

    def publish(self, frames: Sequence[OutgoingFrame]) -> None:
        """Keep them."""
        self.published += frames

    async def claim_all(self, _tx: Transaction, commands: Sequence[tuple[Command, bytes]]) -> list[int | None]:
        """Ascending sequences."""
        self.sequence += len(commands)
        first = self.sequence - len(commands) + 1
        return [None if one.key in self.taken else first + n for n, (one, _) in enumerate(commands)]


def entities(frame: OutgoingFrame) -> list[str]:
    """Whose entries a frame holds."""
    return [entry.notification.entity for entry in link_pb2.Frame.FromString(frame.payload).entries]


def sequences(frame: OutgoingFrame) -> list[int]:
    """In the order of the entries."""
    return [entry.sequence for entry in link_pb2.Frame.FromString(frame.payload).entries]


def sizes(world: World) -> list[int]:
    """Entries per transaction, the smallest first."""
    return sorted(sum(frame.entries for frame in frames) for frames in world.transactions)


def together_with(name: str, world: World) -> list[list[str]]:
    """The frames, as the entities in each, of the transaction that has this entity."""
    written = [[entities(frame) for frame in frames] for frames in world.transactions]
    return next(frames for frames in written if any(name in one for one in frames))


@pytest.fixture
def world() -> World:
    """With its gate closed."""
    return World()


def groups_of(world: World) -> Groups:
    """On the stand-ins."""
    return Groups(db=cast(Database, world), sender=world, store=world)


async def begun(groups: Groups, *names: str, tenant: str = "acme", **more: Any) -> list["asyncio.Task[Written | None]"]:
    """Calls that have joined."""
    command = Command(tenant=tenant, method="Notify", receivers=("digest",), **more)
    tasks = [asyncio.create_task(groups.write(command, Call(name))) for name in names]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_calls_that_come_while_others_commit_share_the_next_transaction(world: World) -> None:
    """Sixty-five calls, two transactions: one goes at once, and all others together."""
    groups = groups_of(world)
    tasks = await begun(groups, "a")
    tasks += await begun(groups, *(f"e{n}" for n in range(64)))
    world.gate.set()
    written = await asyncio.gather(*tasks)
    assert sizes(world) == [1, 64]
    assert all(one is not None for one in written)


async def test_a_call_that_is_alone_waits_for_nobody(world: World) -> None:
    """It is written in fewer turns of the loop than a group would gather for."""
    groups = groups_of(world)
    world.gate.set()
    (task,) = await begun(groups, "a")
    for _ in range(5):
        await asyncio.sleep(0)
    assert task.done()
    assert sizes(world) == [1]


async def test_calls_that_come_one_by_one_share_a_transaction_where_there_is_company(world: World) -> None:
    """A busy loop takes in a call every other turn: the group goes when no more come, not at the first occasion."""
    groups = groups_of(world)
    world.gate.set()
    for n in range(BULK_ENTRIES):  # These are over, and are no bulk that waits.
        await asyncio.gather(*await begun(groups, f"before-{n}"))
    await asyncio.gather(*await begun(groups, "a", "b"))
    tasks = [task for n in range(20) for task in await begun(groups, f"e{n}")]
    await asyncio.gather(*tasks)
    assert sizes(world) == [1] * BULK_ENTRIES + [2, 20]


async def test_inv9_a_group_goes_although_the_loop_is_never_quiet(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long calls wait for company is bounded by time too."""
    monkeypatch.setattr(stream_groups, "QUIET_TURNS", 1 << 60)
    groups = groups_of(world)
    world.gate.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*await begun(groups, "a", "b"))
    assert sizes(world) == [2]


async def test_bulk_has_a_second_transaction_and_small_calls_have_not(world: World) -> None:
    """While Postgres works for one group, the next is packed where it is large; else it would only be smaller."""
    groups = groups_of(world)
    tasks = await begun(groups, "a") + await begun(groups, "b")
    assert world.begun == 1
    bulk = Call("bulk")
    bulk.entries *= BULK_ENTRIES
    tasks.append(
        asyncio.create_task(groups.write(Command(tenant="acme", method="Notify", receivers=("digest",)), bulk))
    )
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.begun == 2
    world.gate.set()
    await asyncio.gather(*tasks)
    assert sizes(world) == [1, BULK_ENTRIES + 1]


async def test_each_call_knows_its_own_entries_and_has_a_sequence_of_its_own(world: World) -> None:
    """Commands are ordered by their sequences, also within a group."""
    groups = groups_of(world)
    await begun(groups, "x")
    tasks = await begun(groups, "a", "b", "c")
    world.gate.set()
    written = await asyncio.gather(*tasks)
    (frame,) = [frame for frames in world.transactions for frame in frames if len(entities(frame)) == 3]
    assert [one.positions for one in written if one] == [[Position(frame_id=frame.id, index=n)] for n in range(3)]
    assert sequences(frame) == sorted(set(sequences(frame)))


async def test_inv8_tenants_share_a_transaction_and_never_a_frame(world: World) -> None:
    """A frame is put aside as a whole."""
    groups = groups_of(world)
    await begun(groups, "x")
    tasks = await begun(groups, "a", tenant="acme") + await begun(groups, "b", tenant="bmce")
    world.gate.set()
    await asyncio.gather(*tasks)
    assert sorted(together_with("b", world)) == [["a"], ["b"]]


async def test_a_call_that_comes_as_the_committer_ends_has_another_one(world: World) -> None:
    """In the same turn of the loop, after the committer has found nothing left to do: nobody else may ever call."""
    groups = groups_of(world)
    first = await begun(groups, "a")
    await asyncio.sleep(0)  # It waits at the gate.
    world.gate.set()  # Wakes the committer, which has its last turn just before the next call has its first.
    second = await begun(groups, "b")
    async with asyncio.timeout(10):
        await asyncio.gather(*first, *second)
    assert sizes(world) == [1, 1]


async def test_a_call_that_cannot_be_written_fails_alone(world: World) -> None:
    """The others of its group are written without it."""
    world.bad = {"bad"}
    groups = groups_of(world)
    await begun(groups, "x")
    tasks = await begun(groups, "a", "bad", "c")
    world.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in results] == [Written, ValueError, Written]


async def test_when_postgres_is_away_every_call_hears_it_once(world: World) -> None:
    """Trying them one by one would make each wait for all the others' timeouts."""
    world.bad, world.error = {"b"}, Unavailable("Postgres is away", reason="POSTGRES_UNAVAILABLE")
    groups = groups_of(world)
    await begun(groups, "x")
    tasks = await begun(groups, "a", "b", "c")
    world.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in results] == [Unavailable] * 3


async def test_a_call_whose_key_is_taken_goes_alone(world: World) -> None:
    """None says so, and nothing of it is written here."""
    world.taken = {"k"}
    groups = groups_of(world)
    await begun(groups, "x")
    (keyed,) = await begun(groups, "a", key="k")
    (other,) = await begun(groups, "b")
    world.gate.set()
    assert await keyed is None
    assert await other is not None
    assert together_with("b", world) == [["b"]]


async def test_a_caller_that_left_before_its_group_began_is_left_out(world: World) -> None:
    """What nobody waits for and nobody was promised is not stored."""
    groups = groups_of(world)
    await begun(groups, "x")
    gone, stays = await begun(groups, "a", "b")
    gone.cancel()
    await asyncio.sleep(0)
    world.gate.set()
    await stays
    assert together_with("b", world) == [["b"]]


async def test_inv9_a_group_is_bounded(world: World) -> None:
    """A thousand calls are several transactions."""
    groups = groups_of(world)
    tasks = await begun(groups, *(f"e{n}" for n in range(1_000)))
    world.gate.set()
    await asyncio.gather(*tasks)
    assert max(sum(len(entities(frame)) for frame in frames) for frames in world.transactions) <= MAX_CALLS


async def test_only_those_who_wait_have_receipts_expected(world: World) -> None:
    """A group of callers that do not wait registers nothing."""
    groups = groups_of(world)
    (silent,) = await begun(groups, "x")
    (waiting,) = await begun(groups, "y", timeout=timedelta(seconds=1))
    world.gate.set()
    written = [await silent, await waiting]
    assert [bool(one and one.expected) for one in written] == [False, True]
    assert len(world.published) == 2
