"""What a reader unsubscribes from: digest says so in each delivery, and what is mandatory is on no list."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with two types, of which one is mandatory, a daily cadence and a subscriber."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type("flight.delayed")
        await rig.put_type("account.locked", is_mandatory=True)
        await rig.put_daily()
        await rig.put_subscriber("ann")
        yield rig


async def next_day(rig: Rig) -> list[str]:
    """The lists of all that has left once the daily digests have."""
    rig.clock.at = datetime(2026, 3, 3, 8, tzinfo=UTC)
    await rig.due()
    await rig.close()
    return [delivery.list_id for delivery in await rig.deliveries()]


async def test_what_is_sent_alone_is_on_the_list_of_its_type(rig: Rig) -> None:
    """And nothing mandatory is on one."""
    await rig.apply(rig.notification("ann"))
    await rig.close()
    await rig.apply(rig.notification("ann", type="account.locked"))
    await rig.close()
    assert [delivery.list_id for delivery in await rig.deliveries()] == ["type:flight.delayed", ""]


async def test_a_digest_is_on_the_list_of_its_cadence(rig: Rig) -> None:
    """Whatever types are in it."""
    await rig.subscribe("ann", "daily")
    await rig.apply(rig.notification("ann"), rig.notification("ann"))
    assert await next_day(rig) == ["cadence:daily"]


async def test_a_digest_with_something_mandatory_in_it_is_on_no_list(rig: Rig) -> None:
    """It goes out whatever its reader has unsubscribed from, so it must not promise otherwise."""
    await rig.subscribe("ann", "daily")
    await rig.subscribe("ann", "daily", type="account.locked")
    await rig.apply(rig.notification("ann"), rig.notification("ann", type="account.locked"))
    assert await next_day(rig) == [""]
