"""What tests rely on: that nothing of an earlier test comes to them, and that their tables are the real ones."""

import pytest
from pydantic import SecretStr

from libs.jetstream import Bus
from libs.migrations import upgrade
from libs.settings import PostgresSettings
from local.stack import PROJECT, SERVICES
from tests.support.fixtures import fresh_database, streams_of, without_streams
from tests.support.schemas import create_tables, described


async def _make(bus: Bus, *names: str) -> None:
    for name in names:
        await bus.ensure_stream(name, [f"{name}.*"])


async def test_a_stream_that_was_left_behind_does_not_come_to_the_next_test(nats_url: str, bus: Bus) -> None:
    """Made after an earlier test's end, it is gone at the beginning; what was there before the run stays."""
    await _make(bus, "FOREIGN", "LEFT_BEHIND")
    async with without_streams(nats_url, but=["FOREIGN"]):
        assert await streams_of(nats_url) == {"FOREIGN"}
        await _make(bus, "OWN")
    assert await streams_of(nats_url) == {"FOREIGN"}


@pytest.mark.parametrize("service", SERVICES)
def test_tables_are_created_as_migrations_leave_them(postgres_url: str, postgres_server_url: str, service: str) -> None:
    """Columns, defaults, constraints, indexes, sequences and the revision are the same."""
    create_tables(postgres_url, service)
    with fresh_database(postgres_server_url) as migrated_url:
        settings = PostgresSettings(url=SecretStr(migrated_url))
        upgrade(settings, service, PROJECT / "services" / service / "migrations")
        assert described(postgres_url, service) == described(migrated_url, service)
