"""What can be asked about timers and shards. Pure data."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.scheduler.timer import State


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFilter:
    """Which timers of a tenant. `states` may hold FIRED; empty parts select all. `until_at` is exclusive."""

    tenant: str
    entity: str = ""
    type: str = ""
    states: frozenset[State] = frozenset()
    from_at: datetime | None = None
    until_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a page of timers ended."""

    shard: int
    fire_at: datetime
    timer_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSummary:
    """A shard and one tenant's timers in it. `pending` and `due` are exact below 10,000."""

    number: int
    holder: str
    epoch: int
    lease_until: datetime | None
    watermark_at: datetime
    pending: int
    due: int
