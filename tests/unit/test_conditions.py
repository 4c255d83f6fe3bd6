"""What libs.conditions promises, and how the CEL library behind it behaves."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from libs.conditions import FUNCTIONS, BadCondition, Verdict, compile_condition

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TIMER = {"entity": "account-1", "type": "trial.reminder", "due": NOW - timedelta(minutes=5)}


def decide(text: str, facts: dict[str, Any] | None = None) -> Verdict:
    """The verdict of an expression on TIMER at NOW."""
    return compile_condition(text).decide(facts or {}, TIMER, NOW)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("facts.paid", {"paid": True}),
        ("!has(facts.paid) || !facts.paid", {}),
        ("facts.plan == 'pro' && facts.seats > 3", {"plan": "pro", "seats": 4}),
        ("facts.score == 1.0", {"score": 1}),
        ("timer.entity == 'account-1' && timer.type.startsWith('trial')", {}),
        ("now > timer.due && now - timer.due < duration('1h')", {}),
        ("timestamp(facts.since) < now", {"since": "2025-12-31T00:00:00Z"}),
        ("facts.lines.exists(l, l.sku == 'a')", {"lines": [{"sku": "b"}, {"sku": "a"}]}),
        ("'paid' in facts", {"paid": None}),
        ("facts['a b'] == 1", {"a b": 1}),
        ("true // facts.x.all(", {}),
        ("now.getFullYear() == 2026 && now.getHours() == 3", {}),
    ],
)
def test_a_condition_that_is_true_holds(text: str, facts: dict[str, Any]) -> None:
    """The ordinary expressions of the contract work on facts, timer and now."""
    verdict = decide(text, facts)
    assert verdict.holds
    assert verdict.error is None


def test_a_condition_that_is_false_does_not_hold_and_is_no_error() -> None:
    """False is an answer."""
    assert decide("facts.paid", {"paid": False}) == Verdict(holds=False, facts_read={"paid": False})


@pytest.mark.parametrize(
    ("text", "facts", "error"),
    [
        ("!facts.paid", {}, "there is no 'paid'; where it may be missing, ask has() first"),
        ("has(facts.a.b)", {"a": 1}, "an operation is not defined for these types (CEL converts nothing by itself)"),
        ("facts.a > 'x'", {"a": 1}, "an operation is not defined for these types (CEL converts nothing by itself)"),
        ("facts.a / 0 == 1", {"a": 1}, "division by zero in CEL expression"),
        ("facts.list[5] == 1", {"list": [1]}, "index out of bounds: 5"),
        ("facts.a + 1 > 0", {"a": 2**63 - 1}, "Arithmetic overflow in 'add' on 9223372036854775807 and 1."),
        ("facts.name", {"name": "x"}, "must give true or false, gave a string"),
        ("facts.nothing", {"nothing": None}, "must give true or false, gave null"),
    ],
)
def test_what_cannot_be_decided_does_not_hold(text: str, facts: dict[str, Any], error: str) -> None:
    """Errors are verdicts with the reason, never exceptions."""
    verdict = decide(text, facts)
    assert not verdict.holds
    assert verdict.error == error


@pytest.mark.parametrize(
    ("text", "facts", "read"),
    [
        ("has(facts.paid) && facts.paid", {"paid": True, "other": 1}, {"paid": True}),
        ("!has(facts.paid)", {"other": 1}, {"paid": None}),
        ("facts['plan'] == 'pro' || 'x' in facts", {"plan": "pro", "x": 1, "y": 2}, {"plan": "pro", "x": 1}),
        ("facts.size() == 2", {"a": 1, "b": 2}, {"a": 1, "b": 2}),
        ("timer.entity.contains('facts.secret')", {"secret": 1}, {}),
    ],
)
def test_the_verdict_names_the_facts_read(text: str, facts: dict[str, Any], read: dict[str, Any]) -> None:
    """Named facts, None for one that is not there; all of them where the whole map is read."""
    assert decide(text, facts).facts_read == read


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be 1-2,048 characters, got 0"),
        ("true" + " " * 2045, "must be 1-2,048 characters, got 2,049"),
        ("facts.paid &&", "is not a CEL expression: at 14: Syntax error: mismatched input '<EOF>'"),
        ("facts.paid || nope", "knows no 'nope'; it may read facts, timer and now"),
        ("facts.name.reverse() == 'x'", "knows no function 'reverse'; there are"),
        ("'x'", "must give true or false, gave a string"),
        ("1 / 0 == 1", "division by zero in CEL expression"),
        ("[" * 500 + "]" * 500 + " == 1", "is not a CEL expression"),
    ],
)
def test_what_can_never_be_a_condition_is_refused_at_once(text: str, problem: str) -> None:
    """Length, syntax, names and constant results are checked when it is compiled."""
    with pytest.raises(BadCondition) as raised:
        compile_condition(text)
    assert str(raised.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("facts.l.all(a, facts.l.all(b, true))", "must not have .all() inside of another comprehension"),
        ("facts.l . filter (a, [1].existsOne(b, true)).size() == 1", "must not have .existsOne() inside of another"),
        ("['x'].map(x, x + x).map(x, x + x).size() == 1", "must not have more than 4 comprehensions, and one .map()"),
        (" && ".join(["facts.l.all(a, true)"] * 5), "must not have more than 4 comprehensions"),
        ("facts.l.all(a, a.matches('x*'))", "must not use matches() inside of a comprehension"),
    ],
)
def test_what_could_take_too_long_is_refused(text: str, problem: str) -> None:
    """CEL has no budget of its own: nesting multiplies, chained maps double (INV-9)."""
    with pytest.raises(BadCondition) as raised:
        compile_condition(text)
    assert str(raised.value).startswith(problem)


def test_comprehensions_side_by_side_are_fine() -> None:
    """The bound is on nesting, and on how many there are."""
    text = "facts.l.filter(x, x > 1).exists(x, x == 2) && !facts.l.exists(y, y == 9)"
    assert decide(text, {"l": [1, 2]}).holds


def test_a_condition_is_compiled_once() -> None:
    """The second time the same object comes from the cache."""
    assert compile_condition("facts.a == 1") is compile_condition("facts.a == 1")


@pytest.mark.parametrize("name", sorted(FUNCTIONS - {"has"}))
def test_every_function_we_name_is_one_the_library_has(name: str) -> None:
    """The list in libs.conditions is ours; a new version of the library may change its own."""
    calls = [f"{name}(facts.n)", f"{name}(facts.t)", f"facts.s.{name}()", f"facts.s.{name}('b')", f"now.{name}()"]
    facts = {"n": 1, "t": "1", "s": "ab"}
    errors = [decide(f"type({call}) == type({call})", facts).error or "" for call in calls]
    assert any("Undefined variable or function" not in error for error in errors)


@pytest.mark.parametrize(
    "text", ["||".join(["true"] * 340), "!" * 2000 + "true", "facts" + ".a" * 1000, "-" * 2000 + "1 < 2"]
)
def test_long_chains_do_not_crash_the_process(text: str) -> None:
    """They are evaluated, refused or undecided; the library's stack holds."""
    assert isinstance(decide(text), Verdict)
