"""The scheduler's own settings."""

from dataclasses import dataclass
from datetime import timedelta

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from libs.service import BaseSettings
from libs.settings import Duration
from libs.settings import Settings as Group

SECOND = timedelta(seconds=1)


class SchedulerSettings(Group):
    """Leases, and how much one replica takes on at once."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_SCHEDULER_")

    lease_ttl: Duration = Field(
        5 * SECOND,
        ge=SECOND,
        le=timedelta(minutes=5),
        description="How long a shard's lease holds without renewal: the longest a crashed replica's timers wait. "
        "Renewed three times as often, so shorter costs more transactions and forgives shorter pauses.",
    )
    wheel_timers: int = Field(
        32_768,
        ge=64,
        le=10_000_000,
        description="Timers one replica reads ahead over all its shards; up to twice as many are in memory (about "
        "1 KiB each). The rest waits in Postgres.",
    )
    turn_timers: int = Field(
        2_000,
        ge=1,
        le=100_000,
        description="Timers fired in one transaction at most: large enough to pay for the commit, small enough that "
        "commands and renewals are never kept waiting.",
    )
    turn_entries: int = Field(
        4_000,
        ge=1,
        le=100_000,
        description="Entries of arriving frames handled in one transaction, at least one frame.",
    )
    max_mailbox_frames: int = Field(
        1_024,
        ge=1,
        le=100_000,
        description="Frames in memory waiting for their shard's turn; NATS keeps the others (INV-9).",
    )


@dataclass(frozen=True)
class Settings(BaseSettings):
    """All settings of the scheduler."""

    scheduler: SchedulerSettings
