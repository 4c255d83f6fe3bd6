"""Subscriptions' filters within an expansion: only those that have one cost anything.

What has been decided without filters lies in the session's scratch table, each row with its filter. Python answers
each filter once about each notification, however many subscribers have it; what nobody wants is suppressed there. As
the rows were written by one statement, no subscription that comes meanwhile is told unasked.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, LiteralString, Protocol

from psycopg import AsyncCursor

from libs.telemetry.logs import get_logger
from services.digest import metrics
from services.digest.commands import Notification
from services.digest.filters import Answer, Question, answers

log = get_logger(__name__)

_PAUSE_EVERY = 200
"""Filters between which others of this process get their turn; ordinary ones take 12 µs each."""

_QUESTIONS = "SELECT DISTINCT tenant, notification_id, filter FROM expansion WHERE filter <> '' AND state = 1"

_REFUSE = """
    UPDATE expansion SET state = 4, reason = 'filter'
    WHERE state = 1 AND filter <> '' AND (tenant, notification_id, filter) IN (
        SELECT * FROM unnest(%(tenants)s::text[], %(ids)s::uuid[], %(filters)s::text[]))"""

# The same choice by subscriptions with different filters is one item; it is told if one of them wants it.
_UNITE = """
    DELETE FROM expansion WHERE ctid IN (
        SELECT ctid FROM (
            SELECT ctid, row_number() OVER (
                PARTITION BY tenant, notification_id, subscriber, choice ORDER BY state, filter) AS place
            FROM expansion) AS same
        WHERE place > 1)"""


class Statements(Protocol):
    """Runs statements over the scratch tables; see store_expansion."""

    async def __call__(self, statement: LiteralString, **values: object) -> AsyncCursor[tuple[Any, ...]]: ...


async def apply_filters(run: Statements, notifications: Sequence[Notification]) -> None:
    """Suppress (filter) what subscriptions' filters leave out, and leave one row for each item."""
    rows = await (await run(_QUESTIONS)).fetchall()
    questions = [Question(tenant=tenant, notification_id=one_id, filter=text) for tenant, one_id, text in rows]
    known = {(one.tenant, one.id): one for one in notifications}
    refused: list[Question] = []
    undecided: list[Answer] = []
    for number, answer in enumerate(answers(questions, known), start=1):
        if answer.error:
            undecided.append(answer)
        if not answer.is_wanted:
            refused.append(answer.question)
        if number % _PAUSE_EVERY == 0:
            await asyncio.sleep(0)
    if refused:
        await run(
            _REFUSE,
            tenants=[one.tenant for one in refused],
            ids=[one.notification_id for one in refused],
            filters=[one.filter for one in refused],
        )
    await run(_UNITE)
    if undecided:
        _tell(undecided)


def _tell(undecided: Sequence[Answer]) -> None:
    metrics.FILTER_ERRORS.inc(len(undecided))
    first = undecided[0]
    log.warning(
        "Filters could not be decided; what they are about is told all the same.",
        filters=len(undecided),
        tenant=first.question.tenant,
        notification_id=str(first.question.notification_id),
        filter=first.question.filter[:200],
        error=first.error[:500],
    )
