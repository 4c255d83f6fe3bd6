"""Addresses that get nothing, and those that bounced. SQL only; every function runs in the caller's tx."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta

from libs.postgres import Transaction
from services.dispatcher.delivery import State
from services.dispatcher.pipeline import Settlement
from services.dispatcher.suppressions import Source, Suppression

MAX_REASON = 512

Position = tuple[str, str, str, int]
"""Channel, address, list and source: what names a suppression within its tenant."""

_PUT = """
    INSERT INTO suppression (tenant, channel, address, list_id, source, subscriber, reason, created_at)
    VALUES (%(tenant)s, %(channel)s, CASE WHEN %(channel)s = 'email' THEN lower(%(address)s) ELSE %(address)s END,
        %(list_id)s, %(source)s, %(subscriber)s, %(reason)s, %(created_at)s)
    ON CONFLICT (tenant, channel, address, list_id, source)
        DO UPDATE SET reason = EXCLUDED.reason, subscriber = EXCLUDED.subscriber
    RETURNING channel, address, reason, created_at, list_id, source, subscriber"""

_DELETE = """
    DELETE FROM suppression WHERE tenant = %(tenant)s AND channel = %(channel)s
        AND address = CASE WHEN %(channel)s = 'email' THEN lower(%(address)s) ELSE %(address)s END
        AND list_id = %(list_id)s AND (%(source)s::smallint IS NULL OR source = %(source)s)"""

_FORGIVE_LIFTED = """
    DELETE FROM bounce WHERE tenant = %(tenant)s AND channel = %(channel)s
        AND address = CASE WHEN %(channel)s = 'email' THEN lower(%(address)s) ELSE %(address)s END"""

_LIST = """
    SELECT channel, address, reason, created_at, list_id, source, subscriber FROM suppression
    WHERE tenant = %(tenant)s AND (channel, address, list_id, source) > (%(after)s, %(address)s, %(list)s, %(source)s)
        AND (%(only)s = '' OR address IN (%(only)s, lower(%(only)s)))
    ORDER BY channel, address, list_id, source LIMIT %(limit)s"""

# In the order of the key, so that two replicas with the same addresses wait for each other instead of deadlocking.
_NOTE = """
    WITH said AS (
        SELECT tenant, channel, CASE WHEN channel = 'email' THEN lower(address) ELSE address END AS address, reason
        FROM unnest(%(tenants)b::text[], %(channels)b::text[], %(addresses)b::text[], %(reasons)b::text[])
            AS said (tenant, channel, address, reason)),
    counted AS (
        INSERT INTO bounce (tenant, channel, address, times)
        SELECT tenant, channel, address, count(*) FROM said
        GROUP BY tenant, channel, address ORDER BY tenant, channel, address
        ON CONFLICT (tenant, channel, address)
            DO UPDATE SET times = bounce.times + EXCLUDED.times, stored_at = EXCLUDED.stored_at
        RETURNING tenant, channel, address, times)
    INSERT INTO suppression (tenant, channel, address, source, reason, created_at)
    SELECT DISTINCT ON (tenant, channel, address) tenant, channel, address, %(source)s, reason, %(now)s
    FROM counted JOIN said USING (tenant, channel, address) WHERE times >= %(times)s
    ORDER BY tenant, channel, address
    ON CONFLICT DO NOTHING"""

_FORGIVE = """
    DELETE FROM bounce WHERE (tenant, channel, address) IN (
        SELECT b.tenant, b.channel, b.address
        FROM unnest(%(tenants)b::text[], %(channels)b::text[], %(addresses)b::text[])
            AS works (tenant, channel, address)
        JOIN bounce AS b ON b.tenant = works.tenant AND b.channel = works.channel
            AND b.address = CASE WHEN works.channel = 'email' THEN lower(works.address) ELSE works.address END
        ORDER BY b.tenant, b.channel, b.address FOR UPDATE OF b)"""

_FORGET = """
    DELETE FROM bounce WHERE (tenant, channel, address) IN (
        SELECT tenant, channel, address FROM bounce WHERE stored_at < clock_timestamp() - %s
        ORDER BY stored_at LIMIT %s FOR UPDATE SKIP LOCKED)"""


class SuppressionStore:
    """Suppressions in Postgres; e-mail addresses without regard to case."""

    async def put(self, tx: Transaction, tenant: str, suppression: Suppression) -> Suppression:
        """Suppress an address; one that is already keeps its date and gets the new reason. Returns what is kept."""
        row = await (await tx.raw.execute(_PUT, asdict(suppression) | {"tenant": tenant})).fetchone()
        assert row is not None
        return _suppression(*row)

    async def delete(
        self,
        tx: Transaction,
        tenant: str,
        *,
        channel: str,
        address: str,
        list_id: str = "",
        source: Source | None = None,
    ) -> None:
        """Lift a suppression, if there is one, whatever its source unless one is given. Its bounces are forgotten."""
        given = {
            "tenant": tenant,
            "channel": channel,
            "address": address,
            "list_id": list_id,
            "source": None if source is None else int(source),
        }
        await tx.raw.execute(_DELETE, given)
        if source in (None, Source.BOUNCE):
            await tx.raw.execute(_FORGIVE_LIFTED, given)

    async def page(
        self, tx: Transaction, tenant: str, *, after: Position | None, limit: int, address: str = ""
    ) -> list[Suppression]:
        """In order of their positions, those behind `after`; of one address, or of all."""
        channel, behind, list_id, source = after or ("", "", "", 0)
        given = {"tenant": tenant, "after": channel, "address": behind, "list": list_id, "source": source}
        cursor = await tx.raw.execute(_LIST, given | {"only": address, "limit": limit})
        return [_suppression(*row) for row in await cursor.fetchall()]


class BounceStore:
    """Suppresses addresses that a server says do not exist; SendingLoop tells it what attempts found out."""

    def __init__(self, *, times: int) -> None:
        """`times`: how often in a row before an address is suppressed; 0: never."""
        self._times = times

    async def note(self, tx: Transaction, settlements: Sequence[Settlement]) -> None:
        """Take in what was recorded in this transaction."""
        if not self._times:
            return
        if self._times > 1 and (works := [one for one in settlements if _is_sent_mail(one)]):
            await tx.raw.execute(_FORGIVE, _columns(works), prepare=False)
        said = [one for one in settlements if one.is_bounce]
        if not said:
            return
        given = _columns(said) | {
            "reasons": [f"bounced: {one.reply}"[:MAX_REASON] for one in said],
            "source": int(Source.BOUNCE),
            "times": self._times,
            "now": said[0].at,
        }
        await tx.raw.execute(_NOTE, given, prepare=False)

    async def forget(self, tx: Transaction, *, older_than: timedelta, limit: int) -> int:
        """Delete at most `limit` counts that are older, on the database's clock; returns how many."""
        return (await tx.raw.execute(_FORGET, (older_than, limit))).rowcount


def _is_sent_mail(one: Settlement) -> bool:
    return one.channel == "email" and one.state is State.SENT


def _columns(settlements: Sequence[Settlement]) -> dict[str, object]:
    return {
        "tenants": [one.tenant for one in settlements],
        "channels": [one.channel for one in settlements],
        "addresses": [one.address for one in settlements],
    }


def _suppression(
    channel: str, address: str, reason: str, created_at: datetime, list_id: str, source: int, subscriber: str
) -> Suppression:
    return Suppression(
        channel=channel,
        address=address,
        reason=reason,
        created_at=created_at,
        list_id=list_id,
        source=Source(source),
        subscriber=subscriber,
    )
