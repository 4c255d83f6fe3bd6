"""The settings of the digest service."""

from dataclasses import dataclass
from datetime import timedelta

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from libs.service import BaseSettings
from libs.settings import Duration, Settings
from libs.settings_services import BusinessServices

_SECOND = timedelta(seconds=1)


class DigestSettings(Settings):
    """Closing windows and rendering digests."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_DIGEST_")

    render_workers: int = Field(
        2,
        ge=1,
        le=64,
        description="Rendering processes, each fed by a loop of its own that claims windows. One renders while the "
        "other's loop talks to Postgres, so two keep one core busy; more help where there are more cores.",
    )
    render_windows: int = Field(
        200,
        ge=1,
        le=5_000,
        description="Windows closed in one transaction at most; they are locked while they are rendered.",
    )
    render_items: int = Field(
        5_000,
        ge=1,
        le=1_000_000,
        description="Items in the windows closed in one transaction at most; a larger window is closed alone. Bounds "
        "memory (about 3 KiB per item) and how long a Cancel waits.",
    )
    render_timeout: Duration = Field(
        2 * _SECOND,
        ge=100 * timedelta(milliseconds=1),
        le=60 * _SECOND,
        description="Processor time that rendering one digest may take, plus 1 ms per item. Then its rendering process "
        "is ended and the built-in templates stand in. Below CARILLON_POSTGRES_LOCK_TIMEOUT: a Cancel may wait.",
    )
    render_memory_bytes: int = Field(
        1 << 30,
        ge=256 << 20,
        le=64 << 30,
        description="Address space of each rendering process in bytes; beyond it a template fails and the built-in one "
        "stands in.",
    )
    poll_interval: Duration = Field(
        timedelta(milliseconds=200),
        ge=timedelta(milliseconds=5),
        le=10 * _SECOND,
        description="How often to look for windows that other replicas began to close, in real time. What this process "
        "closes itself is rendered at once.",
    )

    formatting_services: BusinessServices = Field(
        {},
        description="The business services that may format items, a JSON object of names (1-64 characters of "
        '[a-z0-9._-]) and http or https URLs: `{"crm": "https://crm.example/notifications"}`. They are asked by POST; '
        "credentials do not belong in a URL, use formatting_token. All replicas must agree.",
    )
    formatting_token: SecretStr | None = Field(
        None,
        min_length=1,
        description="Sent to each of them as `Authorization: Bearer`. Not set: nothing is.",
    )
    formatting_timeout: Duration = Field(
        3 * _SECOND,
        ge=100 * timedelta(milliseconds=1),
        le=15 * _SECOND,
        description="How long a service may take for one request, one repetition included. Then templates write. A "
        "digest waits three times as long at most, and not at all for a service that has failed five times in a row, "
        "until half a minute later.",
    )
    formatting_concurrency: int = Field(
        8,
        ge=1,
        le=1_000,
        description="Requests under way to each of them at once, per process, of up to 50 items each. About 2,000 "
        "items wait for them in memory; the rest waits in Postgres and holds up nothing else.",
    )
    formatting_cache_bytes: int = Field(
        32 << 20,
        ge=0,
        le=16 << 30,
        description="Size in bytes of what is remembered of their answers, per process, five minutes long: an item "
        "that goes to many is asked about once for each language, zone and style.",
    )


@dataclass(frozen=True)
class DigestServiceSettings(BaseSettings):
    """Everything the digest service is set by."""

    digest: DigestSettings
