"""Settings: typed, from the environment, every error reported at once.

Each group is a class whose fields are read from `CARILLON_<GROUP>_<FIELD>`; nothing else in Carillon reads the
environment. An empty variable counts as not set. Durations are written `30s`, `1h30m`, `250ms`, `7d` (d, h, m, s, ms,
us) or as ISO 8601 (`PT30S`); a bare number is refused, because nobody remembers its unit. Secrets are SecretStr and
never appear in a message. A service combines groups in a frozen dataclass and gets it whole from `load`.

docs/settings.md is generated from the descriptions here by `libs.settings_doc`.
"""

from datetime import timedelta
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from libs.settings_base import (
    DAY,
    HOUR,
    MILLISECOND,
    MINUTE,
    SECOND,
    CommaSeparated,
    Duration,
    Settings,
    format_duration,
    groups_of,
    load,
    load_or_exit,
    parse_duration,
)
from libs.settings_edges import (
    TENANT_PATTERN,
    AuthMode,
    AuthSettings,
    GrpcSettings,
    HttpSettings,
    LogFormat,
    LogLevel,
    ReflectionMode,
    TelemetrySettings,
    TlsMode,
)

__all__ = [
    "TENANT_PATTERN",
    "AuthMode",
    "AuthSettings",
    "ClockSettings",
    "CommaSeparated",
    "Duration",
    "GrpcSettings",
    "HttpSettings",
    "LinkSettings",
    "LogFormat",
    "LogLevel",
    "NatsSettings",
    "PostgresSettings",
    "ReflectionMode",
    "Settings",
    "ShardSettings",
    "TelemetrySettings",
    "TlsMode",
    "format_duration",
    "groups_of",
    "load",
    "load_or_exit",
    "parse_duration",
]


class PostgresSettings(Settings):
    """Postgres: where the truth is (rule R1)."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_POSTGRES_")

    url: SecretStr = Field(
        description="Where Postgres is: `postgresql://user:password@host:port/database`. No default: a service must "
        "not start on a database nobody chose. May be the same for all services; each uses its own schema."
    )
    pool_size: int = Field(
        8,
        ge=1,
        le=200,
        description="Connections each process holds at most. A process commits in groups, so a few are enough; more "
        "connections over all processes than Postgres's max_connections makes start-up fail.",
    )
    pool_timeout: Duration = Field(
        10 * SECOND,
        ge=10 * MILLISECOND,
        le=5 * MINUTE,
        description="How long a transaction waits for a free connection before it is refused as UNAVAILABLE.",
    )
    connect_timeout: Duration = Field(
        10 * SECOND,
        ge=SECOND,
        le=5 * MINUTE,
        description="How long one attempt to connect may take, in whole seconds. Long enough for a failover's DNS.",
    )
    statement_timeout: Duration = Field(
        30 * SECOND,
        ge=timedelta(0),
        le=HOUR,
        description="Postgres cancels a statement that runs longer. Far above every statement we know; it stops what "
        "went wrong. 0s: no limit.",
    )
    lock_timeout: Duration = Field(
        5 * SECOND,
        ge=timedelta(0),
        le=HOUR,
        description="Postgres gives up waiting for a lock after this, in migrations too, so that a migration never "
        "queues the whole service behind itself. 0s: wait until statement_timeout.",
    )
    idle_in_transaction_timeout: Duration = Field(
        MINUTE,
        ge=timedelta(0),
        le=HOUR,
        description="Postgres ends a session that holds a transaction open and does nothing; a paused process must not "
        "hold locks for ever. 0s: no limit.",
    )
    migration_timeout: Duration = Field(
        10 * MINUTE,
        ge=SECOND,
        le=DAY,
        description="statement_timeout while migrating, and how long a process waits for another one's migration.",
    )

    @field_validator("url")
    @classmethod
    def _is_postgres(cls, url: SecretStr) -> SecretStr:
        if urlsplit(url.get_secret_value()).scheme not in {"postgresql", "postgres"}:
            raise ValueError("must be a postgresql:// URL without a driver name")
        return url


class NatsSettings(Settings):
    """NATS with JetStream: what carries frames between services. It may lose everything at any time (rule R1)."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_NATS_")

    url: CommaSeparated = Field(
        ("nats://127.0.0.1:4222",),
        min_length=1,
        description="NATS servers, comma separated: `nats://host:port` or `tls://host:port`. Credentials do not belong "
        "here, because addresses are logged; use the settings below.",
    )
    user: str | None = Field(None, description="User name, with password. Not set: none is sent.")
    password: SecretStr | None = Field(None, description="Password of user.")
    token: SecretStr | None = Field(None, description="Token, instead of user and password.")
    creds_file: Path | None = Field(None, description="A .creds file (JWT and nkey seed), instead of user or token.")
    tls_ca_file: Path | None = Field(None, description="PEM with the CAs that may sign NATS. Not set: the system's.")
    tls_cert_file: Path | None = Field(None, description="PEM with our client certificate, where NATS asks for one.")
    tls_key_file: Path | None = Field(None, description="PEM with the key of tls_cert_file.")
    connect_timeout: Duration = Field(
        5 * SECOND, ge=SECOND, le=MINUTE, description="How long one attempt to connect may take; attempts never end."
    )
    publish_timeout: Duration = Field(
        5 * SECOND,
        ge=100 * MILLISECOND,
        le=MINUTE,
        description="How long to wait for JetStream's acknowledgement. Then the sweeper takes over; nothing is lost.",
    )
    stream_max_age: Duration = Field(
        DAY,
        ge=MINUTE,
        le=30 * DAY,
        description="JetStream drops frames older than this. Postgres still has them and republishes, so it only "
        "bounds the disk. Must stay below CARILLON_LINK_INBOX_RETENTION, or a frame could be applied twice.",
    )
    stream_max_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        le=1 << 44,
        description="Size limit of each stream, in bytes. At the limit frames wait in the outbox.",
    )
    stream_replicas: int = Field(
        1,
        ge=1,
        le=5,
        description="Copies JetStream keeps of each stream. 1, because nothing depends on it; 3 in a cluster saves the "
        "republishing after a node's loss.",
    )

    @field_validator("url")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in {"nats", "tls", "ws", "wss"} or not parts.hostname:
                raise ValueError("each must look like nats://host:port or tls://host:port")
            if parts.username or parts.password:
                raise ValueError("must not hold credentials; use the user, password, token or creds_file setting")
        return urls


class ClockSettings(Settings):
    """Business time (rule R3)."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_CLOCK_")

    test: bool = Field(
        False,
        validation_alias="CARILLON_TEST_CLOCK",
        description="`on`: the test clock's row in Postgres (origin and rate) drives business time, for trials and "
        "demos. `off`: the database's clock does. All services must agree.",
    )
    resync: Duration = Field(
        10 * SECOND,
        ge=100 * MILLISECOND,
        le=10 * MINUTE,
        description="How often the offset to the database's clock is measured again; quartz drifts under 1 ms in 10 s.",
    )


class LinkSettings(Settings):
    """The links between services (rule R2). Frames are up to 1,000 entries and 512 KiB; that is fixed."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_LINK_")

    sweep_interval: Duration = Field(
        SECOND, ge=10 * MILLISECOND, le=MINUTE, description="How often each process looks for frames without a receipt."
    )
    sweep_frames: int = Field(500, ge=1, le=10_000, description="Frames republished in one sweep at most (INV-9).")
    republish_after: Duration = Field(
        2 * SECOND,
        ge=50 * MILLISECOND,
        le=HOUR,
        description="How long a frame waits for its receipt before it is published again; doubled each time. Well "
        "above a normal round trip, which is milliseconds.",
    )
    republish_max: Duration = Field(
        MINUTE, ge=50 * MILLISECOND, le=DAY, description="The longest wait between two publications of one frame."
    )
    receipt_timeout: Duration = Field(
        10 * SECOND,
        ge=10 * MILLISECOND,
        le=10 * MINUTE,
        description="How long a caller waits for APPLIED at most, within its own deadline; then the answer is "
        "`accepted, not yet applied`.",
    )
    fetch_frames: int = Field(
        64, ge=1, le=1000, description="Frames a receiver takes at once, and applies in one transaction where it can."
    )
    max_unconfirmed_frames: int = Field(
        100_000,
        ge=1,
        le=100_000_000,
        description="Frames one link may hold without a receipt; then new commands are RESOURCE_EXHAUSTED (INV-9). At "
        "512 KiB each that is 50 GB at the very worst, and normally far below 1 GB.",
    )
    inbox_retention: Duration = Field(
        7 * DAY,
        ge=HOUR,
        le=365 * DAY,
        description="How long a receiver remembers the ids of frames it has applied. Must exceed any time after which "
        "a frame could still arrive: CARILLON_NATS_STREAM_MAX_AGE and restores of old backups. Dead frames can be "
        "redriven for as long.",
    )

    @property
    def tombstone_retention(self) -> timedelta:
        """How long what a cancel forbids may still come. A frame's age is by its sender's clock, so some more."""
        return self.inbox_retention + timedelta(hours=1)

    @model_validator(mode="after")
    def _backoff_grows(self) -> Self:
        if self.republish_after > self.republish_max:
            raise ValueError("republish_after must not be longer than republish_max")
        return self


class ShardSettings(Settings):
    """How the scheduler's entities are sliced."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_SHARD_")

    count: int = Field(
        16,
        ge=1,
        le=1024,
        validation_alias="CARILLON_SHARDS",
        description="Shards the entities are spread over, fixed at install and the same for all services. The upper "
        "limit of useful scheduler replicas; more shards mean smaller frames, each as costly as a dozen timers.",
    )
