"""Rolling windows within an expansion: opened by their first item, kept open by further ones, closed when full.

A window remembers the rule it was opened with: how much an item keeps it open (`extension`), when it closes at the
latest (`latest_at`), how many items make it full (`full_at`), and how many it has been given (`placed`; those that
were cancelled meanwhile count too). So its due time depends on how many items came, not on how they came in frames.

Items change their window, so it is locked exclusively, not shared as those of other kinds. Where a frame holds more
items than a window has room for, whole windows that are full from the start are made of the rest, and what is still
left opens the next one: the number of statements does not depend on the number of items.

With a leading cadence the first item of every window goes out alone; it counts among the `placed`.

Timers: a window asks for one when it opens. When that comes and the window is due later by now, it asks again (see
store_windows.close); so items that keep it open cost no timers.
"""

from services.digest.commands import WindowTimer
from services.digest.store_filters import Statements

_OPEN = """
    INSERT INTO digest_window (tenant, id, subscriber, cadence, channel, format, style, kind, rule, batch,
        slot_at, opened_at, due_at, state, extension, latest_at, full_at)
    SELECT tenant, uuidv7(), subscriber, cadence, channel, format, style, 4, '', '',
        slot_at, least(%(now)s, min(occurred_at)), %(now)s + min(duration), 1, min(extension), %(now)s + min(cap),
        min(full_at)
    FROM expansion WHERE state = 1 AND kind = 4
    GROUP BY tenant, subscriber, cadence, channel, format, style, slot_at
    ORDER BY tenant, subscriber, cadence, channel, format, style, slot_at
    ON CONFLICT (tenant, subscriber, cadence, channel, format, style, slot_at) WHERE state = 1 DO NOTHING
    RETURNING tenant, id, due_at"""

_FIND = """
    UPDATE expansion e SET window_id = (
        SELECT w.id FROM digest_window w
        WHERE w.tenant = e.tenant AND w.subscriber = e.subscriber AND w.cadence = e.cadence AND w.channel = e.channel
        AND w.format = e.format AND w.style = e.style AND w.slot_at = e.slot_at AND w.state = 1)
    WHERE state = 1 AND kind = 4"""

# Whether all are open still, now that they are locked.
_LOCK = """
    WITH locked AS MATERIALIZED (
        SELECT w.tenant, w.id, w.state FROM digest_window w
        JOIN (SELECT DISTINCT tenant, window_id FROM expansion WHERE state = 1 AND kind = 4) AS wanted
            ON w.tenant = wanted.tenant AND w.id = wanted.window_id
        ORDER BY w.id FOR NO KEY UPDATE OF w)
    SELECT NOT EXISTS (
        SELECT FROM expansion e WHERE e.state = 1 AND e.kind = 4 AND NOT EXISTS (
            SELECT FROM locked l WHERE l.tenant = e.tenant AND l.id = e.window_id AND l.state = 1))"""

# Rows become 6: in the window found; 5: in a window of their own, full from the start; 1: leading, sent alone. The
# rest that fills no window stays 4.
_PLACE = """
    WITH arriving AS (
        SELECT tenant, window_id, count(*)::int AS items FROM expansion WHERE state = 1 AND kind = 4 GROUP BY 1, 2
    ), touched AS (
        UPDATE digest_window w SET
            placed = least(w.placed + a.items, w.full_at),
            due_at = CASE WHEN w.placed + a.items >= w.full_at THEN %(now)s ELSE least(w.latest_at, w.due_at
                + coalesce(w.extension, interval '0') * (w.placed + a.items - greatest(w.placed, 1))) END,
            state = CASE WHEN w.placed + a.items >= w.full_at THEN 2 ELSE 1 END
        FROM arriving a WHERE w.tenant = a.tenant AND w.id = a.window_id AND w.state = 1
        RETURNING w.id, old.placed AS before, w.full_at
    ), numbered AS (
        SELECT e.ctid AS place, e.window_id, e.lead_style, e.full_at AS size, t.full_at,
            t.before + row_number() OVER (PARTITION BY e.window_id ORDER BY e.occurred_at, e.notification_id) - 1
            AS number
        FROM expansion e JOIN touched t ON t.id = e.window_id WHERE e.state = 1 AND e.kind = 4
    ), parted AS (
        SELECT place, window_id, lead_style, size,
            CASE WHEN number < full_at OR full_at IS NULL THEN 0
                ELSE 1 + coalesce((number - full_at) / size, 0) END AS part,
            CASE WHEN number < full_at OR full_at IS NULL THEN number
                ELSE coalesce((number - full_at) %% size, number - full_at) END AS number
        FROM numbered
    ), counted AS MATERIALIZED (
        SELECT *, part > 0 AND count(*) OVER (PARTITION BY window_id, part) = coalesce(size, 0) AS is_full FROM parted
    ), own AS MATERIALIZED (
        SELECT window_id, part, uuidv7() AS id FROM counted WHERE is_full GROUP BY 1, 2
    ), decided AS (
        SELECT c.place, c.lead_style, c.number = 0 AND c.lead_style IS NOT NULL AS is_lead,
            c.part, o.id AS own_id
        FROM counted c LEFT JOIN own o ON o.window_id = c.window_id AND o.part = c.part
        WHERE c.part = 0 OR c.is_full
    )
    UPDATE expansion e SET
        kind = CASE WHEN d.is_lead THEN 1 WHEN d.part = 0 THEN 6 ELSE 5 END,
        window_id = CASE WHEN d.is_lead THEN uuidv7() WHEN d.part = 0 THEN e.window_id ELSE d.own_id END,
        cadence = CASE WHEN d.is_lead THEN 'immediate' ELSE e.cadence END,
        style = CASE WHEN d.is_lead THEN d.lead_style ELSE e.style END
    FROM decided d WHERE e.ctid = d.place"""

_OPEN_FULL = """
    INSERT INTO digest_window (tenant, id, subscriber, cadence, channel, format, style, kind, rule, batch,
        slot_at, opened_at, due_at, state, placed)
    SELECT tenant, window_id, subscriber, cadence, channel, format, style, 4, '', '',
        slot_at, least(%(now)s, min(occurred_at)), %(now)s, 2, count(*)
    FROM expansion WHERE state = 1 AND kind = 5
    GROUP BY tenant, window_id, subscriber, cadence, channel, format, style, slot_at"""


async def place_in_rolling(run: Statements, waiting: int) -> list[WindowTimer] | None:
    """Give `waiting` items their rolling windows; returns the timers of those opened.

    The scratch table then says which window each is in; the caller writes the items. The windows stay locked. None: a
    window closed meanwhile. The caller must then roll back and begin again, so that nobody waits holding windows.
    """
    timers: list[WindowTimer] = []
    while True:  # Twice at most: for the windows that are open, and for the rest once these are full.
        opened = await (await run(_OPEN)).fetchall()
        timers += [WindowTimer(tenant=tenant, window_id=window_id, due_at=due) for tenant, window_id, due in opened]
        await run(_FIND)
        if (await (await run(_LOCK)).fetchone()) != (True,):
            return None
        waiting -= (await run(_PLACE)).rowcount
        if not waiting:
            break
    await run(_OPEN_FULL)
    return timers
