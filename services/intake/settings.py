"""What can be set for intake, beside what all services have."""

from dataclasses import dataclass
from datetime import timedelta

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from libs.service import BaseSettings
from libs.settings import Duration, Settings


class IntakeSettings(Settings):
    """Intake."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_INTAKE_")

    idempotency_retention: Duration = Field(
        timedelta(days=7),
        ge=timedelta(hours=1),
        le=timedelta(days=365),
        description="How long an idempotency key is remembered with its answer, on the database's clock. The contract "
        "says 7 days; longer costs disk, shorter breaks callers that retry late.",
    )
    prune_interval: Duration = Field(
        timedelta(minutes=1),
        ge=timedelta(milliseconds=10),
        le=timedelta(days=1),
        description="How often each process forgets idempotency keys older than that.",
    )
    request_retention: Duration = Field(
        timedelta(days=90),
        ge=timedelta(hours=1),
        le=timedelta(days=3650),
        description="How long requests that are over can still be looked up with their responses, in business time "
        "from their answer-by date (INV-9).",
    )
    answer_margin: Duration = Field(
        timedelta(milliseconds=100),
        ge=timedelta(0),
        le=timedelta(seconds=10),
        description="So long before the caller's deadline waiting for APPLIED ends, to leave time for the answer.",
    )
    tenant_rate: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Items per second that each process takes of one tenant; then its unary calls are "
        "RESOURCE_EXHAUSTED with the delay, and its streams are held back. Each process counts for itself: behind n "
        "replicas a tenant gets up to n times as much. 0: no limit, because one tenant alone should not be slowed.",
    )
    tenant_burst: int = Field(
        10_000,
        ge=1_000,
        le=100_000_000,
        description="Items of one tenant that may come at once before tenant_rate counts. At least 1,000, the largest "
        "call.",
    )
    tenant_backlog: int = Field(
        50_000,
        ge=1,
        le=100_000_000,
        description="Frames of one tenant that may be without a receipt, over all links and replicas, looked at every "
        "second; then its commands are RESOURCE_EXHAUSTED (INV-9). Half of CARILLON_LINK_MAX_UNCONFIRMED_FRAMES, so "
        "that one tenant alone does not fill a link for all.",
    )


@dataclass(frozen=True)
class ServiceSettings(BaseSettings):
    """Everything that can be set for the process."""

    intake: IntakeSettings
