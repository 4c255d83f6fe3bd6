"""services.scheduler.facts: patches count in the order of their acceptance."""

from functools import reduce
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.facts import KEPT_PATCHES, NOTHING_KNOWN, Facts, merge_patch
from tests.support.scheduler_table import Table

_VALUES = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.fixed_dictionaries({}, optional={"x": st.just(1)}))
_PATCHES = st.lists(st.dictionaries(st.sampled_from("abc"), _VALUES, max_size=3), min_size=1, max_size=KEPT_PATCHES + 1)


@given(_PATCHES, st.randoms(use_true_random=False))
def test_patches_in_any_order_of_arrival_give_the_same(patches: list[dict[str, Any]], random: Any) -> None:
    """As long as no more than KEPT_PATCHES newer ones came before."""
    numbered = list(enumerate(patches, start=1))
    expected: dict[str, Any] = reduce(merge_patch, patches, {})
    random.shuffle(numbered)
    facts = reduce(lambda known, one: known.patched(*one), numbered, NOTHING_KNOWN)
    assert facts.now == expected


def test_what_is_kept_is_bounded() -> None:
    """INV-9: older patches become the base."""
    facts: Facts = NOTHING_KNOWN
    for number in range(1, 50):
        facts = facts.patched(number, {"n": number, f"k{number}": 1})
    assert len(facts.recent) == KEPT_PATCHES
    assert facts.now["n"] == 49
    assert len(facts.now) == 50


def test_patches_of_one_call_count_in_its_order() -> None:
    """They share their sequence."""
    assert NOTHING_KNOWN.patched(7, {"a": 1}).patched(7, {"a": 2}).now == {"a": 2}


def test_facts_that_come_late_do_not_undo_newer_ones() -> None:
    """A frame that was lost and is sent again."""
    table = Table()
    older, newer = table.put_facts(paid=False, plan="trial"), table.put_facts(paid=True)
    table.turn(newer)
    table.turn(older)
    assert table.facts["acme", "e"].now == {"paid": True, "plan": "trial"}
