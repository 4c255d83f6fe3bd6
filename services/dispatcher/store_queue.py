"""Taking turns: claiming what is to be sent, recording what came of it. SQL only, in the caller's transaction.

A claim is a row lock for the length of one transaction, and after that a date: `claimable_at`, on the database's clock.
Claims are fenced by the attempt's number: what is recorded for an attempt that is no longer the one under way changes
the attempt's row and nothing else.

Array statements are not prepared: a plan that was kept from when the tables were empty would read them whole for ever.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from libs.postgres import Transaction
from libs.trace_points import NOWHERE
from services.dispatcher.delivery import DEAD_LETTERS, ENDED, Delivery, Priority, Reason, State
from services.dispatcher.pipeline import Candidate, Settlement
from services.dispatcher.suppressions import Source

Key = tuple[str, UUID]

# What readers asked for (source 3) holds for nothing that is mandatory, and so on no list.
# statement_timestamp(), because a volatile clock_timestamp() could not be looked up in the index. LIMIT 1 keeps the
# planner, who cannot know how few rows the queue gives, from reading all of `delivery` into a hash table.
_CLAIMABLE = """
    SELECT q.tenant, q.delivery_id, q.attempt, d.digest_id, d.subscriber, d.channel, d.address, d.subject,
           d.html, d.text, d.json, d.expires_at, d.priority, d.list_id, d.attempts, d.budget, d.created_at,
           d.fresh_since, clock_timestamp(), q.claimable_at, q.trace, d.trace,
           (SELECT min(s.source) FROM suppression AS s WHERE s.tenant = d.tenant AND s.channel = d.channel
                AND s.address = CASE WHEN d.channel = 'email' THEN lower(d.address) ELSE d.address END
                AND s.list_id IN ('', d.list_id) AND (d.list_id <> '' OR s.source <> 3))
    FROM unnest(%(lanes)b::text[], %(places)b::integer[], %(patience)b::interval[]) AS room (lane, places, patience)
    CROSS JOIN LATERAL (
        SELECT tenant, delivery_id, attempt, claimable_at, trace FROM queue
        WHERE queue.lane = room.lane AND claimable_at <= statement_timestamp() - room.patience
            AND destination <> ALL(%(full)b::text[])
        ORDER BY priority DESC, claimable_at LIMIT room.places FOR UPDATE SKIP LOCKED) AS q
    CROSS JOIN LATERAL (SELECT * FROM delivery WHERE tenant = q.tenant AND id = q.delivery_id LIMIT 1) AS d"""

# `before` is the attempt found in doubt, 0 when there is none.
_CLAIM = """
    WITH claimed AS (
        SELECT * FROM unnest(%(tenants)b::text[], %(ids)b::uuid[], %(numbers)b::integer[], %(before)b::integer[])
            AS claimed (tenant, id, number, before)),
    queued AS (
        UPDATE queue SET attempt = claimed.number, claimed_by = %(by)s,
            claimable_at = clock_timestamp() + %(claim_time)s
        FROM claimed WHERE queue.tenant = claimed.tenant AND queue.delivery_id = claimed.id),
    begun AS (
        UPDATE delivery SET state = %(sending)s, attempts = claimed.number, next_attempt_at = NULL
        FROM claimed WHERE delivery.tenant = claimed.tenant AND delivery.id = claimed.id),
    doubted AS (
        UPDATE attempt SET reason = 'in_doubt' FROM claimed
        WHERE attempt.tenant = claimed.tenant AND attempt.delivery_id = claimed.id AND attempt.number = claimed.before
            AND attempt.ended_at IS NULL)
    INSERT INTO attempt (tenant, delivery_id, number, started_at) SELECT tenant, id, number, %(now)s FROM claimed"""

_SETTLE = """
    WITH result AS (
        SELECT * FROM unnest(%(tenants)b::text[], %(ids)b::uuid[], %(numbers)b::integer[], %(states)b::smallint[],
                %(errors)b::text[], %(reasons)b::text[], %(attempt_reasons)b::text[], %(replies)b::text[],
                %(attempt_ends)b::timestamptz[], %(ends)b::timestamptz[], %(retries)b::timestamptz[],
                %(dead)b::timestamptz[])
            AS result (tenant, id, number, state, error, reason, attempt_reason, reply, attempt_ended_at, ended_at,
                next_attempt_at, dead_letter_at)),
    released AS (
        DELETE FROM queue USING result
        WHERE queue.tenant = result.tenant AND queue.delivery_id = result.id AND queue.attempt = result.number
        RETURNING queue.tenant, queue.delivery_id),
    ended AS (
        UPDATE attempt SET ended_at = result.attempt_ended_at, is_sent = result.state = %(sent)s,
            reply = result.reply, reason = result.attempt_reason
        FROM result WHERE attempt.tenant = result.tenant AND attempt.delivery_id = result.id
            AND attempt.number = result.number)
    UPDATE delivery SET state = result.state, last_error = result.error, reason = result.reason,
        ended_at = result.ended_at, next_attempt_at = result.next_attempt_at, dead_letter_at = result.dead_letter_at
    FROM released JOIN result ON result.tenant = released.tenant AND result.id = released.delivery_id
    WHERE delivery.tenant = released.tenant AND delivery.id = released.delivery_id
    RETURNING delivery.tenant, delivery.id"""

# What is in doubt stays so: only the date moves.
_POSTPONE = """
    UPDATE queue SET claimable_at = clock_timestamp() + held.wait, claimed_by = ''
    FROM unnest(%(tenants)b::text[], %(ids)b::uuid[], %(waits)b::interval[]) AS held (tenant, id, wait)
    WHERE queue.tenant = held.tenant AND queue.delivery_id = held.id"""

# What another replica has locked it is about to claim or to park itself.
_RELEASE = """
    UPDATE queue SET claimable_at = statement_timestamp()
    WHERE (tenant, delivery_id) IN (
        SELECT tenant, delivery_id FROM queue
        WHERE lane = %(lane)s AND destination = %(destination)s AND attempt = 0 AND claimable_at > statement_timestamp()
        ORDER BY claimable_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)"""

_RENEW = """
    UPDATE queue SET claimable_at = clock_timestamp() + %(claim_time)s
    FROM unnest(%(tenants)b::text[], %(ids)b::uuid[], %(numbers)b::integer[]) AS mine (tenant, id, number)
    WHERE queue.tenant = mine.tenant AND queue.delivery_id = mine.id AND queue.attempt = mine.number"""

_GIVE_BACK = """
    WITH mine AS (
        SELECT * FROM unnest(%(tenants)b::text[], %(ids)b::uuid[], %(numbers)b::integer[])
            AS mine (tenant, id, number)),
    freed AS (
        UPDATE queue SET attempt = 0, claimed_by = '', claimable_at = statement_timestamp()
        FROM mine WHERE queue.tenant = mine.tenant AND queue.delivery_id = mine.id AND queue.attempt = mine.number
        RETURNING queue.tenant, queue.delivery_id, mine.number),
    forgotten AS (
        DELETE FROM attempt USING freed WHERE attempt.tenant = freed.tenant
            AND attempt.delivery_id = freed.delivery_id AND attempt.number = freed.number)
    UPDATE delivery SET attempts = freed.number - 1,
        state = CASE WHEN freed.number = 1 THEN %(pending)s ELSE %(retrying)s END
    FROM freed WHERE delivery.tenant = freed.tenant AND delivery.id = freed.delivery_id"""

_BACKLOG = """
    SELECT lane, count(*), coalesce(extract(epoch FROM clock_timestamp() - min(claimable_at)), 0)::float8
    FROM queue GROUP BY lane"""


class QueueStore:
    """The queue in Postgres."""

    async def claimable(
        self,
        tx: Transaction,
        places: Mapping[str, int],
        full: Sequence[str],
        *,
        patience: Mapping[str, timedelta],
    ) -> list[Candidate]:
        """Lock deliveries whose turn it is, at most `places` per lane, none to destinations that are `full`.

        In a lane that has `patience` only those whose turn it has been for so long.
        In each lane those of the highest priority, and of these the ones that have waited longest, strictly.
        Ones locked by other replicas are passed over. Nothing is changed; what is not claimed is free at the commit.
        """
        room = {
            "lanes": list(places),
            "places": list(places.values()),
            "patience": [patience.get(lane, timedelta(0)) for lane in places],
        }
        cursor = await tx.raw.execute(_CLAIMABLE, room | {"full": list(full)}, prepare=False)
        return [_candidate(row) for row in await cursor.fetchall()]

    async def claim(
        self, tx: Transaction, candidates: Sequence[Candidate], *, by: str, claim_time: timedelta, now: datetime
    ) -> None:
        """Commit to sending: the intent is on record before anything leaves."""
        if candidates:
            await tx.raw.execute(
                _CLAIM,
                _keys(candidates)
                | {
                    "before": [one.attempts if one.is_in_doubt else 0 for one in candidates],
                    "by": by,
                    "claim_time": claim_time,
                    "sending": State.SENDING,
                    "now": now,
                },
                prepare=False,
            )

    async def settle(self, tx: Transaction, settlements: Sequence[Settlement]) -> set[Key]:
        """Record what became of attempts and deliveries; returns those that were still ours to decide."""
        if not settlements:
            return set()
        columns = {
            "tenants": [one.tenant for one in settlements],
            "ids": [one.delivery_id for one in settlements],
            "numbers": [one.number for one in settlements],
            "states": [int(one.state) for one in settlements],
            "errors": [one.error for one in settlements],
            "reasons": [one.reason.value for one in settlements],
            "attempt_reasons": [one.attempt_reason.value for one in settlements],
            "replies": [one.reply for one in settlements],
            "attempt_ends": [one.ended_at for one in settlements],
            "ends": [one.at if one.state in ENDED else None for one in settlements],
            "retries": [one.retry_at for one in settlements],
            "dead": [one.at if one.state in DEAD_LETTERS else None for one in settlements],
        }
        cursor = await tx.raw.execute(_SETTLE, columns | {"sent": State.SENT}, prepare=False)
        return {(tenant, delivery_id) for tenant, delivery_id in await cursor.fetchall()}

    async def postpone(self, tx: Transaction, held: Sequence[tuple[Candidate, timedelta]]) -> None:
        """Park deliveries that `claimable` has locked in this transaction: for so long nobody claims them."""
        if held:
            parameters = _keys([one for one, _ in held]) | {"waits": [wait for _, wait in held]}
            await tx.raw.execute(_POSTPONE, parameters, prepare=False)

    async def release(self, tx: Transaction, *, lane: str, destination: str, limit: int) -> int:
        """Have what is parked for a destination be claimable now, at most `limit`, soonest first; returns how many."""
        given = {"lane": lane, "destination": destination, "limit": limit}
        return (await tx.raw.execute(_RELEASE, given, prepare=False)).rowcount

    async def renew(self, tx: Transaction, candidates: Sequence[Candidate], *, claim_time: timedelta) -> None:
        """Go on holding claims; those that others took over stay theirs."""
        await tx.raw.execute("SET LOCAL synchronous_commit = off")  # A lost renewal is made again.
        await tx.raw.execute(_RENEW, _keys(candidates) | {"claim_time": claim_time}, prepare=False)

    async def give_back(self, tx: Transaction, candidates: Sequence[Candidate]) -> None:
        """Undo claims of which nothing has left: as if these attempts had never been begun."""
        states = {"pending": State.PENDING, "retrying": State.RETRYING}
        await tx.raw.execute(_GIVE_BACK, _keys(candidates) | states, prepare=False)

    async def backlog(self, tx: Transaction) -> dict[str, tuple[int, float]]:
        """Deliveries queued per lane, and for how many seconds the first of them could have been sent (at least 0)."""
        cursor = await tx.raw.execute(_BACKLOG)
        return {lane: (count, max(oldest_s, 0.0)) for lane, count, oldest_s in await cursor.fetchall()}


def _keys(candidates: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "tenants": [one.delivery.tenant for one in candidates],
        "ids": [one.delivery.id for one in candidates],
        "numbers": [one.number for one in candidates],
    }


def _candidate(row: tuple[Any, ...]) -> Candidate:
    tenant, delivery_id, attempt, digest_id, subscriber, channel, address, subject, html, text, json, expires_at = row[
        :12
    ]
    priority, list_id, attempts, budget, created_at, fresh_since, claimed_at, claimable_at, *traces, source = row[12:]
    brought_back_by, made_by = (trace or NOWHERE for trace in traces)
    return Candidate(
        delivery=Delivery(
            tenant=tenant,
            id=delivery_id,
            digest_id=digest_id,
            subscriber=subscriber,
            channel=channel,
            address=address,
            subject=subject,
            html=html,
            text=text,
            json=json,
            expires_at=expires_at,
            priority=Priority(priority),
            list_id=list_id,
            trace=made_by,
        ),
        attempts=attempts,
        budget=budget,
        created_at=created_at,
        fresh_since=fresh_since,
        claimed_at=claimed_at,
        is_in_doubt=attempt > 0,
        suppressed=Reason.NONE if source is None else Source(source).verdict,
        waited=claimed_at - claimable_at,
        trace=brought_back_by,
    )
