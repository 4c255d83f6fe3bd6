"""Which notifications are expanded together."""

from collections.abc import Sequence
from datetime import UTC, datetime

from libs.ids import new_id
from services.digest.commands import Notification
from services.digest.store_slices import sliced

AT = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
LISTENERS = {("acme", "few"): 2, ("acme", "many"): 9, ("acme", "nobody"): 0, ("other", "few"): 3}


def told(name: str, *topics: str, subscribers: Sequence[str] = (), tenant: str = "acme") -> Notification:
    """A notification whose payload is a name."""
    return Notification(
        tenant=tenant,
        id=new_id(),
        type="t",
        entity="",
        group_key="",
        payload=name,
        subscribers=subscribers,
        topics=list(topics),
        occurred_at=AT,
    )


def names(notifications: Sequence[Notification], most: int) -> list[str]:
    """The slices, each with its names run together."""
    return ["".join(one.payload for one in part) for part in sliced(notifications, LISTENERS, most=most)]


def test_what_fits_together_stays_together_and_in_order() -> None:
    """Nearly always: three told directly, two by a topic."""
    assert names([told("b", "few"), told("a", subscribers=["x", "y", "z"])], 5) == ["ba"]


def test_a_slice_has_no_more_items_than_it_may() -> None:
    """By who is told directly, and by all of its topics."""
    six = [told(name, subscribers=["x", "y"]) for name in "abcdef"]
    assert names(six, 4) == ["ab", "cd", "ef"]
    assert names(six, 5) == ["ab", "cd", "ef"]
    assert names([told("a", "few", "many"), told("b", subscribers=["x"])], 11) == ["b", "a"]


def test_a_notification_that_is_more_than_a_slice_has_one_of_its_own() -> None:
    """It cannot be divided."""
    many = [told("a", subscribers=["x"]), told("b", "many"), told("c", "many"), told("d", "nobody")]
    assert names(many, 3) == ["a", "b", "c", "d"]


def test_slices_are_in_the_order_of_tenants_and_topics() -> None:
    """As the same windows are opened by everybody; the listeners of one tenant's topic are not another's."""
    mixed = [told("d", "few", tenant="other"), told("c", "many"), told("a", "few"), told("b", "few")]
    assert names(mixed, 4) == ["ab", "c", "d"]
