"""What can be asked about timers and shards. Pure data."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Literal, TypeVar
from uuid import UUID

from services.scheduler.timer import State

Item = TypeVar("Item")

About = Literal["entity", "id", "schedule_id", "run_id"]
"""By what timers are looked up for an explanation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFilter:
    """Which timers of a tenant. `states` may hold FIRED; empty parts select all. `until_at` is exclusive.

    Timers that services set for themselves are only there if `is_internal_wanted`, or their entity is named.
    """

    tenant: str
    entity: str = ""
    type: str = ""
    states: frozenset[State] = frozenset()
    from_at: datetime | None = None
    until_at: datetime | None = None
    is_internal_wanted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a page of timers ended."""

    fire_at: datetime
    timer_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """Part of a list, in its order; `is_last`: nothing comes after it. Never empty unless it is the last."""

    items: Sequence[Item]
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSummary:
    """A shard and one tenant's timers in it.

    `pending`: timers whose turn is to come (`timer.HAS_TURN`); `due`: those of them whose turn has come and was not
    taken yet; `pending_internal`: those that services set for themselves. Paused and buffered timers have no turn.
    Exact below 10,000.
    """

    number: int
    holder: str
    epoch: int
    lease_until: datetime | None
    watermark_at: datetime
    pending: int
    due: int
    pending_internal: int
