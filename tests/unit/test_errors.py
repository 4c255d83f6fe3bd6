"""Errors: reasons, messages, and violations that are collected before they are raised."""

from datetime import timedelta

import pytest

from libs import errors
from libs.errors import CarillonError, FieldViolation, InvalidArgument, Violations


def test_an_error_without_a_message_says_its_docstring() -> None:
    """So every error reads as a sentence."""
    assert errors.NotFound().message == "There is nothing with this id for this tenant."


def test_an_error_carries_its_own_reason_or_its_classes() -> None:
    """Programs branch on the reason."""
    assert errors.NotFound().reason == "NOT_FOUND"
    assert errors.NotFound(reason="TIMER_NOT_FOUND", metadata={"id": "7"}).metadata == {"id": "7"}


@pytest.mark.parametrize("reason", ["lower", "WITH SPACE", "1ST", "A" * 64])
def test_a_reason_that_is_not_upper_snake_is_a_bug(reason: str) -> None:
    """google.rpc.ErrorInfo asks for this form."""
    with pytest.raises(ValueError, match="UPPER_SNAKE"):
        CarillonError(reason=reason)


def test_only_limits_and_outages_are_retryable() -> None:
    """Retryable or not is part of the type."""
    classes = CarillonError.__subclasses__()
    assert {cls.__name__ for cls in classes if cls.retryable} == {"ResourceExhausted", "Unavailable"}


def test_a_limit_says_when_to_come_back() -> None:
    """INV-9."""
    assert errors.ResourceExhausted(retry_after=timedelta(seconds=1)).retry_after == timedelta(seconds=1)


def test_no_violations_raise_nothing() -> None:
    """A sound request goes on."""
    violations = Violations()
    violations.raise_if_any()
    assert not violations


def test_all_violations_are_raised_together() -> None:
    """The caller hears everything at once, in the order found."""
    violations = Violations()
    violations.add("a", "must be set")
    violations.extend([FieldViolation("b", "must be a UUID")])
    with pytest.raises(InvalidArgument) as caught:
        violations.raise_if_any()
    assert caught.value.violations == (FieldViolation("a", "must be set"), FieldViolation("b", "must be a UUID"))
    assert caught.value.message == "a must be set; b must be a UUID"


def test_violations_past_the_limit_are_counted_not_kept() -> None:
    """A status is small; a request may have a thousand items."""
    violations = Violations(limit=2)
    for number in range(5):
        violations.add(f"items[{number}]", "is wrong")
    with pytest.raises(InvalidArgument, match="3 more not listed") as caught:
        violations.raise_if_any()
    assert len(caught.value.violations) == 2
