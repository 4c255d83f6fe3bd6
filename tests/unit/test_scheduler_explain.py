"""What is told of a timer."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import replace

from services.scheduler import verdicts
from services.scheduler.attempts import EndedAttempt
from services.scheduler.conditions import Answer, NoAnswer, ServiceCondition
from services.scheduler.explain import Entry, explain_timer
from services.scheduler.timer import BEGINNING, State, StepOf
from tests.support.scheduler_table import DAY, HOUR, MINUTE, NOW, SECOND, timer

ONE = replace(timer(NOW, UUID(int=1)), entity="order-1")
ONE_ID = "00000000-0000-0000-0000-000000000001"
NAME = f"The timer {ONE_ID} of order-1"
CRM = ServiceCondition(service="crm", timeout=5 * SECOND, no_answer=NoAnswer.SKIP)


def _told(**changed: Any) -> Entry:
    (entry,) = explain_timer(replace(ONE, **changed))
    return entry


def _sentence(**changed: Any) -> str:
    """Without the timer's name."""
    sentence = _told(**changed).sentence
    assert sentence.startswith(NAME)
    return sentence.removeprefix(NAME)


def test_a_waiting_timer_is_expected_at_its_turn() -> None:
    """With what it depends on."""
    entry = _told()
    assert (entry.at, entry.kind, entry.is_expected) == (NOW, "timer_expected", True)
    assert entry.sentence == f"{NAME} will fire."
    assert _sentence(condition="facts.x") == " will fire, if its condition is true then."
    assert _sentence(asked=CRM) == " will fire, if crm says so then."
    assert entry.details == {"timer_id": ONE_ID, "entity": "order-1", "type": "", "due": NOW.isoformat()}
    assert entry.related_ids == ()


@pytest.mark.parametrize("state", [state for state in State if state is not State.SCHEDULED])
def test_every_other_state_has_a_kind_and_a_sentence_of_its_own(state: State) -> None:
    """Only one that waits for its next attempt is a promise; the others are facts."""
    entry = _told(state=state, decided_at=NOW + MINUTE, asked=CRM)
    assert entry.kind == f"timer_{state.name.lower()}"
    assert entry.sentence.startswith(f"{NAME} ")
    assert entry.is_expected == (state is State.RETRYING)


def test_a_paused_timer_tells_when_its_turn_would_be() -> None:
    """It would come at once if that has passed."""
    assert _told(state=State.PAUSED).at == NOW
    sentence = " is paused; it would have its turn at 2013-07-01 12:00:00 UTC, or once it is resumed."
    assert _sentence(state=State.PAUSED) == sentence


def test_a_timer_that_awaits_its_report_tells_until_when() -> None:
    """It happened when the event was sent; its turn is the deadline."""
    awaiting = {"state": State.AWAITING, "report_within": HOUR, "fire_at": NOW + HOUR, "attempts": 2}
    assert _told(**awaiting).at == NOW
    assert _sentence(**awaiting) == " sent its event (attempt 2) and awaits a report until 2013-07-01 13:00:00 UTC."


def test_a_timer_that_is_tried_again_tells_why_and_when() -> None:
    """And that it is not the first time."""
    retrying = {"state": State.RETRYING, "attempts": 2, "last_error": "no such\naccount.", "fire_at": NOW + MINUTE}
    assert (_told(**retrying).at, _told(**retrying).is_expected) == (NOW + MINUTE, True)
    assert _sentence(**retrying) == " will be tried again, as attempt 3; attempt 2 failed: no such account."
    assert _told(**retrying).details["last_error"] == "no such\naccount."
    assert _sentence(state=State.RETRYING) == " has its turn, and will fire now."


def test_a_timer_whose_service_is_asked_tells_which_and_how_often() -> None:
    """With what came back so far."""
    asking = {"state": State.ASKING, "asked": CRM, "asks": 2, "fire_at": NOW + MINUTE}
    told = " is due, and crm is being asked whether it is to fire (2 of 3 questions came to no answer"
    assert _sentence(**asking) == f"{told})."
    assert _sentence(**asking, last_error="it answered 503") == f"{told}; most recently: it answered 503)."
    assert _told(**asking).at == NOW


def test_a_buffered_occurrence_tells_what_it_waits_for() -> None:
    """By id where that is known, and the id leads on from there."""
    occurrence = replace(ONE, state=State.BUFFERED, schedule_id=UUID(int=2), occurrence=7, nominal_at=NOW)
    (entry,) = explain_timer(occurrence, waits_for=[UUID(int=3)])
    schedule, other = UUID(int=2), UUID(int=3)
    name = f"Occurrence 7 of the schedule {schedule} of order-1"
    assert entry.sentence == f"{name} is due, and waits until {other} has an outcome."
    assert entry.related_ids == (str(schedule), str(other))
    (entry,) = explain_timer(occurrence)
    assert entry.sentence == f"{name} is due, and waits until the occurrence before it has an outcome."


def test_a_cancelled_timer_says_why() -> None:
    """The cause, in its caller's words; it may look like anything."""
    assert _sentence(state=State.CANCELLED, note="the account was closed") == " was cancelled: the account was closed."
    assert _sentence(state=State.CANCELLED, note='{"holds": false}') == ' was cancelled: {"holds": false}.'
    assert _sentence(state=State.CANCELLED) == " was cancelled."
    assert _told(state=State.CANCELLED, note="the account was closed").details["note"] == "the account was closed"


def test_a_fired_timer_without_a_verdict_fired_in_its_turn() -> None:
    """Nothing is stored of an unconditional firing but the watermark."""
    assert (_told(state=State.FIRED).at, _sentence(state=State.FIRED)) == (NOW, " fired.")


def test_an_expired_timer_tells_until_when_it_was_worth_firing() -> None:
    """The time is the caller's."""
    expired = {"state": State.EXPIRED, "expires_at": NOW + DAY}
    assert _sentence(**expired) == " was not fired, because it had expired at 2013-07-02 12:00:00 UTC."


def test_the_end_tells_how_many_attempts_it_took() -> None:
    """Failed for good says why; one that was never tried has no attempts."""
    assert _sentence(state=State.DONE, attempts=1) == " is done after 1 attempt."
    failed = {"state": State.FAILED, "attempts": 8, "last_error": "no report came within 1:00:00"}
    assert _sentence(**failed) == " failed for good after 8 attempts: no report came within 1:00:00."
    assert _sentence(state=State.FAILED, last_error="no such key") == " failed for good: no such key."


def _at_its_time(**changed: Any) -> str:
    decided = verdicts.at_its_time(
        replace(ONE, **changed), siblings=(), facts={"paid": True}, watermark=BEGINNING, now=NOW
    )
    (entry,) = explain_timer(decided)
    return entry.sentence.removeprefix(NAME)


def _answered(holds: bool, reason: str = "") -> str:
    asking = replace(ONE, state=State.ASKING, asked=CRM, asks=1)
    answer = Answer(shard=0, timer_id=ONE.id, number=1, holds=holds, reason=reason)
    decided = verdicts.answered(asking, answer, watermark=BEGINNING, now=NOW)
    (entry,) = explain_timer(replace(decided, state=State.FIRED) if holds else decided)
    return entry.sentence.removeprefix(NAME)


def test_a_condition_is_told_with_the_facts_it_read() -> None:
    """From the verdict as it is put on record."""
    read = 'of the facts {"paid": true}'
    assert _at_its_time(condition="facts.paid") == f" fired, because its condition was true {read}."
    unpaid = " was due and did not fire, because its condition was not true"
    assert _at_its_time(condition="!facts.paid") == f"{unpaid} {read}."
    assert _at_its_time(condition="false") == f"{unpaid}."


def test_what_a_service_said_is_told_with_its_reason() -> None:
    """Or that it said nothing, and what its policy made of that."""
    assert _answered(True) == " fired, because crm said yes."
    assert _answered(False, "paid by cash") == " was due and did not fire, because crm said no: paid by cash."
    silent = _at_its_time(asked=CRM, asks=3, state=State.ASKING, last_error="it answered 503")
    as_policy = "as its policy says where there is no answer: crm gave no answer: it answered 503"
    assert silent == f" was due and did not fire, {as_policy}."
    assert _at_its_time(asked=replace(CRM, no_answer=NoAnswer.FIRE), asks=3, state=State.ASKING).startswith(
        " fired, as"
    )


@pytest.mark.parametrize(
    ("note", "told"),
    [
        (
            verdicts.note_of(skipped="it came due while nothing could fire", late_s=7_200.5),
            ", because it came due while nothing could fire and is 7,200 s late",
        ),
        (
            verdicts.note_of(skipped="the occurrence before it has no outcome yet"),
            ", because the occurrence before it has no outcome yet",
        ),
        (verdicts.note_of(condition="x" * 5_000, holds=False, facts={}), ""),
        ("[]", ""),
        ("not JSON", ""),
        (None, ""),
    ],
)
def test_a_skip_tells_the_policy_that_decided(note: str | None, told: str) -> None:
    """A record that was cut, or that nobody can read, is told without a reason."""
    assert _sentence(state=State.SKIPPED, note=note) == f" was due and did not fire{told}."


def test_attempts_are_entries_of_their_own() -> None:
    """Each at its end, before what became of the timer."""
    attempts = [
        EndedAttempt(timer_id=ONE.id, number=1, started_at=NOW, ended_at=NOW + MINUTE, error="no such account"),
        EndedAttempt(timer_id=ONE.id, number=2, started_at=NOW + HOUR, ended_at=NOW + HOUR + MINUTE, error=None),
    ]
    done = replace(ONE, state=State.DONE, decided_at=NOW + HOUR + MINUTE, attempts=2)
    failed, succeeded, end = explain_timer(done, attempts)
    name = NAME.replace("The", "the")
    assert failed.sentence == f"Attempt 1 of {name}, begun at 2013-07-01 12:00:00 UTC, failed: no such account."
    assert succeeded.sentence == f"Attempt 2 of {name}, begun at 2013-07-01 13:00:00 UTC, was reported done."
    assert [one.kind for one in (failed, succeeded, end)] == ["attempt_failed", "attempt_done", "timer_done"]
    assert [one.at for one in (failed, succeeded)] == [NOW + MINUTE, NOW + HOUR + MINUTE]
    assert (failed.details["attempt"], end.details["attempts"]) == ("1", "2")


def test_a_step_is_told_by_its_name() -> None:
    """Nobody knows the ids of steps; the run's leads on."""
    step_of = StepOf(run_id=UUID(int=2), timeline="trial", version=3, step="remind")
    entry = _told(step_of=step_of)
    assert entry.sentence == "The step remind of the timeline trial for order-1 will fire."
    told = [entry.details[key] for key in ("timeline", "timeline_version", "step", "timeline_run_id")]
    assert told == ["trial", "3", "remind", str(UUID(int=2))]
    assert entry.related_ids == (str(UUID(int=2)),)


def test_what_a_schedule_made_is_told_with_the_schedule() -> None:
    """Occurrences by their numbers, those made up for by their times, triggered ones by their ids."""
    schedule = f"the schedule {UUID(int=2)} of order-1"
    made = {"schedule_id": UUID(int=2)}
    assert _told(**made, occurrence=4, nominal_at=NOW).sentence == f"Occurrence 4 of {schedule} will fire."
    backfilled = _told(**made, nominal_at=NOW)
    assert backfilled.sentence == f"The backfilled occurrence 2013-07-01 12:00:00 UTC of {schedule} will fire."
    assert backfilled.details["nominal"] == NOW.isoformat()
    assert _told(**made).sentence == f"The triggered timer {ONE_ID} of {schedule} will fire."


def test_no_sentence_is_longer_than_the_contract_allows() -> None:
    """Whatever names and errors there are; the whole error is in the details."""
    longest = {"entity": "\U0001f514" * 256, "last_error": "e" * 2_048, "attempts": 100}
    step_of = StepOf(run_id=UUID(int=2), timeline="t" * 128, version=1, step="s" * 64)
    attempt = EndedAttempt(timer_id=ONE.id, number=1, started_at=NOW, ended_at=NOW + timedelta(1), error="e" * 2_048)
    entries = [*explain_timer(replace(ONE, state=State.FAILED, step_of=step_of, **longest), [attempt])]
    assert [len(entry.sentence) <= 1_000 for entry in entries] == [True, True]
    assert all(entry.details["last_error"] == "e" * 2_048 and len(entry.details) <= 32 for entry in entries)
