"""The leases loop against a scripted store and engine."""

from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

from libs.errors import Unavailable
from libs.links.receiver import Message
from services.scheduler.loops_leases import Leases
from services.scheduler.store_leases import Situation

SECOND = timedelta(seconds=1)
TTL = 6 * SECOND


@dataclass
class FakeEngine:
    """Remembers which shards it has."""

    epochs: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)

    async def drop(self, numbers: Iterable[int]) -> None:
        self.dropped += sorted(numbers)
        for number in self.dropped:
            self.epochs.pop(number, None)

    def wake(self) -> None:
        """Nothing sleeps."""

    async def hand_back_mail(self) -> None:
        """There is none."""


@dataclass
class FakeStore:
    """Finds what it is told to find; None: Postgres is away."""

    situation: Situation | None
    released: dict[int, int] = field(default_factory=dict)

    async def renew(self, held: Mapping[int, int]) -> Situation:
        if self.situation is None:
            raise Unavailable("Postgres is away")
        return self.situation

    async def take(self, shards: Collection[int]) -> Sequence[Any]:
        return []

    async def release(self, held: Mapping[int, int], *, is_leaving: bool) -> None:
        self.released |= held

    async def forget(self, *, tombstones_after: timedelta, members_after: timedelta) -> None: ...


async def _consume(_shard: int) -> AsyncGenerator[Sequence[Message], None]:
    none: list[list[Message]] = []
    for messages in none:
        yield messages


async def _nudge() -> None: ...


def _leases(engine: FakeEngine, store: FakeStore) -> Leases:
    return Leases(
        engine=cast(Any, engine),
        store=store,
        replica="a",
        shard_count=4,
        ttl=TTL,
        tombstones_after=SECOND,
        consume=_consume,
        nudge=_nudge,
    )


def _situation(*, renewed: Iterable[int] = (), **members: timedelta) -> Situation:
    others = {shard: TTL for shard in range(4) if shard not in set(renewed)}
    return Situation(renewed=frozenset(renewed), members={"a": TTL, **members}, lease_ends_in=others)


async def test_a_replica_looks_again_when_another_ones_membership_runs_out() -> None:
    """A dead one's shards become ours at that moment, and not a third of a lease later."""
    leases = _leases(FakeEngine(), FakeStore(_situation(b=0.5 * SECOND)))
    assert await leases.beat() == 0.52 * SECOND


async def test_a_replica_looks_again_soon_when_a_free_shard_was_locked() -> None:
    """Whoever holds the lock is committing, or is ended by Postgres."""
    free = Situation(renewed=frozenset(), members={"a": TTL}, lease_ends_in=dict.fromkeys(range(4), timedelta(0)))
    assert await _leases(FakeEngine(), FakeStore(free)).beat() == timedelta(milliseconds=50)


async def test_inv3_a_shard_that_was_not_renewed_is_dropped() -> None:
    """Its epoch is another one by now."""
    engine = FakeEngine({0: 5, 1: 9})
    await _leases(engine, FakeStore(_situation(renewed=[0]))).beat()
    assert engine.dropped == [1]
    assert engine.epochs == {0: 5}


async def test_what_falls_to_another_member_is_given_back_under_its_epoch() -> None:
    """After the engine has let go of it."""
    engine, store = FakeEngine({n: n + 10 for n in range(4)}), FakeStore(_situation(renewed=range(4), b=TTL))
    await _leases(engine, store).beat()
    assert store.released == {n: n + 10 for n in engine.dropped}
    assert 0 < len(engine.dropped) < 4


async def test_inv3_a_lease_is_trusted_only_after_a_renewal() -> None:
    """At first not, after a beat for less than its TTL, and a failed beat adds nothing."""
    store = FakeStore(None)
    leases = _leases(FakeEngine(), store)
    assert not leases.is_trusted()
    store.situation = _situation()
    await leases.beat()
    assert leases.is_trusted()
