"""Expansion: frames of notifications become items (INV-6), in a fixed number of statements whatever their number.

Notifications are copied in; one INSERT … SELECT decides on every (notification, subscriber, choice) and puts the
verdicts into a session's temporary table; from there they become items, together with the windows they wait in.

**No item lands in a window that has begun to close** (INV-7). Windows are locked FOR SHARE, in the order of their ids,
in the statement that inserts their items; whoever closes one needs it exclusively. So closing waits for inserts under
way, and an insert that waited for a closing finds the window no longer open: all go round again, to the next ones.
Rolling windows come after the others, and are locked exclusively: see store_rolling.

Matching: directly told subscribers by their subscriptions without a topic, a topic's by those with it. Of these the
most specific type wins, exact before the longest prefix; without any, those told directly get the type's default.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg import AsyncCursor

from libs.errors import Unavailable
from libs.postgres import Transaction
from libs.recurrence import BadRule
from services.digest import store_history
from services.digest.boundaries import Boundaries, LocalRule
from services.digest.catalog import ItemState, WindowKind
from services.digest.commands import Expanded, Notification, Verdict, WindowTimer
from services.digest.payload_schemas import PayloadSchemas
from services.digest.store_arrivals import take_over
from services.digest.store_filters import apply_filters
from services.digest.store_rolling import place_in_rolling

_PENDING = ItemState.PENDING
_TRIES = 5
_SMALL_FRAME = 20
"""Notifications up to which statements are planned once and kept."""
_ANALYZED_ITEMS = 1_000
"""From so many items on, Postgres is told how many there are before it plans; a few it plans well without."""

# Emptied by Postgres itself at the end of each transaction; no statistics, no locks, no log.
_SCRATCH = """
    CREATE TEMPORARY TABLE IF NOT EXISTS expansion (
        tenant text, notification_id uuid, subscriber text, choice text, state smallint, reason text, kind smallint,
        priority smallint, cadence text, channel text, format text, style text, rule text, is_fixed boolean, zone text,
        batch text, fallback_after interval, occurred_at timestamptz, window_id uuid, slot_at timestamptz, filter text,
        duration interval, extension interval, cap interval, full_at integer, lead_style text)
        ON COMMIT DELETE ROWS;
    CREATE TEMPORARY TABLE IF NOT EXISTS boundary (
        rule text, zone text, start_at timestamptz, end_at timestamptz) ON COMMIT DELETE ROWS"""

_DECIDE = """
    WITH arrived AS MATERIALIZED (
        SELECT n.tenant, n.id, n.type, n.occurred_at, n.priority, n.subscribers, n.topics,
            t.id IS NOT NULL AS is_known, coalesce(t.is_mandatory, false) AS is_mandatory,
            coalesce(t.default_cadence, '') AS default_cadence, coalesce(t.default_channel, '') AS default_channel,
            coalesce(n.expires_at <= %(now)s, false) AS is_expired, fresh.is_refused,
            n.sequence > 0 AND EXISTS (
                SELECT FROM tombstone b
                WHERE b.tenant = n.tenant AND b.entity = n.entity AND n.entity <> '' AND b.sequence > n.sequence
                AND b.type IN ('', n.type, n.timer_type) AND b.timeline IN ('', n.timeline)
                AND (b.timer_ids = '{}' OR b.timer_ids && ARRAY[n.timer_id, n.schedule_id])) AS is_cancelled
        FROM unnest(%(tenants)s::text[], %(ids)s::uuid[], %(refused)s::boolean[]) AS fresh (tenant, id, is_refused)
        JOIN notification n ON n.tenant = fresh.tenant AND n.id = fresh.id
        LEFT JOIN notification_type t ON t.tenant = n.tenant AND t.id = n.type
    ), named AS MATERIALIZED (
        SELECT DISTINCT a.tenant, a.id, a.type, told.subscriber
        FROM arrived a CROSS JOIN unnest(a.subscribers) AS told (subscriber)
    ), topical AS MATERIALIZED (
        SELECT DISTINCT a.tenant, a.id, a.type, told.topic FROM arrived a CROSS JOIN unnest(a.topics) AS told (topic)
    ), matching AS (
        SELECT n.tenant, n.id, c.topic, c.subscriber, c.cadence, c.channel, c.format, c.style, c.is_prefix, c.type,
            c.filter
        FROM named n JOIN choice c ON c.tenant = n.tenant AND c.topic = '' AND c.subscriber = n.subscriber
        WHERE CASE WHEN c.is_prefix THEN starts_with(n.type, c.type) ELSE n.type = c.type END
        UNION ALL
        SELECT t.tenant, t.id, c.topic, c.subscriber, c.cadence, c.channel, c.format, c.style, c.is_prefix, c.type,
            c.filter
        FROM topical t JOIN choice c ON c.tenant = t.tenant AND c.topic = t.topic AND c.topic <> ''
        WHERE CASE WHEN c.is_prefix THEN starts_with(t.type, c.type) ELSE t.type = c.type END
    ), matched AS MATERIALIZED (
        SELECT *, rank() OVER (
            PARTITION BY tenant, id, topic, subscriber ORDER BY is_prefix, length(type) DESC) AS place
        FROM matching
    ), chosen AS (
        SELECT tenant, id, subscriber, cadence, channel, format, style, filter, '' AS unheard
        FROM matched WHERE place = 1
        UNION ALL
        SELECT tenant, id, subscriber, '', '', '', '', '', '' FROM named n WHERE NOT EXISTS (
            SELECT FROM matched m
            WHERE m.tenant = n.tenant AND m.id = n.id AND m.subscriber = n.subscriber AND m.topic = '')
        UNION ALL
        SELECT tenant, id, '', '', '', '', '', '', topic FROM topical t WHERE NOT EXISTS (
            SELECT FROM matched m WHERE m.tenant = t.tenant AND m.id = t.id AND m.topic = t.topic)
    ), settled AS (
        SELECT c.tenant, c.id, c.subscriber, c.unheard, c.format, c.style, a.occurred_at, a.priority,
            a.is_known, a.is_expired, a.is_cancelled, a.is_refused,
            CASE WHEN c.cadence = '' OR c.cadence = 'off' AND a.is_mandatory THEN a.default_cadence
                ELSE c.cadence END AS cadence,
            CASE WHEN a.is_mandatory THEN '' ELSE c.filter END AS filter,
            CASE c.channel WHEN '' THEN a.default_channel ELSE c.channel END AS channel
        FROM chosen c JOIN arrived a ON a.tenant = c.tenant AND a.id = c.id
    ), written AS (
        SELECT s.tenant, s.id, s.subscriber, s.unheard, s.occurred_at, s.priority, s.is_known, s.is_expired,
            s.is_cancelled, s.is_refused, s.cadence, s.channel, s.filter,
            CASE WHEN s.format <> '' THEN s.format
                ELSE CASE s.channel WHEN 'email' THEN 'html' WHEN 'webhook' THEN 'json' ELSE 'text' END END AS format,
            CASE WHEN s.style <> '' THEN s.style
                ELSE CASE s.cadence WHEN 'immediate' THEN 'full' ELSE 'summary' END END AS style,
            r.id IS NOT NULL AS is_subscriber,
            CASE s.channel WHEN 'email' THEN r.email WHEN 'webhook' THEN r.webhook_url
                WHEN 'apprise' THEN r.apprise_url ELSE r.id END AS address,
            coalesce(k.kind, 1) AS kind, k.id IS NOT NULL AS is_cadence,
            CASE WHEN k.cron <> '' THEN 'cron:' || k.cron ELSE 'rrule:' || k.rrule END AS rule,
            k.zone <> '' AS is_fixed, coalesce(nullif(k.zone, ''), r.zone) AS zone,
            coalesce(k.batch, '') AS batch, k.fallback_after,
            k.duration, k.extension, coalesce(k.cap, k.duration * 4) AS cap,
            k.maximum_items + k.is_leading::int AS full_at,
            CASE WHEN k.is_leading THEN coalesce(nullif(s.style, ''), 'full') END AS lead_style
        FROM settled s
        LEFT JOIN subscriber r ON r.tenant = s.tenant AND r.id = s.subscriber
        LEFT JOIN cadence k ON k.tenant = s.tenant AND k.id = s.cadence
    ), judged AS (
        SELECT *, CASE
            WHEN is_cancelled THEN 'cancelled'
            WHEN is_expired THEN 'expired'
            WHEN is_refused THEN 'payload_invalid'
            WHEN unheard <> '' THEN 'no_subscriber'
            WHEN NOT is_known THEN 'unknown_type'
            WHEN NOT is_subscriber THEN 'unknown_subscriber'
            WHEN cadence = 'off' THEN 'off'
            WHEN address = '' THEN 'no_address'
            WHEN NOT is_cadence AND cadence <> 'immediate' THEN 'unknown_cadence'
            ELSE '' END AS reason
        FROM written
    ), verdicts AS (
        SELECT DISTINCT tenant, id, subscriber,
            CASE WHEN unheard <> '' THEN 'topic:' || unheard
                ELSE concat_ws('/', cadence, channel, format, style) END AS choice,
            CASE reason WHEN '' THEN 1 WHEN 'cancelled' THEN 5 WHEN 'expired' THEN 6 ELSE 4 END AS state,
            CASE WHEN reason IN ('cancelled', 'expired') THEN '' ELSE reason END AS reason,
            kind, priority, cadence, channel, format, style, rule, is_fixed, zone, batch, fallback_after, occurred_at,
            filter, duration, extension, cap, full_at, lead_style
        FROM judged
    )
    INSERT INTO expansion
    SELECT tenant, id, subscriber, choice, state, reason, kind, priority, cadence, channel, format, style, rule,
        is_fixed, zone, batch, fallback_after, occurred_at, CASE WHEN state = 1 AND kind = 1 THEN uuidv7() END,
        CASE WHEN kind IN (3, 4) THEN timestamptz 'epoch' END, filter, duration, extension, cap, full_at, lead_style
    FROM verdicts"""

_COUNT = "SELECT state, kind, reason, filter <> '', count(*) FROM expansion GROUP BY 1, 2, 3, 4"

# Sent alone: the window holds one item and is closing from the start, so that everything leaves by the same door.
_OPEN_ALONE = """
    INSERT INTO digest_window (tenant, id, subscriber, cadence, channel, format, style, kind, priority, rule, batch,
        slot_at, opened_at, due_at, state)
    SELECT tenant, window_id, subscriber, cadence, channel, format, style, kind, priority, '', '', %(now)s, %(now)s,
        %(now)s, 2
    FROM expansion WHERE state = 1 AND kind = 1"""

_SETTLE = """
    INSERT INTO item (tenant, notification_id, subscriber, choice, state, reason, window_id, changed_at)
    SELECT tenant, notification_id, subscriber, choice, state, reason, window_id, %(now)s
    FROM expansion WHERE state <> 1 OR kind NOT IN (2, 3)"""

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

# Its own boundary, unless that has passed and its window is no longer open; then the first one after now.
_PLACE = """
    UPDATE expansion e SET slot_at = coalesce(
        (SELECT min(b.end_at) FROM boundary b
         WHERE b.rule = e.rule AND b.zone = e.zone AND b.start_at <= e.occurred_at AND e.occurred_at < b.end_at
         AND (b.end_at > %(now)s OR EXISTS (
            SELECT FROM digest_window w
            WHERE w.tenant = e.tenant AND w.subscriber = e.subscriber AND w.cadence = e.cadence
            AND w.channel = e.channel AND w.format = e.format AND w.style = e.style
            AND w.slot_at = b.end_at AND w.state = 1))),
        (SELECT min(b.end_at) FROM boundary b WHERE b.rule = e.rule AND b.zone = e.zone AND b.end_at > %(now)s))
    WHERE state = 1 AND kind = 2"""

# In the order of the unique index, so that two replicas opening the same windows do not wait for each other crosswise.
_OPEN = """
    INSERT INTO digest_window (tenant, id, subscriber, cadence, channel, format, style, kind, rule, batch,
        slot_at, opened_at, due_at, state)
    SELECT tenant, uuidv7(), subscriber, cadence, channel, format, style, min(kind),
        CASE WHEN min(kind) = 2 AND NOT bool_and(is_fixed) THEN min(rule) ELSE '' END,
        CASE WHEN min(kind) = 3 THEN min(batch) ELSE '' END,
        slot_at, least(%(now)s, min(occurred_at)),
        CASE WHEN min(kind) = 3 THEN %(now)s + min(fallback_after) ELSE slot_at END AS due_at, 1
    FROM expansion WHERE state = 1 AND kind IN (2, 3) AND window_id IS NULL
    GROUP BY tenant, subscriber, cadence, channel, format, style, slot_at
    ORDER BY tenant, subscriber, cadence, channel, format, style, slot_at
    ON CONFLICT (tenant, subscriber, cadence, channel, format, style, slot_at) WHERE state = 1 DO NOTHING
    RETURNING tenant, id, due_at"""

# One look-up in the unique index for each item; as a join, it would be at the mercy of a guess about seven columns.
_FIND = """
    UPDATE expansion e SET window_id = (
        SELECT w.id FROM digest_window w
        WHERE w.tenant = e.tenant AND w.subscriber = e.subscriber AND w.cadence = e.cadence AND w.channel = e.channel
        AND w.format = e.format AND w.style = e.style AND w.slot_at = e.slot_at AND w.state = 1)
    WHERE state = 1 AND kind IN (2, 3) AND window_id IS NULL"""

_FILL = """
    WITH open AS MATERIALIZED (
        SELECT w.id FROM digest_window w
        JOIN (SELECT DISTINCT tenant, window_id FROM expansion WHERE state = 1 AND kind IN (2, 3)) AS wanted
            ON w.tenant = wanted.tenant AND w.id = wanted.window_id
        WHERE w.state = 1 ORDER BY w.id FOR SHARE OF w)
    INSERT INTO item (tenant, notification_id, subscriber, choice, state, reason, window_id, changed_at)
    SELECT e.tenant, e.notification_id, e.subscriber, e.choice, 1, '', e.window_id, %(now)s
    FROM expansion e JOIN open ON open.id = e.window_id WHERE e.state = 1 AND e.kind IN (2, 3)"""


async def expand(
    tx: Transaction,
    notifications: Sequence[Notification],
    *,
    now: datetime,
    boundaries: Boundaries,
    schemas: PayloadSchemas,
) -> Expanded:
    """Turn notifications into items; those taken over before change nothing. The caller holds their entities' locks.

    Those whose payloads their types' schemas do not allow are suppressed, and told by `Expanded.refused`.
    """
    fresh, refused = await take_over(tx, notifications, now=now, schemas=schemas)
    if not fresh:
        return Expanded(refused=refused)
    await tx.raw.execute(_SCRATCH)
    run = _Statements(tx, now, is_small=len(fresh) <= _SMALL_FRAME)
    await run(
        _DECIDE,
        tenants=[one.tenant for one in fresh],
        ids=[one.id for one in fresh],
        refused=[(one.tenant, one.id) in refused for one in fresh] if refused else [False] * len(fresh),
    )
    tally = await _count(run)
    if tally.is_filtered:
        await apply_filters(run, fresh)
        tally = await _count(run)
    if tally.waiting(WindowKind.ALIGNED) and await _put_boundaries(run, boundaries):
        tally = await _count(run)
    if tally.items.total() >= _ANALYZED_ITEMS:
        await tx.raw.execute("ANALYZE expansion")
    timers = await _fill_windows(run, tally)
    rolling = tally.waiting(WindowKind.ROLLING)
    if rolling or tally.waiting(WindowKind.ALONE):
        await run(_OPEN_ALONE)
    if rolling or tally.waiting(WindowKind.ALONE) or tally.is_any_settled:
        await run(_SETTLE)
    if tally.is_any_settled:
        await store_history.settled_at_once(tx, now=now)
    return Expanded(notifications=len(fresh), timers=timers, verdicts=tally.verdicts(), refused=refused)


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
            statement, {"now": self.now, **values}, prepare=None if self.is_small else False
        )


async def _count(run: _Statements) -> _Tally:
    items: Counter[tuple[ItemState, WindowKind, str]] = Counter()
    is_filtered = False
    for state, kind, reason, has_filter, count in await (await run(_COUNT)).fetchall():
        items[ItemState(state), WindowKind(kind), reason] += count
        is_filtered |= has_filter
    return _Tally(items=items, is_filtered=is_filtered)


async def _fill_windows(run: _Statements, tally: _Tally) -> list[WindowTimer]:
    """Put what waits into open windows, opening those that are missing; returns the timers of new ones.

    Where one has closed meanwhile, everything is let go before the next try: whoever waits for another's window, or
    for another to open one, must hold none that somebody waits for.
    """
    aligned = tally.waiting(WindowKind.ALIGNED, WindowKind.EXTERNAL)
    rolling = tally.waiting(WindowKind.ROLLING)
    if not aligned and not rolling:
        return []
    await run("SAVEPOINT before_windows")
    for _ in range(_TRIES):
        timers = await _fill_aligned(run, aligned) if aligned else []
        if timers is not None and rolling:
            more = await place_in_rolling(run, rolling)
            timers = None if more is None else timers + more
        if timers is not None:
            return timers
        await run("ROLLBACK TO SAVEPOINT before_windows")
    raise Unavailable(f"Items found their windows closing {_TRIES} times over; they will come again.")


async def _fill_aligned(run: _Statements, waiting: int) -> list[WindowTimer] | None:
    """All items, into windows other than rolling ones; None if one closed meanwhile."""
    await run(_PLACE)
    await run(_FIND)
    opened = await (await run(_OPEN)).fetchall()
    await run(_FIND)
    if (await run(_FILL)).rowcount < waiting:
        return None
    return [WindowTimer(tenant=tenant, window_id=window_id, due_at=due) for tenant, window_id, due in opened]


async def _put_boundaries(run: _Statements, boundaries: Boundaries) -> bool:
    """Compute the windows' ends, which SQL cannot, for all rules and zones; returns whether items were given up."""
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
    if known:
        rules, zones, starts, ends = zip(*known, strict=True)
        await run(_PUT_BOUNDARIES, rules=list(rules), zones=list(zones), starts=list(starts), ends=list(ends))
    if over:
        rules, zones = zip(*over, strict=True)
        await run(_GIVE_UP, rules=list(rules), zones=list(zones))
    return bool(over)


def local_rule(rule: str, zone: str) -> LocalRule:
    """A rule as the tables write it (cron:… or rrule:…), in a zone."""
    kind, _, text = rule.partition(":")
    return LocalRule(cron=text if kind == "cron" else "", rrule=text if kind == "rrule" else "", zone=zone)
