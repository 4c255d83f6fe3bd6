"""Subscriptions' filters: CEL over `payload`, `entity` and `type` that says whether somebody wants to be told. Pure.

A filter that is false leaves the notification out. One that cannot be decided lets it through: a message too many is
a nuisance, one too few may be the one that mattered; and what was lost by an error would be lost silently. Compiling,
limits of cost and cache are those of libs.conditions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from uuid import UUID

from libs.conditions import BadCondition, Condition, Verdict, compile_condition
from services.digest.commands import Notification

VARIABLES = frozenset({"payload", "entity", "type"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One filter asked about one notification; how many subscribers share it does not matter."""

    tenant: str
    notification_id: UUID
    filter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a filter came to. `error`: why it could not be decided; then `is_wanted` is true."""

    question: Question
    is_wanted: bool
    error: str = ""


def compile_filter(text: str) -> Condition:
    """The filter in `text`; raises BadCondition when it is none."""
    return compile_condition(text, VARIABLES)


def answers(questions: Sequence[Question], notifications: Mapping[tuple[str, UUID], Notification]) -> Iterator[Answer]:
    """Answer every question, each notification's payload read once; lazily, so that the caller can pause in between."""
    ordered = sorted(questions, key=lambda one: (one.tenant, one.notification_id))
    for key, asked in groupby(ordered, key=lambda one: (one.tenant, one.notification_id)):
        values = _values(notifications[key])
        for question in asked:
            verdict = _verdict(question.filter, values)
            yield Answer(
                question=question, is_wanted=verdict.holds or verdict.error is not None, error=verdict.error or ""
            )


def _values(one: Notification) -> dict[str, Any] | None:
    """What filters may read; None when the payload is no JSON."""
    try:
        return {"payload": json.loads(one.payload), "entity": one.entity, "type": one.type}
    except (ValueError, RecursionError):
        return None


def _verdict(text: str, values: dict[str, Any] | None) -> Verdict:
    if values is None:
        return Verdict(holds=False, error="the payload is not JSON")
    try:
        return compile_filter(text).evaluate(values)
    except BadCondition as error:  # Compiled when it was put; a later release may have become stricter.
        return Verdict(holds=False, error=str(error))
