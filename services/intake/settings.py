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
    answer_margin: Duration = Field(
        timedelta(milliseconds=100),
        ge=timedelta(0),
        le=timedelta(seconds=10),
        description="So long before the caller's deadline waiting for APPLIED ends, to leave time for the answer.",
    )


@dataclass(frozen=True)
class ServiceSettings(BaseSettings):
    """Everything that can be set for the process."""

    intake: IntakeSettings
