"""Which types a business service formats, and the windows that wait for one.

A window that waits is closing as before; `asked_until` keeps others from claiming it for a while, by the database's
clock. It is a lease, not a lock: who closes a window locks it, whatever it says (INV-7), and of a process that died the
windows are claimed by others when it has run out.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from uuid import UUID

from libs.postgres import Transaction

_SERVICES = """
    SELECT t.tenant, t.id, t.formatting_service FROM notification_type t
    JOIN unnest(%s::text[], %s::text[]) AS w (tenant, id) USING (tenant, id)
    WHERE t.formatting_service <> ''"""

_SET_ASIDE = """
    UPDATE digest_window SET asked_until = clock_timestamp() + %s
    WHERE tenant = ANY (%s) AND id = ANY (%s) AND state = 2"""

# Not those that somebody else has locked: they are being closed.
_GIVE_BACK = """
    UPDATE digest_window SET asked_until = NULL WHERE (tenant, id) IN (
        SELECT tenant, id FROM digest_window WHERE tenant = ANY (%s) AND id = ANY (%s) AND state = 2
        FOR NO KEY UPDATE SKIP LOCKED)"""


async def services_of(tx: Transaction, types: Collection[tuple[str, str]]) -> Mapping[str, Mapping[str, str]]:
    """Per tenant, those of the (tenant, type) that a service formats, with its name."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    if types:
        tenants, ids = zip(*sorted(set(types)), strict=True)
        for tenant, one_id, service in await (await tx.raw.execute(_SERVICES, (list(tenants), list(ids)))).fetchall():
            found[tenant][one_id] = service
    return found


async def set_aside(tx: Transaction, tenants: Collection[str], ids: Sequence[UUID], lease: timedelta) -> None:
    """Have nobody claim these windows for so long; they are locked by the caller."""
    await tx.raw.execute(_SET_ASIDE, (lease, list(tenants), list(ids)))


async def give_back(tx: Transaction, tenants: Collection[str], ids: Sequence[UUID]) -> None:
    """Let anybody claim them at once."""
    await tx.raw.execute(_GIVE_BACK, (list(tenants), list(ids)))
