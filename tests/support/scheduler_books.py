"""What was asked of a scheduler, and whether that is what came of it: every timer once, none after its cancel. Pure."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from services.scheduler.timer import State
from tests.support.durable_peer import Received

CLOCK_SLACK = timedelta(seconds=0.25)
"""How far the scheduler's reckoning of the database's clock may be ahead of the test's clock."""

_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A timer as it is in the scheduler's table; `state` is FIRED where the watermark says so."""

    timer_id: UUID
    schedule_id: UUID
    entity: str
    shard: int
    state: State
    due_at: datetime
    fire_at: datetime
    watermark_at: datetime
    note: str | None

    def __str__(self) -> str:
        return (
            f"{self.timer_id} of {self.entity} in shard {self.shard}: {self.state.name},"
            f" due {self.due_at:%T.%f}, fire_at {self.fire_at:%T.%f}, watermark {self.watermark_at:%T.%f}"
            + (f", {self.note}" if self.note else "")
        )


@dataclass(slots=True, kw_only=True)
class Cancel:
    """The cancel of all timers of an entity; what it answered, and when, once it has returned."""

    entity: str
    timer_ids: frozenset[UUID]
    changed: int | None = None
    returned_at: datetime | None = None


@dataclass(slots=True, kw_only=True)
class Books:
    """What must be true when nothing is under way any more.

    `once`: these fire exactly once. `never`: these do not fire and end so. `cancels`: of each entity's timers some
    have fired, once, and the others are cancelled, as many as the answer says. `chains`: of each schedule exactly these
    occurrences fire, once each. Nothing else fires. `failures`: commands that were not applied.
    """

    once: set[UUID] = field(default_factory=set)
    never: dict[UUID, State] = field(default_factory=dict)
    cancels: list[Cancel] = field(default_factory=list)
    chains: dict[UUID, list[datetime]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def timers(self) -> int:
        """How many timers were asked for, occurrences not counted."""
        return len(self.once) + len(self.never) + sum(len(one.timer_ids) for one in self.cancels)

    def differences(self, received: Sequence[Received], rows: Mapping[UUID, Row]) -> list[str]:
        """A sentence for everything that is otherwise than it must be; of each kind the first few."""
        times = Counter(one.timer_id for one in received)
        kinds = (
            self._wrong_once(times, rows),
            self._wrong_never(times, rows),
            (line for cancel in self.cancels for line in _wrong_cancel(cancel, times, rows)),
            self._wrong_chains(received, rows),
            self._strangers(received, rows),
            self.failures,
        )
        return [line for kind in kinds for line in _first_few(list(kind))]

    def _wrong_once(self, times: Counter[UUID], rows: Mapping[UUID, Row]) -> Iterator[str]:
        for timer_id in self.once:
            if times[timer_id] != 1:
                yield f"came {times[timer_id]} times instead of once: {_told(timer_id, rows)}"
            elif timer_id not in rows or rows[timer_id].state is not State.FIRED:
                yield f"came, and is not recorded as fired: {_told(timer_id, rows)}"

    def _wrong_never(self, times: Counter[UUID], rows: Mapping[UUID, Row]) -> Iterator[str]:
        for timer_id, state in self.never.items():
            if times[timer_id]:
                yield f"came {times[timer_id]} times instead of ending as {state.name}: {_told(timer_id, rows)}"
            elif timer_id not in rows or rows[timer_id].state is not state:
                yield f"is not {state.name}: {_told(timer_id, rows)}"

    def _wrong_chains(self, received: Sequence[Received], rows: Mapping[UUID, Row]) -> Iterator[str]:
        fired: defaultdict[UUID, Counter[datetime]] = defaultdict(Counter)
        for one in received:
            fired[one.schedule_id][one.due_at] += 1
        for schedule_id, due in self.chains.items():
            wrong = [(at, fired[schedule_id][at]) for at in due if fired[schedule_id][at] != 1]
            wrong += [(at, count) for at, count in fired[schedule_id].items() if at not in set(due)]
            if wrong:
                told = ", ".join(f"{at:%H:%M} came {count} times" for at, count in wrong[:10])
                newest = max((row for row in rows.values() if row.schedule_id == schedule_id), key=_due, default=None)
                yield f"schedule {schedule_id}: {len(wrong)} of {len(due)} occurrences, {told}; the newest is {newest}"

    def _strangers(self, received: Sequence[Received], rows: Mapping[UUID, Row]) -> Iterator[str]:
        known = self.once | self.never.keys() | {timer_id for one in self.cancels for timer_id in one.timer_ids}
        for one in received:
            if one.timer_id not in known and one.schedule_id not in self.chains:
                yield f"came, and nobody had asked for it: {_told(one.timer_id, rows)}"


def _first_few(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"… and {more:,} more like these"] if more > 0 else [])]


def _wrong_cancel(cancel: Cancel, times: Counter[UUID], rows: Mapping[UUID, Row]) -> Iterator[str]:
    fired = {timer_id for timer_id in cancel.timer_ids if times[timer_id]}
    for timer_id in cancel.timer_ids:
        if times[timer_id] > 1:
            yield f"came {times[timer_id]} times: {_told(timer_id, rows)}"
        wanted = State.FIRED if timer_id in fired else State.CANCELLED
        if timer_id not in rows or rows[timer_id].state is not wanted:
            yield f"came {times[timer_id]} times and is not {wanted.name}: {_told(timer_id, rows)}"
    if cancel.changed is None or cancel.returned_at is None:
        yield f"the cancel of {cancel.entity} has not returned"
        return
    if cancel.changed + len(fired) != len(cancel.timer_ids):
        yield (
            f"the cancel of {cancel.entity} says {cancel.changed} of {len(cancel.timer_ids)}, and {len(fired)} came:"
            f" {_all_told(cancel.timer_ids, rows)}"
        )
    for timer_id in fired:
        if timer_id in rows and rows[timer_id].due_at > cancel.returned_at + CLOCK_SLACK:
            yield f"came after its cancel had returned at {cancel.returned_at:%T.%f}: {_told(timer_id, rows)}"


def _told(timer_id: UUID, rows: Mapping[UUID, Row]) -> str:
    return str(rows.get(timer_id, f"{timer_id}, which has no row"))


def _all_told(timer_ids: Collection[UUID], rows: Mapping[UUID, Row]) -> str:
    return "; ".join(_told(timer_id, rows) for timer_id in sorted(timer_ids))


def _due(row: Row) -> datetime:
    return row.due_at
