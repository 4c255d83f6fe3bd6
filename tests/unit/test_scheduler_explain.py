"""What is told of a timer."""

from dataclasses import replace
from uuid import UUID

import pytest

from services.scheduler.explain import Entry, explain_timer
from services.scheduler.timer import State, StepOf
from tests.support.scheduler_table import MINUTE, NOW, timer

ONE = replace(timer(NOW, UUID(int=1)), entity="order-1")
NAME = "The timer 00000000-0000-0000-0000-000000000001 of order-1"


def _told(**changed: object) -> Entry:
    (entry,) = explain_timer(replace(ONE, **changed))  # type: ignore[arg-type]
    return entry


def test_a_waiting_timer_is_expected_at_its_turn() -> None:
    """With what it depends on."""
    entry = _told()
    assert (entry.at, entry.kind, entry.is_expected) == (NOW, "timer_expected", True)
    assert entry.sentence == f"{NAME} will fire."
    assert _told(condition="facts.x").sentence == f"{NAME} will fire, if its condition is true then."
    assert entry.details == {"timer_id": str(ONE.id), "entity": "order-1", "type": "", "due": NOW.isoformat()}


@pytest.mark.parametrize("state", [state for state in State if state is not State.SCHEDULED])
def test_every_other_state_is_told_as_a_fact(state: State) -> None:
    """None of them is a promise, and each says which state it is."""
    entry = _told(state=state, decided_at=NOW + MINUTE)
    assert entry.kind == f"timer_{state.name.lower()}"
    assert entry.sentence.startswith(NAME)
    assert not entry.is_expected
    assert entry.at == (NOW if state is State.PAUSED else NOW + MINUTE)


def test_a_cancelled_timer_says_why() -> None:
    """The cause is in the details."""
    entry = _told(state=State.CANCELLED, note="the account was closed")
    assert entry.sentence == f"{NAME} was cancelled."
    assert entry.details["note"] == "the account was closed"


def test_a_fired_timer_without_a_verdict_fired_in_its_turn() -> None:
    """Nothing is stored of an unconditional firing but the watermark."""
    assert (_told(state=State.FIRED).at, _told(state=State.FIRED).sentence) == (NOW, f"{NAME} fired.")


def test_a_step_is_told_by_its_name() -> None:
    """Nobody knows the ids of steps."""
    step_of = StepOf(run_id=UUID(int=2), timeline="trial", version=1, step="remind")
    assert _told(step_of=step_of).sentence == "The step remind of the timeline trial for order-1 will fire."
