"""Which template is chosen, ids that are derived, and what is told in words."""

from datetime import UTC, datetime

import pytest

from libs.ids import new_id
from services.digest.catalog import Channel
from services.digest.explaining import REASONS
from services.digest.metrics import REASONS as COUNTED_REASONS
from services.digest.rendering_jobs import Source
from services.digest.templates import TemplateKey, chosen, wanted_ids
from services.digest.views import DeliveryView, DigestView, item_id, notifications_near

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def templates(*keys: TemplateKey) -> dict[TemplateKey, Source]:
    """Templates whose names say which they are."""
    return {key: Source("/".join(key), "", "") for key in keys}


def names(found: dict[str, Source]) -> dict[str, str]:
    """Places with their templates' names."""
    return {place: source.name for place, source in found.items()}


def test_the_closest_locale_and_the_cadences_own_layout_win() -> None:
    """de-AT before de before none; digest/daily before digest; text twins are looked for too."""
    known = templates(
        ("t", "html", "summary", ""),
        ("t", "html", "summary", "de"),
        ("t", "text", "summary", ""),
        ("digest", "html", "summary", "de-AT"),
        ("digest/daily", "html", "summary", ""),
        ("digest", "text", "full", ""),
    )
    found = chosen(known, types=["t", "u"], cadence="daily", text_format="html", style="summary", locale="de-AT")
    assert names(found) == {
        "item/html/t": "t/html/summary/de",
        "layout/html": "digest/daily/html/summary/",
        "item/text/t": "t/text/summary/",
    }


def test_what_is_sent_alone_has_only_its_own_layout() -> None:
    """digest/immediate, not the layout of all digests."""
    known = templates(("digest", "text", "full", ""))
    wanted = {"types": ["t"], "text_format": "text", "style": "full", "locale": ""}
    assert chosen(known, cadence="immediate", **wanted) == {}  # type: ignore[arg-type]
    known |= templates(("digest/immediate", "text", "full", ""))
    found = chosen(known, cadence="immediate", **wanted)  # type: ignore[arg-type]
    assert names(found) == {"layout/text": "digest/immediate/text/full/"}
    assert wanted_ids(["t"], "immediate") == {"t", "digest/immediate"}


def test_json_has_its_own_templates_and_no_twin() -> None:
    """Neither HTML's nor text's are used for what webhooks get."""
    known = templates(*((one, kind, "summary", "") for one in ("t", "digest") for kind in ("html", "text", "json")))
    found = chosen(known, types=["t"], cadence="daily", text_format="json", style="summary", locale="")
    assert names(found) == {"item/json/t": "t/json/summary/", "layout/json": "digest/json/summary/"}


def test_an_items_id_leads_back_to_its_notification() -> None:
    """Different per subscriber and choice, the same each time, within the notification's range."""
    notification = new_id()
    one, other = item_id(notification, "ann", "daily"), item_id(notification, "bob", "daily")
    assert one != other
    assert one == item_id(notification, "ann", "daily")
    low, high = notifications_near(one)
    assert low <= notification <= high


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], "failed"),
        (["pending"], "pending"),
        (["sent", "pending"], "pending"),
        (["sent", "sent"], "sent"),
        (["sent", "dead"], "failed"),
        (["pending", "held"], "failed"),
    ],
)
def test_a_digests_outcome_is_the_worst_of_its_deliveries(outcomes: list[str], expected: str) -> None:
    """One that could not be rendered has none, and has failed."""
    deliveries = [DeliveryView(id=new_id(), outcome=one, reason="", ended_at=None) for one in outcomes]
    digest = DigestView(
        id=new_id(),
        subscriber="ann",
        cadence="daily",
        channel=Channel.EMAIL,
        subject="",
        closed_at=NOW,
        item_count=1,
        template_error="",
        deliveries=deliveries,
    )
    assert digest.outcome == expected


def test_every_reason_is_told_in_words_and_counted_from_zero() -> None:
    """A reason that is new has a sentence and a metric."""
    assert set(REASONS) == set(COUNTED_REASONS)
