"""What tests rely on: that nothing of an earlier test comes to them."""

from libs.jetstream import Bus
from tests.support.fixtures import streams_of, without_streams


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
