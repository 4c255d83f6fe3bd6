"""The scheduler's own settings."""

from dataclasses import dataclass
from datetime import timedelta

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from libs.service import BaseSettings
from libs.settings import Duration
from libs.settings import Settings as Group
from libs.settings_services import BusinessServices

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
    history_retention: Duration = Field(
        timedelta(days=90),
        ge=timedelta(hours=1),
        le=timedelta(days=3650),
        description="How long timers that fired or ended otherwise can still be looked up, in business time. What is "
        "derived (a timeline's start, a backfill) is recognised as a repetition for as long. Facts are kept "
        "until their caller removes them.",
    )
    lanes: int = Field(
        2,
        ge=1,
        le=16,
        description="Transactions of turns under way at once, each for a part of the shards: while Postgres works for "
        "one, this process decides the next. Each takes a connection.",
    )
    max_mailbox_frames: int = Field(
        1_024,
        ge=1,
        le=100_000,
        description="Frames in memory waiting for their shard's turn; NATS keeps the others (INV-9).",
    )
    events_max_age: Duration = Field(
        timedelta(days=7),
        ge=timedelta(minutes=1),
        le=timedelta(days=365),
        description="JetStream drops events from the stream EVENTS after this: how long a business service may be "
        "away without missing one.",
    )
    events_max_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        le=1 << 44,
        description="Size limit of the stream EVENTS, in bytes, which JetStream sets aside; 1 GiB holds about a "
        "million small events. At the limit the oldest are dropped, so leave room for a week's.",
    )
    events_max_backlog: int = Field(
        100_000,
        ge=1,
        le=100_000_000,
        description="Events that may wait in Postgres for JetStream; then nothing fires until there are fewer "
        "(INV-9). At 66 KiB each that is 7 GB at the very worst, and normally below 200 MB.",
    )
    condition_services: BusinessServices = Field(
        {},
        description="The business services that may decide conditions, a JSON object of names (1-64 characters of "
        '[a-z0-9._-]) and http or https URLs: `{"crm": "https://crm.example/carillon"}`. They are asked by POST; '
        "credentials do not belong in a URL, use condition_token. All replicas must agree.",
    )
    condition_token: SecretStr | None = Field(
        None,
        min_length=1,
        description="Sent to each of them as `Authorization: Bearer`. Not set: nothing is.",
    )
    condition_concurrency: int = Field(
        64,
        ge=1,
        le=1_000,
        description="Questions under way to each of them at once, per process. 10,000 more wait in memory (32 MiB at "
        "most); the rest is asked later, from Postgres.",
    )


@dataclass(frozen=True)
class Settings(BaseSettings):
    """All settings of the scheduler."""

    scheduler: SchedulerSettings
