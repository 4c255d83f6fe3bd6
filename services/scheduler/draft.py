"""The draft of a turn: what it has decided so far, over what was there before. Pure data.

Commands and timers of one turn must see what those before them did, and none of it is in Postgres yet. So whoever looks
up something asks the draft, which looks at the turn's own changes first.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from itertools import chain
from uuid import UUID

from services.scheduler.commands import Changes, Entity, Tombstone
from services.scheduler.facts import NOTHING_KNOWN, Facts
from services.scheduler.needs import Known
from services.scheduler.timer import State, Timer


class Draft:
    """One turn of one shard. Everything is kept by key, so that a turn of thousands of commands stays linear."""

    def __init__(self, shard: int) -> None:
        self.changes = Changes(shard=shard)
        self.made: set[UUID] = set()  # Timers, schedules and runs.
        self._inserted: defaultdict[Entity, list[UUID]] | None = None  # Made when first asked for: few turns need it.
        self._buried: defaultdict[Entity, list[Tombstone]] = defaultdict(list)
        self._newest: dict[UUID, UUID] = {}  # By schedule.
        self._moved: defaultdict[UUID, set[UUID]] = defaultdict(set)  # By schedule.

    def insert(self, timer: Timer) -> None:
        """A new timer."""
        self.changes.inserts[timer.id] = timer
        if self._inserted is not None:
            self._inserted[timer.tenant, timer.entity].append(timer.id)
        if timer.recurrence is not None:
            self._newest[timer.schedule_id] = timer.id

    def update(self, timer: Timer) -> None:
        """A timer that was there before, new or old, is otherwise now."""
        if timer.id in self.changes.inserts:
            self.changes.inserts[timer.id] = timer
        else:
            self.changes.updates[timer.id] = timer
        if timer.schedule_id != timer.id:
            self._moved[timer.schedule_id].add(timer.id)

    def bury(self, tombstone: Tombstone) -> None:
        """What an order leaves behind."""
        self.changes.tombstones.append(tombstone)
        self._buried[tombstone.tenant, tombstone.entity].append(tombstone)

    def now(self, timer_id: UUID) -> Timer | None:
        """A timer as this turn has left it; None where it has not touched it."""
        return self.changes.updates.get(timer_id) or self.changes.inserts.get(timer_id)

    def timer(self, timer_id: UUID, key: Entity, known: Known) -> Timer | None:
        """An entity's timer, by id."""
        timer = self.now(timer_id) or known.timers.get(timer_id)
        return timer if timer is not None and (timer.tenant, timer.entity) == key else None

    def waiting(self, key: Entity, known: Known) -> list[Timer]:
        """An entity's timers that may still do something; those that are over by now may be among them."""
        if self._inserted is None:
            self._inserted = defaultdict(list)
            for timer in self.changes.inserts.values():
                self._inserted[timer.tenant, timer.entity].append(timer.id)
        new = (self.changes.inserts[timer_id] for timer_id in self._inserted.get(key, ()))
        return [*(self.now(timer.id) or timer for timer in known.waiting.get(key, ())), *new]

    def newest(self, schedule_id: UUID, key: Entity, known: Known) -> Timer | None:
        """The newest occurrence of an entity's schedule."""
        newest_id = self._newest.get(schedule_id)
        timer = known.schedules.get(schedule_id) if newest_id is None else self.changes.inserts[newest_id]
        timer = timer and (self.now(timer.id) or timer)
        return timer if timer is not None and (timer.tenant, timer.entity) == key else None

    def under_way(self, schedule_ids: Collection[UUID], key: Entity, known: Known) -> dict[UUID, list[Timer]]:
        """The occurrences of an entity's schedules that are under way, by schedule."""
        siblings = (timer for schedule_id in schedule_ids for timer in known.siblings.get(schedule_id, ()))
        both = chain(siblings, known.waiting.get(key, ()))
        found = {timer.id: timer for timer in both if timer.schedule_id in schedule_ids}
        moved = (timer_id for schedule_id in schedule_ids for timer_id in self._moved.get(schedule_id, ()))
        found |= {timer_id: timer for timer_id in (*moved, *found) if (timer := self.now(timer_id)) is not None}
        under_way: dict[UUID, list[Timer]] = {}
        for timer in found.values():
            if timer.is_under_way:
                under_way.setdefault(timer.schedule_id, []).append(timer)
        return under_way

    def next_buffered(self, schedule_ids: Collection[UUID], key: Entity, known: Known) -> list[Timer]:
        """The occurrences that wait for the end of others, where none of those is under way any more."""
        under_way = self.under_way(schedule_ids, key, known).values()
        return [timers[0] for timers in under_way if all(one.state is State.BUFFERED for one in timers)]

    def tombstones(self, key: Entity, known: Known, *, after: int) -> list[Tombstone]:
        """The orders to an entity's timers that were accepted later, in that order."""
        if not known.tombstones and not self._buried:  # Nearly always.
            return []
        both: Iterable[Tombstone] = (*known.tombstones.get(key, ()), *self._buried.get(key, ()))
        return sorted((one for one in both if one.sequence > after), key=lambda one: one.sequence)

    def facts(self, key: Entity, known: Known) -> Facts:
        """What is known of an entity."""
        return self.changes.facts.get(key, known.facts.get(key, NOTHING_KNOWN))
