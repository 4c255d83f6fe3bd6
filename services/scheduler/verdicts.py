"""What becomes of a timer when its time has come. Pure.

SCHEDULED, RETRYING ──▶ missed: SKIPPED · expired: EXPIRED · the one before is under way: SKIPPED or BUFFERED
                    ──▶ condition: not true SKIPPED · cannot be decided FAILED · to be asked of a service ASKING
                    ──▶ FIRED, or AWAITING where a report is expected
ASKING (no answer)  ──▶ ASKING once more · in the end as its policy says
AWAITING (no report) ─▶ RETRYING · in the end FAILED; see `after_failure`
"""

import json
from collections.abc import Collection, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from msgspec.structs import replace

from libs.conditions import BadCondition, compile_condition
from services.scheduler.attempts import MAX_ERROR, EndedAttempt, RetryPolicy
from services.scheduler.conditions import MAX_ASKS, Answer, NoAnswer
from services.scheduler.recurrence import Overlap
from services.scheduler.timer import Mark, State, Timer, fire_time

_MAX_NOTE = 4_096
_DEFAULT_RETRY = RetryPolicy()
_MISSED = "it came due while nothing could fire"
_OVERLAP = "the occurrence before it has no outcome yet"
_NO_REPORT = "no report came within "


class Skip(StrEnum):
    """Why a timer was skipped: too late, the occurrence before it, its condition, a service's no, or its silence."""

    MISSED = "missed"
    OVERLAP = "overlap"
    CONDITION = "condition"
    ANSWER = "answer"
    NO_ANSWER = "no_answer"


class Retry(StrEnum):
    """Why an event is to be published once more: its service was silent, or reported that it failed."""

    NO_REPORT = "no_report"
    REPORTED = "reported"


def at_its_time(
    timer: Timer, *, siblings: Collection[Timer], facts: Mapping[str, Any], watermark: Mark, now: datetime
) -> Timer:
    """The timer as its time leaves it; FIRED says that it is to fire.

    `siblings`: occurrences of the same schedule that are under way. Raises nothing that its siblings would suffer from.
    """
    if timer.state is State.AWAITING:
        return after_failure(timer, f"{_NO_REPORT}{timer.report_within}", watermark=watermark, now=now)
    if timer.expires_at is not None and timer.expires_at <= now:
        return ended(timer, State.EXPIRED, now)
    if timer.state is State.SCHEDULED and (verdict := _kept_back(timer, siblings, now)) is not None:
        return verdict
    if timer.condition:
        return _decided(timer, facts, now)
    if timer.asked is not None and not timer.holds:
        return _asked(timer, watermark, now)
    return replace(timer, state=State.FIRED)


def _kept_back(timer: Timer, siblings: Collection[Timer], now: datetime) -> Timer | None:
    """The verdict of a recurrence's policies, if they have something against it."""
    if timer.recurrence is None:
        return None
    if timer.recurrence.is_missed(timer.due_at, timer.nominal_at or timer.due_at, now):
        late_s = (now - timer.due_at).total_seconds()
        return ended(timer, State.SKIPPED, now, note_of(skipped=_MISSED, late_s=late_s))
    if timer.recurrence.overlap is Overlap.ALLOW or not siblings:
        return None
    is_room = all(one.state is not State.BUFFERED for one in siblings)
    if timer.recurrence.overlap is Overlap.BUFFER_ONE and is_room:
        return replace(timer, state=State.BUFFERED)
    return ended(timer, State.SKIPPED, now, note_of(skipped=_OVERLAP))


def _decided(timer: Timer, facts: Mapping[str, Any], now: datetime) -> Timer:
    about = {"entity": timer.entity, "type": timer.type, "due": timer.due_at}
    try:
        verdict = compile_condition(timer.condition).decide(facts, about, now)
    except BadCondition as err:  # Accepted by another version; its siblings must fire all the same.
        return failed(timer, str(err), now)
    if verdict.error is not None:
        return failed(timer, verdict.error, now, note_of(facts=verdict.facts_read))
    note = note_of(condition=timer.condition, holds=verdict.holds, facts=verdict.facts_read)
    return ended(timer, State.FIRED if verdict.holds else State.SKIPPED, now, note)


def _asked(timer: Timer, watermark: Mark, now: datetime) -> Timer:
    """To be asked (again), or what its policy makes of silence."""
    assert timer.asked is not None
    if timer.asks < MAX_ASKS:
        again_at = fire_time(timer.asked.ask_again_at(timer.asks + 1, now), watermark)
        error = timer.last_error if timer.state is State.ASKING else None  # Otherwise it is of an earlier attempt.
        return replace(timer, state=State.ASKING, fire_at=again_at, last_error=error)
    error = f"{timer.asked.service} gave no answer: {timer.last_error or 'it was silent'}"
    note = note_of(asked=timer.asked.service, no_answer=timer.asked.no_answer.name, error=error)
    match timer.asked.no_answer:
        case NoAnswer.FIRE:
            return ended(timer, State.FIRED, now, note)
        case NoAnswer.SKIP:
            return ended(timer, State.SKIPPED, now, note)
        case NoAnswer.FAIL:
            return failed(timer, error, now, note)


def answered(timer: Timer, answer: Answer, *, watermark: Mark, now: datetime) -> Timer:
    """An ASKING timer with its service's answer: to fire at once, skipped, or still to be asked again.

    A question counts once the service has had it and its time: neither one that was not asked, because too many wait,
    nor one that is lost on the way, because its shard or process is gone, is the service's silence.
    """
    assert timer.asked is not None
    if answer.holds is None:
        asks = timer.asks + 1 if answer.was_asked else timer.asks
        return replace(timer, asks=asks, last_error=answer.reason[:MAX_ERROR])
    note = note_of(asked=timer.asked.service, holds=answer.holds, reason=answer.reason)
    if answer.holds:
        return replace(timer, state=State.RETRYING, holds=True, fire_at=fire_time(watermark.at, watermark), note=note)
    return ended(timer, State.SKIPPED, now, note)


def after_failure(timer: Timer, error: str, *, watermark: Mark, now: datetime) -> Timer:
    """An AWAITING timer whose attempt came to nothing: to be tried again, or failed for good."""
    first_at = timer.first_attempt_at or now
    again_at = (timer.retry or _DEFAULT_RETRY).next_at(timer.id, timer.attempts, first_at=first_at, now=now)
    if again_at is None:
        return failed(timer, error, now)
    fire_at = fire_time(again_at, watermark)
    return replace(timer, state=State.RETRYING, holds=None, asks=0, fire_at=fire_at, last_error=error[:MAX_ERROR])


def fired(timer: Timer, verdict: Timer, now: datetime) -> Timer:
    """What is stored of a firing: it awaits its report, or lies behind the watermark as SCHEDULED.

    The same timer where nothing needs to be stored: the watermark says it.
    """
    if timer.report_within is not None:
        return replace(
            verdict,
            state=State.AWAITING,
            attempts=timer.attempts + 1,
            first_attempt_at=timer.first_attempt_at or now,
            fire_at=now + timer.report_within,
            decided_at=None,
        )
    if timer.state is State.SCHEDULED and verdict.note is None:
        return timer
    return replace(verdict, state=State.SCHEDULED, decided_at=now)


def ended_attempt(timer: Timer, after: Timer, now: datetime) -> EndedAttempt:
    """The end of an AWAITING timer's attempt, for the record; it may be the report of an older one that ends it."""
    assert timer.report_within is not None
    started_at = timer.fire_at - timer.report_within
    error = None if after.state is State.DONE else after.last_error
    return EndedAttempt(timer_id=timer.id, number=timer.attempts, started_at=started_at, ended_at=now, error=error)


def ended(timer: Timer, state: State, now: datetime, note: str | None = None) -> Timer:
    """With a verdict."""
    return replace(timer, state=state, decided_at=now, note=note)


def failed(timer: Timer, error: str, now: datetime, note: str | None = None) -> Timer:
    """Failed for good."""
    return replace(timer, state=State.FAILED, decided_at=now, last_error=error[:MAX_ERROR], note=note)


def skip_of(timer: Timer) -> Skip:
    """Why a SKIPPED timer was skipped, as its note has it."""
    match json.loads(timer.note or "{}"):
        case {"skipped": words}:
            return Skip.MISSED if words == _MISSED else Skip.OVERLAP
        case {"no_answer": _}:
            return Skip.NO_ANSWER
        case {"asked": _}:
            return Skip.ANSWER
        case _:  # A condition's may have been cut off, because of the facts in it.
            return Skip.CONDITION


def retry_of(attempt: EndedAttempt) -> Retry:
    """Why what follows an attempt that came to nothing is a retry."""
    return Retry.NO_REPORT if (attempt.error or "").startswith(_NO_REPORT) else Retry.REPORTED


def note_of(**parts: object) -> str:
    """A verdict as a JSON object, cut to what may be stored."""
    text = json.dumps(parts, default=str)
    return text if len(text) <= _MAX_NOTE else json.dumps({"truncated": text[:_MAX_NOTE]})
