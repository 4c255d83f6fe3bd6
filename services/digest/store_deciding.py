"""What becomes of each (notification, subscriber, choice): one INSERT … SELECT into a session's scratch table.

Matching: directly told subscribers by their subscriptions without a topic, a topic's by those with it. Of these the
most specific type wins, exact before the longest prefix; without any, those told directly get the type's default.

The tables it reads grow by the minute, so Postgres's statistics of them are always old, and a plan that joins or scans
whole tables costs more the more there is. Here each row is looked up by an index: OFFSET 0 keeps a look-up from being
made a join, and sequential scans are off for the transaction (scratch tables, without indexes, are scanned all the
same). So an item costs the same whether ten thousand windows are open or a million, but for the caches.
"""

from collections.abc import Mapping, Sequence
from uuid import UUID

from services.digest.commands import Notification
from services.digest.store_filters import Statements

# Emptied by Postgres itself at the end of each transaction; no statistics, no locks, no log.
SCRATCH = """
    CREATE TEMPORARY TABLE IF NOT EXISTS expansion (
        tenant text, notification_id uuid, subscriber text, choice text, state smallint, reason text, kind smallint,
        priority smallint, cadence text, channel text, format text, style text, rule text, is_fixed boolean, zone text,
        batch text, fallback_after interval, occurred_at timestamptz, window_id uuid, slot_at timestamptz, filter text,
        duration interval, extension interval, cap interval, full_at integer, lead_style text, place tid)
        ON COMMIT DELETE ROWS;
    CREATE TEMPORARY TABLE IF NOT EXISTS boundary (
        rule text, zone text, start_at timestamptz, end_at timestamptz) ON COMMIT DELETE ROWS;
    SET LOCAL enable_seqscan = off"""

# One look-up in an index for each row, whatever Postgres believes to know about tables that grow by the minute:
# OFFSET 0 keeps it from joining whole tables instead.
_DECIDE = """
    WITH arrived AS MATERIALIZED (
        SELECT fresh.number, n.tenant, n.id, n.type, n.occurred_at, n.priority, n.subscribers, n.topics,
            t.id IS NOT NULL AS is_known, coalesce(t.is_mandatory, false) AS is_mandatory,
            coalesce(t.default_cadence, '') AS default_cadence, coalesce(t.default_channel, '') AS default_channel,
            coalesce(n.expires_at <= %(now)s, false) AS is_expired,
            fresh.number = ANY (%(refused)s::bigint[]) AS is_refused,
            n.sequence > 0 AND EXISTS (
                SELECT FROM tombstone b
                WHERE b.tenant = n.tenant AND b.entity = n.entity AND n.entity <> '' AND b.sequence > n.sequence
                AND b.type IN ('', n.type, n.timer_type) AND b.timeline IN ('', n.timeline)
                AND (b.timer_ids = '{}' OR b.timer_ids && ARRAY[n.timer_id, n.schedule_id])) AS is_cancelled
        FROM unnest(%(ids)s::uuid[], %(places)s::int[]) WITH ORDINALITY AS fresh (id, place, number)
        CROSS JOIN LATERAL (
            SELECT * FROM notification
            WHERE tenant = (%(tenants)s::text[])[fresh.place] AND id = fresh.id OFFSET 0) AS n
        LEFT JOIN notification_type t ON t.tenant = n.tenant AND t.id = n.type
    ), named AS (
        SELECT number, tenant, type, unnest(subscribers) AS subscriber FROM arrived
    ), topical AS (
        SELECT number, tenant, type, unnest(topics) AS topic FROM arrived
    ), matched AS (
        SELECT n.number, '' AS topic, n.subscriber, c.type, c.is_prefix, c.cadence, c.channel, c.format, c.style,
            c.filter
        FROM named n LEFT JOIN LATERAL (
            SELECT * FROM choice
            WHERE tenant = n.tenant AND topic = '' AND subscriber = n.subscriber
            AND CASE WHEN is_prefix THEN starts_with(n.type, type) ELSE n.type = type END OFFSET 0) AS c ON true
        UNION ALL
        SELECT t.number, t.topic, coalesce(c.subscriber, ''), c.type, c.is_prefix, c.cadence, c.channel, c.format,
            c.style, c.filter
        FROM topical t LEFT JOIN LATERAL (
            SELECT * FROM choice
            WHERE tenant = t.tenant AND topic = t.topic AND topic <> ''
            AND CASE WHEN is_prefix THEN starts_with(t.type, type) ELSE t.type = type END OFFSET 0) AS c ON true
    ), ranked AS (
        SELECT *, rank() OVER (
            PARTITION BY number, subscriber, topic ORDER BY is_prefix, length(type) DESC) AS place
        FROM matched
    ), settled AS (
        SELECT a.tenant, a.id, a.number, a.occurred_at, a.priority, a.is_known, a.is_expired, a.is_cancelled,
            a.is_refused, m.subscriber, CASE WHEN m.type IS NULL THEN m.topic ELSE '' END AS unheard,
            coalesce(m.format, '') AS format, coalesce(m.style, '') AS style,
            CASE WHEN coalesce(m.cadence, '') = '' OR m.cadence = 'off' AND a.is_mandatory THEN a.default_cadence
                ELSE m.cadence END AS cadence,
            CASE WHEN a.is_mandatory THEN '' ELSE coalesce(m.filter, '') END AS filter,
            CASE coalesce(m.channel, '') WHEN '' THEN a.default_channel ELSE m.channel END AS channel
        FROM ranked m JOIN arrived a ON a.number = m.number
        WHERE m.place = 1
    ), written AS (
        SELECT s.tenant, s.id, s.number, s.subscriber, s.unheard, s.occurred_at, s.priority, s.is_known, s.is_expired,
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
        LEFT JOIN LATERAL (
            SELECT * FROM subscriber WHERE tenant = s.tenant AND id = s.subscriber OFFSET 0) AS r ON true
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
        SELECT number, tenant, id, subscriber,
            CASE WHEN unheard <> '' THEN 'topic:' || unheard
                ELSE concat_ws('/', cadence, channel, format, style) END AS choice,
            CASE reason WHEN '' THEN 1 WHEN 'cancelled' THEN 5 WHEN 'expired' THEN 6 ELSE 4 END AS state,
            CASE WHEN reason IN ('cancelled', 'expired') THEN '' ELSE reason END AS reason,
            kind, priority, cadence, channel, format, style, rule, is_fixed, zone, batch, fallback_after, occurred_at,
            filter, duration, extension, cap, full_at, lead_style
        FROM judged
    )
    INSERT INTO expansion
    SELECT DISTINCT ON (number, subscriber, choice, filter)
        tenant, id, subscriber, choice, state, reason, kind, priority, cadence, channel, format, style, rule,
        is_fixed, zone, batch, fallback_after, occurred_at,
        -- What is sent alone has a window whose id follows from its item, a UUIDv7 of when it happened. So what is told
        -- again after a restore of Postgres is told under the same Message-ID and webhook-id.
        CASE WHEN state = 1 AND kind = 1 THEN (
            lpad(to_hex(greatest(extract(epoch FROM occurred_at) * 1000, 0)::bigint), 12, '0')
            || overlay(overlay(substr(md5(concat_ws(chr(31), tenant, id, subscriber, choice)), 1, 20)
                PLACING '7' FROM 1 FOR 1) PLACING '8' FROM 5 FOR 1))::uuid END,
        CASE kind WHEN 3 THEN timestamptz 'epoch' WHEN 4 THEN timestamptz '1969-12-31 00:00+00' END, filter, duration,
        extension, cap, full_at, lead_style
    FROM verdicts ORDER BY number, subscriber, choice, filter, lead_style"""


async def decide(run: Statements, fresh: Sequence[Notification], refused: Mapping[tuple[str, UUID], str]) -> None:
    """Fill the scratch table. Arrays are written as Postgres reads them: psycopg takes ten times as long for it."""
    places = {tenant: str(place) for place, tenant in enumerate({one.tenant: None for one in fresh}, start=1)}
    await run(
        _DECIDE,
        tenants=list(places),
        ids="{" + ",".join([one.id.hex for one in fresh]) + "}",
        places="{" + ",".join([places[one.tenant] for one in fresh]) + "}",
        refused=[number for number, one in enumerate(fresh, start=1) if (one.tenant, one.id) in refused]
        if refused
        else [],
    )
