"""The leases loop against a scripted store and engine."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

from libs.errors import Unavailable
from libs.links.receiver import Message
from services.scheduler.loops_leases import Leases
from services.scheduler.store_leases import Grant, Situation
from services.scheduler.timer import BEGINNING

SECOND = timedelta(seconds=1)
TTL = 6 * SECOND


@dataclass
class FakeEngine:
    """Remembers which shards it has."""

    epochs: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def add(self, *, number: int, epoch: int, **_: object) -> None:
        self.epochs[number] = epoch

    async def drop(self, numbers: Iterable[int]) -> None:
        self.calls.append(f"drop {sorted(numbers)}")
        self.dropped += sorted(numbers)
        for number in self.dropped:
            self.epochs.pop(number, None)

    def by_lane(self, numbers: Iterable[int]) -> list[list[int]]:
        return [part for lane in range(2) if (part := [number for number in sorted(numbers) if number % 2 == lane])]

    def wake(self) -> None:
        """Nothing sleeps."""

    async def hand_back_mail(self) -> None:
        """There is none."""


@dataclass
class FakeStore:
    """Finds what it is told to find; None: Postgres is away. `lost`: those it does not renew."""

    situation: Situation | None
    lost: frozenset[int] = frozenset()
    can_take: bool = False
    calls: list[str] = field(default_factory=list)
    released: set[int] = field(default_factory=set)
    answer: asyncio.Event | None = None

    async def look(self) -> Situation:
        if self.situation is None:
            raise Unavailable("Postgres is away")
        return self.situation

    async def renew(self, held: Mapping[int, int]) -> frozenset[int]:
        if self.situation is None:
            raise Unavailable("Postgres is away")
        self.calls.append(f"renew {sorted(held)}")
        return frozenset(held) - self.lost

    async def take(self, shards: Collection[int]) -> Sequence[Grant]:
        self.calls.append(f"take {sorted(shards)}")
        if self.answer is not None:
            await self.answer.wait()
        return [
            Grant(shard=n, epoch=7, watermark=BEGINNING, newest_tombstones={}, unheld=timedelta(0))
            for n in shards
            if self.can_take
        ]

    async def release(self, shards: Collection[int]) -> None:
        self.calls.append(f"release {sorted(shards)}")
        self.released |= set(shards)

    async def resign(self) -> None:
        self.calls.append("resign")

    async def forget(self, *, tombstones_after: timedelta, members_after: timedelta) -> None: ...


async def _consume(_shard: int) -> AsyncGenerator[Sequence[Message], None]:
    none: list[list[Message]] = []
    for messages in none:
        yield messages


def _leases(engine: FakeEngine, store: FakeStore) -> Leases:
    store.calls = engine.calls  # One story.

    async def nudge() -> None:
        store.calls.append("nudge")

    return Leases(
        engine=cast(Any, engine),
        store=store,
        replica="a",
        shard_count=4,
        ttl=TTL,
        tombstones_after=SECOND,
        consume=_consume,
        nudge=nudge,
    )


def _situation(*, ours: Iterable[int] = (), **members: timedelta) -> Situation:
    others = {shard: TTL for shard in range(4) if shard not in set(ours)}
    return Situation(members={"a": TTL, **members}, lease_ends_in=others)


def _free(*shards: int) -> Situation:
    return Situation(members={"a": TTL}, lease_ends_in=dict.fromkeys(shards, timedelta(0)))


async def test_a_replica_looks_again_when_another_ones_membership_runs_out() -> None:
    """A dead one's shards become ours at that moment, and not a third of a lease later."""
    leases = _leases(FakeEngine(), FakeStore(_situation(b=0.5 * SECOND)))
    assert await leases.beat() == 0.52 * SECOND


async def test_a_replica_looks_again_soon_when_a_free_shard_was_locked() -> None:
    """Whoever holds the lock is committing, or is ended by Postgres."""
    assert await _leases(FakeEngine(), FakeStore(_free(0, 1, 2, 3))).beat() == timedelta(milliseconds=50)


async def test_inv3_a_shard_that_was_not_renewed_is_dropped() -> None:
    """Its epoch is another one by now."""
    engine = FakeEngine({0: 5, 1: 9})
    await _leases(engine, FakeStore(_situation(ours=[0, 1]), lost=frozenset({1}))).beat()
    assert engine.dropped == [1]
    assert engine.epochs == {0: 5}


async def test_what_falls_to_another_member_is_given_back() -> None:
    """After the engine has let go of it."""
    engine, store = FakeEngine({n: n + 10 for n in range(4)}), FakeStore(_situation(ours=range(4), b=TTL))
    await _leases(engine, store).beat()
    assert store.released == set(engine.dropped)
    assert 0 < len(engine.dropped) < 4


async def test_inv3_a_lease_is_trusted_only_after_a_renewal() -> None:
    """At first not, after a beat for less than its TTL, and a failed beat adds nothing."""
    store = FakeStore(None)
    leases = _leases(FakeEngine(), store)
    assert not leases.is_trusted()
    store.situation = _situation()
    await leases.beat()
    assert leases.is_trusted()


async def test_free_shards_are_taken_before_the_others_are_renewed() -> None:
    """Nothing fires in them meanwhile, and a renewal waits for the turns of all that are held."""
    engine, store = FakeEngine({0: 3}), FakeStore(_free(1, 2, 3), can_take=True)
    await _leases(engine, store).beat()
    assert store.calls == ["renew []", "take [1, 2, 3]", "renew [0, 1, 2, 3]", "nudge"]


async def test_a_nudge_between_two_renewals_renews_nothing() -> None:
    """It takes what has become free; the next beat comes in time for the renewal."""
    leases = _leases(FakeEngine(), store := FakeStore(_situation(), can_take=True))
    await leases.beat()
    store.calls.clear()
    store.situation = replace(_situation(), lease_ends_in={0: timedelta(0), 1: TTL, 2: TTL, 3: TTL})
    assert await leases.beat() <= TTL / 3
    assert store.calls == ["take [0]"]


async def test_a_leaving_replica_resigns_and_hands_over_lane_by_lane() -> None:
    """Others want its shards once it is no member; a lane fires until it is its turn, and then no more."""
    engine, store = FakeEngine({n: n + 10 for n in range(4)}), FakeStore(_situation(ours=range(4)))
    running = asyncio.create_task(_leases(engine, store).run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert store.calls[3:] == [
        *("resign", "drop [0, 2]", "release [0, 2]", "nudge", "drop [1, 3]", "release [1, 3]", "nudge"),
        *("release [0, 1, 2, 3]", "nudge"),
    ]
    assert engine.epochs == {}


async def test_a_leaving_replica_gives_back_what_a_take_without_an_answer_may_have_got() -> None:
    """Nobody would have it until the lease runs out; likewise a release that was cut off, a shard of a failed turn."""
    engine, store = FakeEngine(), FakeStore(_situation(ours=range(4)), answer=asyncio.Event())
    running = asyncio.create_task(_leases(engine, store).run())
    await asyncio.sleep(0)
    assert store.calls[-1] == "take [0, 1, 2, 3]"
    running.cancel()
    await asyncio.wait([running])
    assert store.released == {0, 1, 2, 3}
