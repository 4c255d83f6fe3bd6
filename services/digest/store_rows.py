"""Rows of the catalog's tables, whichever: put, got, listed, deleted, required.

What is named is locked while it is being named (FOR KEY SHARE), and what is deleted is looked for afterwards: so
nothing ends up naming what is not there. Lists are in order of ids; `after` is the last id of the page before.
"""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, Table, delete, or_, select
from sqlalchemy.dialects.postgresql import insert

from libs.errors import FailedPrecondition, NotFound
from libs.postgres import Transaction


async def put_rows(tx: Transaction, table: Table, rows: Sequence[dict[str, object]]) -> None:
    """Insert or replace rows, in the order of their keys, so that two callers do not wait for each other crosswise."""
    keys = [column.name for column in table.primary_key]
    ordered = sorted(rows, key=lambda row: [str(row[key]) for key in keys])
    statement = insert(table)
    changes = {name: statement.excluded[name] for name in ordered[0] if name not in keys}
    is_other = or_(*(table.c[name].is_distinct_from(value) for name, value in changes.items()))
    await tx.conn.execute(statement.on_conflict_do_update(index_elements=keys, set_=changes, where=is_other), ordered)


async def get_row(tx: Transaction, table: Table, tenant: str, one_id: str, what: str) -> Row[Any]:
    """One row; NotFound says that there is no such `what`."""
    row = (await tx.conn.execute(select(table).where(table.c.tenant == tenant, table.c.id == one_id))).first()
    if row is None:
        raise NotFound(f"There is no {what} {one_id}.", metadata={"id": one_id})
    return row


async def list_rows(
    tx: Transaction, table: Table, tenant: str, after: str, limit: int, *filters: ColumnElement[bool]
) -> Sequence[Row[Any]]:
    """A page of rows in order of their ids, from the one behind `after`."""
    query: Select[Any] = select(table).where(table.c.tenant == tenant, table.c.id > after, *filters)
    return list(await tx.conn.execute(query.order_by(table.c.id).limit(limit)))


async def delete_row(tx: Transaction, table: Table, tenant: str, one_id: str) -> None:
    """Delete a row, if it is there."""
    await tx.conn.execute(delete(table).where(table.c.tenant == tenant, table.c.id == one_id))


async def require(tx: Transaction, table: Table, tenant: str, ids: Collection[str], what: str) -> None:
    """Raise FailedPrecondition unless all are there, and keep them there until the end of the transaction."""
    if not ids:
        return
    query = select(table.c.id).where(table.c.tenant == tenant, table.c.id.in_(sorted(ids))).order_by(table.c.id)
    found = {row.id for row in await tx.conn.execute(query.with_for_update(read=True, key_share=True))}
    if missing := sorted(set(ids) - found):
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FailedPrecondition(
            f"There is no {what} {named}.", reason=f"{what.upper()}_MISSING", metadata={what: missing[0]}
        )
