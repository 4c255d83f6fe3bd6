"""Which windows are waited for, and when, while others are set aside for business services."""

import asyncio
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest

from libs.postgres import Database, Transaction
from services.digest.catalog import Channel, Subscriber, WindowKind
from services.digest.formatting import Formatted, Order
from services.digest.loops_aside import Aside
from services.digest.rendering_jobs import Line
from services.digest.windows import ClosingWindow

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
TX = cast(Transaction, None)


def window(number: int) -> ClosingWindow:
    """One with an item that crm formats."""
    return ClosingWindow(
        tenant="acme",
        id=UUID(int=number),
        kind=WindowKind.ALONE,
        subscriber_id="ann",
        subscriber=Subscriber(id="ann", email="ann@example.com"),
        cadence="immediate",
        cadence_name="",
        channel=Channel.EMAIL,
        format="text",
        style="full",
        lines=[Line("n", "order.placed", "Order placed", "", "", NOW.isoformat(), "{}")],
        services={"order.placed": "crm"},
    )


class Windows:
    """Six that are closing; says how they were claimed, and how many were set aside."""

    def __init__(self) -> None:
        self.closing = [window(number) for number in range(6)]
        self.claims: list[str] = []
        self.set_aside_ids: list[UUID] = []

    async def claim(self, tx: Transaction, *, most_windows: int, **_: Any) -> list[ClosingWindow]:
        self.claims.append("skipping")
        taken, self.closing = self.closing[:most_windows], self.closing[most_windows:]
        return taken

    async def claim_these(
        self, tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], **_: Any
    ) -> list[ClosingWindow]:
        self.claims.append("waiting")
        return [window(one.int) for one in ids]

    async def set_aside(self, tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], lease: timedelta) -> None:
        self.set_aside_ids += ids

    async def give_back(self, tx: Transaction, tenants: Collection[str], ids: Sequence[UUID]) -> None: ...


class Silent:
    """A formatter that fails, so that there is room again and no answer."""

    patience = timedelta(seconds=1)

    def known(self, order: Order) -> Formatted | None:
        return None

    async def format(self, orders: Sequence[Order]) -> list[Formatted]:
        raise ConnectionError("gone")


async def test_windows_are_waited_for_only_while_none_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups' turns have come: the first is waited for and set aside, so the second is left to the next time."""
    monkeypatch.setattr("services.digest.loops_aside._GROUP_ITEMS", 1)
    monkeypatch.setattr("services.digest.loops_aside.MOST_ITEMS", 2)
    windows = Windows()
    aside = Aside(db=cast(Database, None), claims=windows, store=windows, formatter=Silent(), ring=lambda: None)

    async def claim() -> list[str]:
        windows.claims.clear()
        assert await aside.claim(TX, most_windows=10, most_items=10, now=NOW) == []
        await asyncio.gather(*aside._tasks)
        return list(windows.claims)

    assert await claim() == ["skipping", "skipping"]
    assert len(windows.set_aside_ids) == 6
    for _ in range(4):
        assert await claim() == ["waiting", "skipping"]
    assert await claim() == ["skipping"]


async def test_what_no_service_formats_is_not_set_aside() -> None:
    """Whoever has nothing to ask waits for nobody."""
    windows = Windows()
    plain = [
        ClosingWindow(**{name: getattr(one, name) for name in one.__slots__} | {"services": {}})
        for one in windows.closing
    ]
    windows.closing = list(plain)
    aside = Aside(db=cast(Database, None), claims=windows, store=windows, formatter=Silent(), ring=lambda: None)
    assert await aside.claim(TX, most_windows=10, most_items=10, now=NOW) == plain
    assert windows.set_aside_ids == []
