"""Expansion: frames of notifications become items (INV-6), in a fixed number of statements for each slice of them.

Notifications are copied in; one INSERT … SELECT decides on every (notification, subscriber, choice) and puts the
verdicts into a session's temporary table (store_deciding); from there they become items, once all have their windows.

**No item lands in a window that has begun to close** (INV-7). Windows are locked FOR SHARE, in the order of their ids,
before their items are inserted; whoever closes one needs it exclusively. So closing waits for inserts under way, and an
expansion that waited for a closing finds the window no longer open: all go round again, to the next ones.
Rolling windows come after the others, and are locked exclusively: see store_rolling.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg import AsyncCursor

from libs.errors import Unavailable
from libs.postgres import Transaction
from libs.recurrence import BadRule
from services.digest import store_history, store_traces
from services.digest.boundaries import Boundaries, LocalRule
from services.digest.catalog import ItemState, WindowKind
from services.digest.commands import Expanded, Notification, Verdict, WindowTimer
from services.digest.payload_schemas import PayloadSchemas
from services.digest.store_arrivals import count_items, take_over
from services.digest.store_deciding import SCRATCH, decide
from services.digest.store_filters import apply_filters
from services.digest.store_rolling import place_in_rolling
from services.digest.store_slices import TooManyItems, slices

_PENDING = ItemState.PENDING
_TRIES = 5
_SMALL_FRAME = 20
"""Notifications up to which statements are planned once and kept."""
_ANALYZED_ITEMS = 1_000
"""From so many items on, Postgres is told how many there are before it plans; a few it plans well without."""

_COUNT = "SELECT state, kind, reason, filter <> '', count(*) FROM expansion GROUP BY 1, 2, 3, 4"

# Sent alone: the window holds one item and is closing from the start, so that everything leaves by the same door.
_OPEN_ALONE = """
    INSERT INTO digest_window (tenant, id, subscriber, cadence, channel, format, style, kind, priority, rule, batch,
        slot_at, opened_at, due_at, state)
    SELECT tenant, window_id, subscriber, cadence, channel, format, style, kind, priority, '', '', %(now)s, %(now)s,
        %(now)s, 2
    FROM expansion WHERE state = 1 AND kind = 1"""

_SPANS = """
    SELECT rule, zone, min(occurred_at), max(occurred_at)
    FROM expansion WHERE state = 1 AND kind = 2 GROUP BY rule, zone"""

# A rule without a next time: refused when it is put, but zones and years do end.
_GIVE_UP = """
    UPDATE expansion SET state = 4, reason = 'cadence_over'
    WHERE state = 1 AND kind = 2 AND (rule, zone) IN (SELECT * FROM unnest(%(rules)s::text[], %(zones)s::text[]))"""

_PUT_BOUNDARIES = """
    INSERT INTO boundary
    SELECT * FROM unnest(%(rules)s::text[], %(zones)s::text[], %(starts)s::timestamptz[], %(ends)s::timestamptz[])"""

_OPEN_WINDOW = """
        SELECT w.id, w.ctid FROM digest_window w
        WHERE w.tenant = e.tenant AND w.subscriber = e.subscriber AND w.cadence = e.cadence AND w.channel = e.channel
        AND w.format = e.format AND w.style = e.style AND w.state = 1 AND w.slot_at = """

# The window that is open, and where its row is; or an id for one to be opened, without a place.
_WINDOW_OR_NEW: LiteralString = (
    "(SELECT coalesce(f.id, uuidv7()), f.ctid FROM (SELECT) AS one LEFT JOIN ("  # noqa: S608 - put together from constants.
    + _OPEN_WINDOW
)

# Its own boundary, and the window there.
_PLACE: LiteralString = (
    "UPDATE expansion e SET slot_at = b.end_at, (window_id, place) = "  # noqa: S608 - put together from constants.
    + _WINDOW_OR_NEW
    + """b.end_at) AS f ON true)
    FROM boundary b
    WHERE e.state = 1 AND e.kind = 2 AND b.rule = e.rule AND b.zone = e.zone
    AND b.start_at <= e.occurred_at AND e.occurred_at < b.end_at"""
)

# Its boundary has passed and the window there is no longer open: then the first boundary after now.
_PLACE_LATE: LiteralString = (
    "UPDATE expansion e SET slot_at = b.end_at, (window_id, place) = "  # noqa: S608 - put together from constants.
    + _WINDOW_OR_NEW
    + """b.end_at) AS f ON true)
    FROM boundary b
    WHERE e.state = 1 AND e.kind = 2 AND b.rule = e.rule AND b.zone = e.zone
    AND b.start_at <= %(now)s AND %(now)s < b.end_at
    AND (e.slot_at IS NULL OR e.slot_at <= %(now)s AND e.place IS NULL)"""
)

_PLACE_EXTERNAL: LiteralString = (
    "UPDATE expansion e SET (window_id, place) = "  # noqa: S608 - put together from constants.
    + _WINDOW_OR_NEW
    + "e.slot_at) AS f ON true) WHERE state = 1 AND kind = 3"
)

# In the order of the unique index, so that two replicas opening the same windows do not wait for each other crosswise.
_OPEN = """
    WITH missing AS MATERIALIZED (
        SELECT tenant, (array_agg(window_id ORDER BY window_id))[1] AS id, subscriber, cadence, channel, format, style,
            min(kind) AS kind, CASE WHEN min(kind) = 2 AND NOT bool_and(is_fixed) THEN min(rule) ELSE '' END AS rule,
            CASE WHEN min(kind) = 3 THEN min(batch) ELSE '' END AS batch,
            slot_at, least(%(now)s, min(occurred_at)) AS opened_at,
            CASE WHEN min(kind) = 3 THEN %(now)s + min(fallback_after) ELSE slot_at END AS due_at, count(*) AS items
        FROM expansion WHERE state = 1 AND kind IN (2, 3) AND place IS NULL
        GROUP BY tenant, subscriber, cadence, channel, format, style, slot_at
        ORDER BY tenant, subscriber, cadence, channel, format, style, slot_at
    ), opened AS (
        INSERT INTO digest_window (tenant, id, subscriber, cadence, channel, format, style, kind, rule, batch,
            slot_at, opened_at, due_at, state)
        SELECT tenant, id, subscriber, cadence, channel, format, style, kind, rule, batch, slot_at, opened_at, due_at, 1
        FROM missing
        ON CONFLICT (tenant, subscriber, cadence, channel, format, style, slot_at) WHERE state = 1 DO NOTHING
        RETURNING tenant, id, due_at)
    SELECT total.windows, total.items, opened.tenant, opened.id, opened.due_at
    FROM (SELECT count(*) AS windows, sum(items)::bigint AS items FROM missing) AS total LEFT JOIN opened ON true"""

# Several items for one window to be opened have an id each so far; the window has the first.
_SHARE = """
    UPDATE expansion e SET window_id = same.id
    FROM (
        SELECT ctid AS item, window_id, first_value(window_id) OVER (
            PARTITION BY tenant, subscriber, cadence, channel, format, style, slot_at ORDER BY window_id) AS id
        FROM expansion WHERE state = 1 AND kind IN (2, 3) AND place IS NULL) AS same
    WHERE e.ctid = same.item AND e.window_id <> same.id"""

# One look-up in the unique index for each item; as a join, it would be at the mercy of a guess about seven columns.
_FIND: LiteralString = (
    "UPDATE expansion e SET (window_id, place) = ("  # noqa: S608 - put together from constants.
    + _OPEN_WINDOW
    + "e.slot_at) WHERE state = 1 AND kind IN (2, 3) AND place IS NULL"
)

# Windows are locked where they were found, without another look-up: one that has changed since is no longer there, and
# somebody else's row may be by now; then all is looked for again. Those that were opened here nobody else sees yet.
_HOLD = """
    WITH wanted AS MATERIALIZED (
        SELECT DISTINCT window_id, tenant, place FROM expansion
        WHERE state = 1 AND kind IN (2, 3) AND (place IS NOT NULL OR window_id IS NULL) ORDER BY window_id
    ), held AS MATERIALIZED (
        SELECT FROM wanted CROSS JOIN LATERAL (
            SELECT FROM digest_window w
            WHERE w.ctid = wanted.place AND w.tenant = wanted.tenant AND w.id = wanted.window_id AND w.state = 1
            FOR SHARE))
    SELECT (SELECT count(*) FROM held) = (SELECT count(*) FROM wanted)"""

_FILL = """
    INSERT INTO item (tenant, notification_id, subscriber, choice, state, reason, window_id, changed_at)
    SELECT tenant, notification_id, subscriber, choice, state, reason, window_id, %(now)s FROM expansion"""

# Released, because savepoints that pile up make everybody's snapshots dear; emptied where the tables' files were made,
# outside of it, because only then Postgres empties them at once and not at the end of the transaction.
_NEXT_SLICE = "RELEASE SAVEPOINT slice; TRUNCATE expansion, boundary"


async def expand(
    tx: Transaction,
    notifications: Sequence[Notification],
    *,
    now: datetime,
    boundaries: Boundaries,
    schemas: PayloadSchemas,
    is_group: bool,
) -> Expanded:
    """Turn notifications into items; those taken over before change nothing. The caller holds their entities' locks.

    Those whose payloads their types' schemas do not allow are suppressed, and told by `Expanded.refused`. With
    `is_group`, several frames' notifications, raises TooManyItems when they are more than a slice.
    """
    fresh, refused = await take_over(tx, notifications, now=now, schemas=schemas)
    if not fresh:
        return Expanded(refused=refused)
    await tx.raw.execute(SCRATCH)
    run = _Statements(tx, now, is_small=len(fresh) <= _SMALL_FRAME)
    parts = await slices(run, fresh)
    is_sliced = len(parts) > 1
    if is_sliced and is_group:
        raise TooManyItems
    timers: list[WindowTimer] = []
    verdicts: Counter[Verdict] = Counter()
    for part in parts:
        if is_sliced:
            await tx.raw.execute("SAVEPOINT slice")
        opened, tally = await _expand_slice(run, part, refused, boundaries)
        timers += opened
        verdicts += tally.verdicts()
        if is_sliced:
            await tx.raw.execute(_NEXT_SLICE)
    return Expanded(notifications=len(fresh), timers=timers, verdicts=verdicts, refused=refused)


async def _expand_slice(
    run: "_Statements",
    fresh: Sequence[Notification],
    refused: Mapping[tuple[str, UUID], str],
    boundaries: Boundaries,
) -> tuple[Sequence[WindowTimer], "_Tally"]:
    """Items for notifications that have just been stored; the scratch tables are empty, and are left full."""
    tx = run.tx
    await decide(run, fresh, refused)
    tally = await _count(run)
    if tally.is_filtered:
        await apply_filters(run, fresh)
        tally = await _count(run)
    spans = _Spans()
    if tally.waiting(WindowKind.ALIGNED):
        spans = await _put_boundaries(run, boundaries)
        if spans.is_any_over:
            tally = await _count(run)
    await count_items(tx, fresh, tally.items.total())
    rolling = tally.waiting(WindowKind.ROLLING)
    if rolling >= _ANALYZED_ITEMS:
        await tx.raw.execute("ANALYZE expansion")
    timers = await store_traces.traced(tx, await _fill_windows(run, tally, spans), fresh)
    if rolling or tally.waiting(WindowKind.ALONE):
        await run(_OPEN_ALONE)
        await store_traces.mark_alone(tx, fresh)
    await run(_FILL)
    if tally.is_any_settled:
        await store_history.settled_at_once(tx, now=run.now)
    return timers, tally


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spans:
    """Whether items of rules that have no next time were given up, and whether some came after their windows' ends."""

    is_any_over: bool = False
    is_any_late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tally:
    """How many items have which state, kind of window and reason; whether a filter has a say in any."""

    items: Counter[tuple[ItemState, WindowKind, str]]
    is_filtered: bool

    def waiting(self, *kinds: WindowKind) -> int:
        """Items that are pending, for windows of these kinds."""
        return sum(count for (state, kind, _), count in self.items.items() if state is _PENDING and kind in kinds)

    @property
    def is_any_settled(self) -> bool:
        """Whether some are not pending."""
        return any(state is not _PENDING for state, _, _ in self.items)

    def verdicts(self) -> Counter[Verdict]:
        """As metrics count them."""
        found: Counter[Verdict] = Counter()
        for (state, kind, reason), count in self.items.items():
            found[Verdict(state=state, is_alone=kind is WindowKind.ALONE, reason=reason)] += count
        return found


@dataclass(frozen=True, slots=True)
class _Statements:
    """Runs this module's statements. What is planned once must not serve frames of one and of 64,000 notifications."""

    tx: Transaction
    now: datetime
    is_small: bool

    async def __call__(self, statement: LiteralString, **values: object) -> AsyncCursor[tuple[Any, ...]]:
        return await self.tx.raw.execute(
            statement, {"now": self.now, **values}, prepare=None if self.is_small else False, binary=True
        )


async def _count(run: _Statements) -> _Tally:
    items: Counter[tuple[ItemState, WindowKind, str]] = Counter()
    is_filtered = False
    for state, kind, reason, has_filter, count in await (await run(_COUNT)).fetchall():
        items[ItemState(state), WindowKind(kind), reason] += count
        is_filtered |= has_filter
    return _Tally(items=items, is_filtered=is_filtered)


async def _fill_windows(run: _Statements, tally: _Tally, spans: _Spans) -> list[WindowTimer]:
    """Put what waits into open windows, opening those that are missing; returns the timers of new ones.

    Where one has closed meanwhile, everything is let go before the next try: whoever waits for another's window, or
    for another to open one, must hold none that somebody waits for.
    """
    rolling = tally.waiting(WindowKind.ROLLING)
    others = tally.waiting(WindowKind.ALIGNED, WindowKind.EXTERNAL)
    if not others and not rolling:
        return []
    await run("SAVEPOINT before_windows")
    for _ in range(_TRIES):
        timers = await _fill_others(run, tally, spans) if others else []
        if timers is not None and rolling:
            more = await place_in_rolling(run, rolling)
            timers = None if more is None else timers + more
        if timers is not None:
            return timers
        await run("ROLLBACK TO SAVEPOINT before_windows")
    raise Unavailable(f"Items found their windows closing {_TRIES} times over; they will come again.")


async def _fill_others(run: _Statements, tally: _Tally, spans: _Spans) -> list[WindowTimer] | None:
    """All items, into windows other than rolling ones; None if one closed meanwhile."""
    if tally.waiting(WindowKind.ALIGNED):
        await run(_PLACE)
    if spans.is_any_late:
        await run(_PLACE_LATE)
    if tally.waiting(WindowKind.EXTERNAL):
        await run(_PLACE_EXTERNAL)
    rows = await (await run(_OPEN)).fetchall()
    missing, items, *_ = rows[0]
    opened = [
        WindowTimer(tenant=tenant, window_id=window_id, due_at=due) for _, _, tenant, window_id, due in rows if tenant
    ]
    if len(opened) < missing:  # Others were opening the same ones, and have committed.
        await run(_FIND)
    elif missing and items > missing:
        await run(_SHARE)
    return opened if await (await run(_HOLD)).fetchone() == (True,) else None


async def _put_boundaries(run: _Statements, boundaries: Boundaries) -> _Spans:
    """Compute the windows' ends, which SQL cannot, for all rules and zones."""
    is_any_late = False
    known: list[tuple[str, str, datetime, datetime]] = []
    over: list[tuple[str, str]] = []
    for rule, zone, first, last in await (await run(_SPANS)).fetchall():
        try:
            intervals = boundaries.covering(local_rule(rule, zone), first, last, run.now)
        except BadRule:
            intervals = []
        known += [(rule, zone, one.start, one.end) for one in intervals]
        if not intervals or intervals[-1].end <= run.now:
            over.append((rule, zone))
        elif intervals[0].end <= run.now or intervals[-1].end <= last:
            is_any_late = True
    if known:
        rules, zones, starts, ends = zip(*known, strict=True)
        await run(_PUT_BOUNDARIES, rules=list(rules), zones=list(zones), starts=list(starts), ends=list(ends))
    if over:
        rules, zones = zip(*over, strict=True)
        await run(_GIVE_UP, rules=list(rules), zones=list(zones))
    return _Spans(is_any_over=bool(over), is_any_late=is_any_late)


def local_rule(rule: str, zone: str) -> LocalRule:
    """A rule as the tables write it (cron:… or rrule:…), in a zone."""
    kind, _, text = rule.partition(":")
    return LocalRule(cron=text if kind == "cron" else "", rrule=text if kind == "rrule" else "", zone=zone)
