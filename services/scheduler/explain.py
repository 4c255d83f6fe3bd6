"""What the scheduler knows of timers, told in sentences. Pure."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from services.scheduler.attempts import EndedAttempt
from services.scheduler.conditions import MAX_ASKS
from services.scheduler.timer import State, Timer

_LONGEST_SENTENCE = 1_000
_LONGEST_QUOTE = 240
_MOST_RELATED = 100

_EXPECTED = frozenset({State.SCHEDULED, State.RETRYING})
"""Told with the time at which they will fire if nothing changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that happened, or will (`is_expected`)."""

    at: datetime
    kind: str
    sentence: str
    details: dict[str, str] = field(default_factory=dict)
    related_ids: tuple[str, ...] = ()
    is_expected: bool = False


def explain_timer(
    timer: Timer, attempts: Sequence[EndedAttempt] = (), waits_for: Sequence[UUID] = ()
) -> Iterator[Entry]:
    """The attempts that have ended, and what became of the timer, or will when nothing changes.

    `waits_for`: the occurrences under way that a buffered one waits for, where they are known.
    """
    name, details, related = _name(timer), _details(timer), _related(timer, waits_for)
    for attempt in attempts:
        came_to = f"failed: {_quoted(attempt.error)}" if attempt.error is not None else "was reported done"
        yield Entry(
            at=attempt.ended_at,
            kind="attempt_done" if attempt.error is None else "attempt_failed",
            sentence=_sentence(f"attempt {attempt.number} of {name}, begun at {_time(attempt.started_at)}, {came_to}"),
            details=details | {"attempt": str(attempt.number)},
            related_ids=related,
        )
    yield Entry(
        at=_at(timer),
        kind="timer_expected" if timer.state is State.SCHEDULED else f"timer_{timer.state.name.lower()}",
        sentence=_sentence(f"{name} {_became(timer, waits_for)}"),
        details=details,
        related_ids=related,
        is_expected=timer.state in _EXPECTED,
    )


def _name(timer: Timer) -> str:
    if timer.step_of is not None:
        return f"the step {timer.step_of.step} of the timeline {timer.step_of.timeline} for {timer.entity}"
    if timer.schedule_id == timer.id:
        return f"the timer {timer.id} of {timer.entity}"
    schedule = f"the schedule {timer.schedule_id} of {timer.entity}"
    if timer.occurrence:
        return f"occurrence {timer.occurrence} of {schedule}"
    if timer.nominal_at is not None:
        return f"the backfilled occurrence {_time(timer.nominal_at)} of {schedule}"
    return f"the triggered timer {timer.id} of {schedule}"


def _details(timer: Timer) -> dict[str, str]:
    details: dict[str, object] = {"timer_id": timer.id, "entity": timer.entity, "type": timer.type}
    details["due"] = timer.due_at.isoformat()
    if timer.schedule_id != timer.id:
        details["schedule_id"] = timer.schedule_id
    if timer.occurrence:
        details["occurrence"] = timer.occurrence
    if timer.nominal_at is not None:
        details["nominal"] = timer.nominal_at.isoformat()
    if timer.step_of is not None:
        details |= {
            "timeline": timer.step_of.timeline,
            "timeline_version": timer.step_of.version,
            "timeline_run_id": timer.step_of.run_id,
            "step": timer.step_of.step,
        }
    if timer.attempts:
        details["attempts"] = timer.attempts
    if timer.last_error:
        details["last_error"] = timer.last_error
    if timer.note:
        details["note"] = timer.note
    return {key: str(value) for key, value in details.items()}


def _related(timer: Timer, waits_for: Sequence[UUID]) -> tuple[str, ...]:
    ids = [timer.schedule_id] if timer.schedule_id != timer.id else []
    if timer.step_of is not None:
        ids.append(timer.step_of.run_id)
    return tuple(str(one) for one in (*ids, *waits_for)[:_MOST_RELATED])


def _at(timer: Timer) -> datetime:
    """When what is told happened, or will."""
    match timer.state:
        case State.AWAITING if timer.report_within is not None:
            return timer.fire_at - timer.report_within  # Its turn is the report's deadline.
        case State.ASKING:
            return timer.due_at  # Its turn is the next question.
        case _:
            return timer.decided_at or timer.fire_at


def _became(timer: Timer, waits_for: Sequence[UUID]) -> str:
    """The sentence's rest, by state."""
    match timer.state:
        case State.SCHEDULED:
            return f"will fire{_proviso(timer)}"
        case State.RETRYING if timer.attempts:
            failure = f"attempt {timer.attempts} failed: {_quoted(timer.last_error)}"
            return f"will be tried again, as attempt {timer.attempts + 1}; {failure}"
        case State.RETRYING:
            return "has its turn, and will fire now"
        case State.PAUSED:
            return f"is paused; it would have its turn at {_time(timer.fire_at)}, or once it is resumed"
        case State.AWAITING:
            return f"sent its event (attempt {timer.attempts}) and awaits a report until {_time(timer.fire_at)}"
        case State.ASKING:
            assert timer.asked is not None
            silence = f"{timer.asks} of {MAX_ASKS} questions came to no answer"
            error = f"; most recently: {_quoted(timer.last_error)}" if timer.last_error else ""
            return f"is due, and {timer.asked.service} is being asked whether it is to fire ({silence}{error})"
        case State.BUFFERED:
            others = ", ".join(str(one) for one in waits_for[:3]) or "the occurrence before it"
            return f"is due, and waits until {others} has an outcome"
        case _:
            return _ended(timer)


def _proviso(timer: Timer) -> str:
    if timer.condition:
        return ", if its condition is true then"
    return f", if {timer.asked.service} says so then" if timer.asked is not None else ""


def _ended(timer: Timer) -> str:
    verdict = _verdict(timer)
    after = f" after {timer.attempts} attempt{'s' if timer.attempts > 1 else ''}" if timer.attempts else ""
    match timer.state:
        case State.FIRED:
            return f"fired{_why(verdict)}"
        case State.SKIPPED:
            return f"was due and did not fire{_why(verdict)}"
        case State.CANCELLED:
            return f"was cancelled: {_quoted(timer.note)}" if timer.note else "was cancelled"
        case State.EXPIRED:
            until = f" at {_time(timer.expires_at)}" if timer.expires_at is not None else ""
            return f"was not fired, because it had expired{until}"
        case State.DONE:
            return f"is done{after}"
        case _:
            return f"failed for good{after}: {_quoted(timer.last_error)}"


def _why(verdict: dict[str, Any]) -> str:
    """What decided, as `verdicts` has put it on record; empty where nothing did."""
    service = verdict.get("asked")
    match verdict:
        case {"skipped": str(reason), "late_s": late_s}:
            return f", because {reason} and is {late_s:,.0f} s late"
        case {"skipped": str(reason)}:
            return f", because {reason}"
        case {"no_answer": _, "error": str(error)}:
            return f", as its policy says where there is no answer: {_quoted(error)}"
        case {"asked": _, "holds": bool(holds), **more}:
            reason = f": {_quoted(str(more['reason']))}" if more.get("reason") else ""
            return f", because {service} said {'yes' if holds else 'no'}{reason}"
        case {"holds": bool(holds), "facts": facts}:
            read = f" of the facts {_quoted(json.dumps(facts))}" if facts else ""
            return f", because its condition was {'true' if holds else 'not true'}{read}"
        case _:
            return ""


def _verdict(timer: Timer) -> dict[str, Any]:
    """A cancel's note is a cause in plain words; all others are objects."""
    if timer.note is None or timer.state is State.CANCELLED:
        return {}
    try:
        verdict = json.loads(timer.note)
    except ValueError:
        return {}
    return verdict if isinstance(verdict, dict) else {}


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:].removesuffix(".")
    return f"{text[: _LONGEST_SENTENCE - 1]}."


def _quoted(text: str | None) -> str:
    """As much of somebody else's words as a sentence bears; the details have more."""
    line = " ".join((text or "nobody said why").split())
    return line if len(line) <= _LONGEST_QUOTE else f"{line[: _LONGEST_QUOTE - 1]}…"


def _time(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
