"""Conditions that a business service decides, as the shard sees them: questions out, answers in."""

from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import replace

from services.scheduler.commands import ScheduleTimer
from services.scheduler.conditions import MAX_ASKS, NoAnswer, ServiceCondition
from services.scheduler.facts import Facts
from services.scheduler.timer import State
from tests.support.scheduler_table import DAY, HOUR, MINUTE, NOW, SECOND, Table, hourly, ids


def _asked(no_answer: NoAnswer = NoAnswer.FAIL) -> ServiceCondition:
    return ServiceCondition(service="stock", timeout=5 * SECOND, no_answer=no_answer)


def _asking(**more: Any) -> tuple[Table, ScheduleTimer]:
    """A table whose timer is being asked about for the first time."""
    table = Table(facts={("acme", "e"): Facts(now={"sku": 7})})
    table.run(one := table.schedule(NOW, **{"asked": _asked(), "type": "offer", **more}))
    assert table.state_of(one.id) is State.ASKING
    return table, one


def _ask_all(table: Table, timer_id: UUID) -> None:
    """Ask as often as may be, and get no answer."""
    while table.state_of(timer_id) is State.ASKING:
        if table.rows[timer_id].asks < MAX_ASKS:
            table.turn(answers=[table.answer(None, "503 Service Unavailable")])
        table.run(until=table.rows[timer_id].fire_at)


def test_a_timer_that_is_due_asks_and_does_not_hold_up_the_others() -> None:
    """The question says what the service needs; the sibling fires in the same turn."""
    table = Table(facts={("acme", "e"): Facts(now={"sku": 7})})
    one, sibling = table.schedule(NOW, asked=_asked(), type="offer"), table.schedule(NOW)
    assert ids(table.run(one, sibling)) == [sibling.id]
    (question,) = table.questions
    assert (question.timer_id, question.number, question.condition) == (one.id, 1, _asked())
    assert question.about == {
        "tenant": "acme",
        "entity": "e",
        "timer_id": str(one.id),
        "type": "offer",
        "due_time": NOW.isoformat(),
        "facts": {"sku": 7},
    }
    assert table.rows[one.id].fire_at == NOW + 6 * SECOND  # The timeout, and a second of backoff.


def test_it_fires_when_the_answer_is_yes() -> None:
    """Once, with the answer on record; nothing is asked any more."""
    table, one = _asking()
    assert ids(table.run(answers=[table.answer(holds=True, reason="3 left")], until=SECOND)) == [one.id]
    assert table.state_of(one.id) is State.FIRED
    assert table.rows[one.id].note == '{"asked": "stock", "holds": true, "reason": "3 left"}'
    assert table.run(until=DAY) == []
    assert len(table.questions) == 1


def test_it_is_skipped_when_the_answer_is_no() -> None:
    """With the reason."""
    table, one = _asking()
    assert table.run(answers=[table.answer(holds=False, reason="sold out")], until=DAY) == []
    assert table.state_of(one.id) is State.SKIPPED
    assert table.rows[one.id].note == '{"asked": "stock", "holds": false, "reason": "sold out"}'


def test_it_awaits_its_report_like_any_other_when_the_answer_is_yes() -> None:
    """An event of which the service has a say."""
    table, one = _asking(report_within=MINUTE)
    table.run(answers=[table.answer(holds=True)], until=SECOND)
    assert (table.state_of(one.id), table.rows[one.id].attempts) == (State.AWAITING, 1)


def test_silence_is_asked_again_with_growing_pauses() -> None:
    """The answer's time, then 1, 2 and 4 seconds."""
    table, one = _asking()
    pauses = []
    while table.state_of(one.id) is State.ASKING:
        pauses.append(table.rows[one.id].fire_at - table.now)
        table.turn(answers=[table.answer(None, "timed out")])
        table.run(until=table.rows[one.id].fire_at)
    assert pauses == [6 * SECOND, 7 * SECOND, 9 * SECOND]
    assert [question.number for question in table.questions] == [1, 2, 3]


@pytest.mark.parametrize(
    ("no_answer", "state"),
    [(NoAnswer.FAIL, State.FAILED), (NoAnswer.FIRE, State.FIRED), (NoAnswer.SKIP, State.SKIPPED)],
)
def test_lasting_silence_is_as_the_policy_says(no_answer: NoAnswer, state: State) -> None:
    """After three questions, with the last error on record."""
    table, one = _asking(asked=_asked(no_answer))
    _ask_all(table, one.id)
    row = table.rows[one.id]
    assert (table.state_of(one.id), len(table.questions)) == (state, MAX_ASKS)
    told = row.last_error if state is State.FAILED else row.note
    assert "stock gave no answer: 503 Service Unavailable" in (told or "")
    assert len(table.fired) == (state is State.FIRED)


def test_an_error_is_kept_and_the_next_question_comes_in_its_time() -> None:
    """An answer that is none hurries nothing."""
    table, one = _asking()
    before = table.rows[one.id].fire_at
    table.turn(answers=[table.answer(None, "x" * 9_999)])
    row = table.rows[one.id]
    assert (row.state, row.fire_at, len(row.last_error or "")) == (State.ASKING, before, 2_048)


def test_a_verdict_counts_from_an_earlier_question_too() -> None:
    """The service was slow, not silent."""
    table, one = _asking()
    late = table.answer(holds=True)
    table.run(answers=[table.answer(None, "timed out")], until=6 * SECOND)
    assert table.questions[-1].number == 2
    table.run(answers=[late], until=SECOND)
    assert table.state_of(one.id) is State.FIRED


def test_an_error_of_an_earlier_question_says_nothing_of_the_one_that_is_open() -> None:
    """Nor does an answer to a question that was never put."""
    table, one = _asking()
    late = table.answer(None, "timed out")
    table.run(answers=[late], until=6 * SECOND)
    before = table.rows[one.id]
    table.turn(answers=[late, table.answer(holds=True, number=9)])
    assert table.rows[one.id] == before


def test_a_question_that_was_not_put_does_not_count() -> None:
    """The service had too many already: that is not its silence, and it is asked as often as it may be."""
    table, one = _asking()
    for _ in range(5):
        table.turn(answers=[replace(table.answer(None, "too many at once"), was_asked=False)])
        table.run(until=table.rows[one.id].fire_at)
    assert table.state_of(one.id) is State.ASKING
    before = len(table.questions)
    _ask_all(table, one.id)
    assert len(table.questions) - before == MAX_ASKS - 1  # One is out.


@pytest.mark.parametrize("holds", [True, False, None])
def test_an_answer_that_comes_twice_or_too_late_changes_nothing(holds: bool | None) -> None:
    """In the same turn, and after the verdict."""
    table, one = _asking()
    answer = table.answer(holds=not holds)
    table.run(answers=[answer, answer, table.answer(holds)], until=SECOND)
    before = table.rows[one.id]
    assert table.state_of(one.id) is (State.SKIPPED if holds else State.FIRED)
    assert table.run(answers=[answer, table.answer(holds)], until=DAY) == []
    assert table.rows[one.id] == before


def test_a_timer_is_asked_about_again_by_its_next_owner() -> None:
    """Nobody knows what came of the question, so it is put once more, however many owners it takes."""
    table, one = _asking()
    for _ in range(5):
        table.take_over()
        table.run(until=table.rows[one.id].fire_at)
    assert [question.number for question in table.questions] == [1] * 6
    table.run(answers=[table.answer(holds=True)], until=SECOND)
    assert table.state_of(one.id) is State.FIRED


def test_a_timer_can_expire_while_it_is_asked_about() -> None:
    """Also where the answer is yes, but too late."""
    table, one = _asking(expires_at=NOW + 2 * SECOND)
    _ask_all(table, one.id)
    assert table.state_of(one.id) is State.EXPIRED
    table, one = _asking(expires_at=NOW + 2 * SECOND)
    table.now = NOW + 3 * SECOND
    assert table.run(answers=[table.answer(holds=True)]) == []
    assert table.state_of(one.id) is State.EXPIRED


def test_a_cancel_while_it_is_asked_about_counts_as_cancelled() -> None:
    """Nothing has left; the answer comes to nothing."""
    table, one = _asking()
    (outcome,) = table.turn(table.cancel()).outcomes
    assert (outcome.changed, outcome.already_left) == (1, 0)
    assert table.run(answers=[table.answer(holds=True)], until=DAY) == []
    assert table.state_of(one.id) is State.CANCELLED


def test_it_can_be_neither_paused_nor_rescheduled_while_it_is_asked_about() -> None:
    """Its time has come."""
    table, one = _asking()
    before = table.rows[one.id]
    outcomes = table.turn(table.pause(), table.reschedule(NOW + DAY)).outcomes
    assert ([outcome.changed for outcome in outcomes], table.rows[one.id]) == ([0, 0], before)


def test_each_attempt_asks_anew() -> None:
    """From the first question on, whatever was said before."""
    table, one = _asking(report_within=MINUTE)
    table.turn(answers=[table.answer(None, "slow")])
    table.run(until=6 * SECOND)
    table.run(answers=[table.answer(holds=True)], until=SECOND)
    table.turn(table.report(one.id, error="no room"))
    table.run(until=HOUR)
    assert [question.number for question in table.questions] == [1, 2, 1]
    table.run(answers=[table.answer(holds=False)], until=SECOND)
    assert table.state_of(one.id) is State.SKIPPED
    assert len(table.fired) == 1


def test_a_recurrence_asks_about_each_occurrence_and_goes_on() -> None:
    """The next one is made when this one's time has come, not when its answer has."""
    table = Table()
    table.turn(schedule := table.schedule(None, recurrence=hourly(), asked=_asked(NoAnswer.SKIP)))
    table.run(until=NOW + HOUR)
    assert [table.state_of(row.id) for row in table.of(schedule.id)] == [State.ASKING, State.SCHEDULED]
    table.go(NOW + 3 * HOUR + MINUTE)
    assert [table.state_of(row.id) for row in table.of(schedule.id)] == [State.SKIPPED] * 3 + [State.SCHEDULED]
