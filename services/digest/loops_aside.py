"""Windows whose items a business service formats wait here, so that no transaction does.

    claim ──▶ all remembered, or nothing to ask ──────────────────────▶ rendered in the same transaction
          └─▶ set aside (a lease in the row) ──▶ asked ──▶ answered ──▶ claimed by its id, rendered

Closing claims through this module. What must be asked is set aside in the claiming transaction and claimed again by its
id when the answers are there; meanwhile the next windows are claimed, so a slow service keeps only its own digests
waiting, and each of them no longer than Formatter.patience. Of each service only so many items are asked about at once;
windows beyond that wait by their ids alone, then (MOST_WAITING) only in Postgres until their lease ends.

Nothing here is a promise: the lease is only there so that nobody else does the same work. A process that dies, or a
transaction that fails after the answers came, costs the rest of the lease; a window that two processes have asked about
is closed by the one that locks it first (INV-7).
"""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol, Self
from uuid import UUID

from libs.errors import CarillonError
from libs.postgres import Database, Transaction
from libs.telemetry import traces
from libs.telemetry.logs import get_logger
from libs.trace_points import Point
from services.digest import metrics
from services.digest.formatting import Formatted, Order, services_in
from services.digest.windows import ClosingWindow, held_until, order_of, with_format, without_rendering

log = get_logger(__name__)

MOST_ITEMS: Final = 2_000
"""Items of windows that one service is asked about at once, unless one window alone has more."""
MOST_WAITING: Final = 20_000
"""Windows whose turn has not come, in memory by their ids."""

_GROUP_ITEMS: Final = 500
_ROUNDS: Final = 50
_SLACK: Final = timedelta(seconds=30)
"""How much longer than asking takes a window is left to us: for its turn, and for rendering it."""


class ClaimStore(Protocol):
    """See store_rendering."""

    async def claim(
        self, tx: Transaction, *, most_windows: int, most_items: int, now: datetime
    ) -> list[ClosingWindow]: ...
    async def claim_these(
        self, tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], *, now: datetime
    ) -> list[ClosingWindow]: ...


class AsideStore(Protocol):
    """See store_formatting."""

    async def set_aside(
        self, tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], lease: timedelta
    ) -> None: ...
    async def give_back(self, tx: Transaction, tenants: Collection[str], ids: Sequence[UUID]) -> None: ...


class Formatter(Protocol):
    """See loops_formatting."""

    @property
    def patience(self) -> timedelta: ...
    def known(self, order: Order) -> Formatted | None: ...
    async def format(self, orders: Sequence[Order]) -> list[Formatted]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Windows that need the same services: asked about, or waiting for that."""

    services: frozenset[str]
    tenants: Mapping[UUID, str]
    items: int
    traces: Sequence[Point] = ()


class Aside:
    """Claims windows for the closing loops of one process; use as `async with`."""

    def __init__(
        self, *, db: Database, claims: ClaimStore, store: AsideStore, formatter: Formatter, ring: Callable[[], None]
    ) -> None:
        """`ring` wakes the closing loops."""
        self._db, self._claims, self._store, self._formatter, self._ring = db, claims, store, formatter, ring
        self._answered: deque[tuple[_Group, Mapping[UUID, Formatted]]] = deque()
        self._waiting: deque[_Group] = deque()
        self._items: Counter[str] = Counter()
        self._ours: dict[UUID, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give back what is ours, so that nobody waits for the leases of a process that ended in peace."""
        ours = dict(self._ours)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if ours:
            with suppress(CarillonError):
                async with self._db.transaction() as tx:
                    await self._store.give_back(tx, set(ours.values()), list(ours))

    async def claim(self, tx: Transaction, *, most_windows: int, most_items: int, now: datetime) -> list[ClosingWindow]:
        """Lock windows that can be rendered now, those whose answers are there first; as store_rendering.claim.

        Windows are waited for only while none are locked: those set aside stay so until the commit, and who waits
        holding them may be waited for crosswise. What is claimed after that skips what others have locked.
        """
        while self._answered:
            if windows := await self._claim_answered(tx, now):
                return windows
        if (group := self._next_waiting()) is not None:
            windows = await self._claims.claim_these(tx, set(group.tenants.values()), list(group.tenants), now=now)
            if ready := await self._set_aside(tx, windows, now):
                return ready
        for _ in range(_ROUNDS):
            windows = await self._claims.claim(tx, most_windows=most_windows, most_items=most_items, now=now)
            if not windows:
                break
            if ready := await self._set_aside(tx, windows, now):
                return ready
        return []

    async def give_back(self, tx: Transaction, windows: Sequence[ClosingWindow]) -> None:
        """Let claimed windows be claimed again at once; what was answered about them is remembered, or asked again."""
        if asked := {one.id: one.tenant for one in windows if one.services}:
            await self._store.give_back(tx, set(asked.values()), list(asked))

    async def _claim_answered(self, tx: Transaction, now: datetime) -> list[ClosingWindow]:
        group, formatted = self._answered.popleft()
        self._forget(group)
        self._items.subtract(dict.fromkeys(group.services, group.items))
        windows = await self._claims.claim_these(tx, set(group.tenants.values()), list(group.tenants), now=now)
        return [with_format(one, formatted[one.id]) for one in windows]

    def _next_waiting(self) -> _Group | None:
        """A group whose turn has come, the oldest first."""
        for place, group in enumerate(self._waiting):
            if self._has_room(group):
                del self._waiting[place]
                self._forget(group)
                return group
        return None

    async def _set_aside(self, tx: Transaction, windows: Sequence[ClosingWindow], now: datetime) -> list[ClosingWindow]:
        """Those that can be rendered at once; the others are set aside."""
        ready: list[ClosingWindow] = []
        asides: list[tuple[ClosingWindow, Order]] = []
        for one in windows:
            if not one.services or without_rendering(one) or held_until(one, now=now) is not None:
                ready.append(one)
                continue
            order = order_of(one)
            if (known := self._formatter.known(order)) is not None:
                ready.append(with_format(one, known))
            else:
                asides.append((one, order))
        if asides:
            lease = self._formatter.patience + _SLACK
            ids = [one.id for one, _ in asides]
            await self._store.set_aside(tx, {one.tenant for one, _ in asides}, ids, lease)
            self._begin([(one, order) for one, order in asides if one.id not in self._ours])
        return ready

    def _begin(self, asides: Sequence[tuple[ClosingWindow, Order]]) -> None:
        """Ask at once, or have them wait. Asked before the caller has committed: whoever claims them waits for that."""
        for services, members in _grouped(asides):
            group = _Group(
                services=services,
                tenants={one.id: one.tenant for one, _ in members},
                items=sum(len(one.lines) for one, _ in members),
                traces=[one.trace for one, _ in members],
            )
            if self._has_room(group):
                self._items.update(dict.fromkeys(services, group.items))
                task = asyncio.create_task(self._ask(group, {one.id: order for one, order in members}))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif len(self._ours) < MOST_WAITING:
                self._waiting.append(group)
            else:
                continue
            self._ours |= group.tenants
        metrics.FORMATTING_WINDOWS.set(len(self._ours))

    async def _ask(self, group: _Group, orders: Mapping[UUID, Order]) -> None:
        try:
            with traces.doing(traces.begin("format digests", causes=group.traces)):
                formatted = await self._formatter.format(list(orders.values()))
        except BaseException as err:
            self._forget(group)
            self._items.subtract(dict.fromkeys(group.services, group.items))
            if isinstance(err, Exception):  # Outermost frame: they are claimed again when their lease ends.
                log.exception("Windows could not be formatted.", windows=len(orders))
                return
            raise
        self._answered.append((group, dict(zip(orders, formatted, strict=True))))
        self._ring()

    def _has_room(self, group: _Group) -> bool:
        return all(not self._items[one] or self._items[one] + group.items <= MOST_ITEMS for one in group.services)

    def _forget(self, group: _Group) -> None:
        for one_id in group.tenants:
            self._ours.pop(one_id, None)
        metrics.FORMATTING_WINDOWS.set(len(self._ours))


def _grouped(
    asides: Sequence[tuple[ClosingWindow, Order]],
) -> Iterator[tuple[frozenset[str], list[tuple[ClosingWindow, Order]]]]:
    """By the services that they need, some items together: what needs a slow one keeps nothing else."""
    by_services: defaultdict[frozenset[str], list[tuple[ClosingWindow, Order]]] = defaultdict(list)
    for one, order in asides:
        by_services[services_in(order)].append((one, order))
    for services, members in by_services.items():
        group: list[tuple[ClosingWindow, Order]] = []
        room = _GROUP_ITEMS
        for one, order in members:
            room -= len(one.lines)
            if group and room < 0:
                yield services, group
                group, room = [], _GROUP_ITEMS - len(one.lines)
            group.append((one, order))
        yield services, group
