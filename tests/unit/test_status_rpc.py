"""A process says of itself what it knows."""

from datetime import UTC, datetime
from typing import Any

import pytest
from carillon.link.v1 import status_pb2

from libs.links.status_rpc import StatusRpc

NOON = datetime(2026, 12, 1, 12, tzinfo=UTC)


class Around:
    """Clock, NATS and Postgres at once."""

    def __init__(self, *, is_connected: bool, is_alive: bool) -> None:
        self.is_connected, self._is_alive = is_connected, is_alive

    def now(self) -> datetime:
        """It stands."""
        return NOON

    async def is_alive(self) -> bool:
        """See Database."""
        return self._is_alive


@pytest.mark.parametrize(("is_connected", "is_alive"), [(True, True), (False, True), (True, False)])
async def test_a_status_says_how_it_is_now(is_connected: bool, is_alive: bool) -> None:
    """Business time, NATS and Postgres are looked at for each call; who it is stays."""
    around: Any = Around(is_connected=is_connected, is_alive=is_alive)
    rpc = StatusRpc(
        service="digest", replica="d-1", version="1.2", clock=around, is_test_clock=True, bus=around, db=around
    )
    context: Any = None
    answer = await rpc.GetStatus(status_pb2.GetStatusRequest(), context)
    assert (answer.service, answer.replica, answer.version) == ("digest", "d-1", "1.2")
    assert (answer.is_nats_connected, answer.is_postgres_alive) == (is_connected, is_alive)
    assert (answer.time.ToDatetime(tzinfo=UTC), answer.is_test_clock) == (NOON, True)
