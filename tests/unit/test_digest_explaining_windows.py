"""Every sentence that Explain can say of windows, digests and subscribers, word for word."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from services.digest.catalog import ItemState, Subscriber, WindowKind, WindowState
from services.digest.explaining_subscribers import of_subscriber
from services.digest.explaining_windows import of_digest, of_window
from services.digest.stories import Facts, KnownCadence
from services.digest.views import DigestView, WindowView
from tests.support.digest_story import (
    ALONE,
    ANN,
    BACK,
    DAILY,
    DEAD,
    DIGEST,
    FACTS,
    HELD,
    HOUR,
    NOW,
    OPEN,
    PART_1,
    QUIET,
    QUIET_AT_NOON,
    SUBSCRIBED,
    delivered,
    facts,
)

CLOSED = replace(OPEN, state=WindowState.CLOSED, closed_at=NOW)
GONE = ((ItemState.CANCELLED, "", 2), (ItemState.SUPPRESSED, "no_address", 1), (ItemState.DIGESTED, "", 3))


@pytest.mark.parametrize(
    ("one", "counts", "known", "sentence"),
    [
        (OPEN, (), FACTS, "The window has 3 items, and closes on Tue 3 Mar 2026, 08:00 (Europe/Berlin)."),
        (
            replace(OPEN, items=1),
            GONE[:1],
            FACTS,
            "The window has 1 item, and closes on Tue 3 Mar 2026, 08:00 (Europe/Berlin). 2 items were cancelled"
            " already.",
        ),
        (
            replace(OPEN, **HELD),
            (),
            FACTS,
            "The window has 3 items, and is held by the quiet hours of ann until Mon 2 Mar 2026, 14:00"
            " (Europe/Berlin).",
        ),
        (replace(OPEN, state=WindowState.CLOSING), (), FACTS, "The window has 3 items, and is about to be rendered."),
        (
            replace(OPEN, state=WindowState.CLOSING, due_at=NOW, is_asked_about=True),
            (),
            facts(subscribers={"ann": QUIET_AT_NOON}),
            "The window has 3 items, and waits for business services to format its items, and is then rendered; then"
            " quiet hours hold it until Mon 2 Mar 2026, 14:00 (Europe/Berlin).",
        ),
        (CLOSED, GONE[2:], FACTS, "The window closed, and what was in it left."),
        (
            CLOSED,
            GONE,
            FACTS,
            "The window closed, and what was in it left as the digest of the same id; 2 items were cancelled, 1 item"
            " was suppressed (no_address).",
        ),
        (
            CLOSED,
            GONE[:2],
            facts(digests={}),
            "The window closed with nothing to send: 2 items were cancelled, 1 item was suppressed (no_address).",
        ),
        (
            CLOSED,
            (),
            facts(digests={}),
            "The window closed empty: what was in it has moved to another window of the same cadence, or is kept no"
            " longer.",
        ),
    ],
)
def test_what_a_window_will_do_and_has_done(
    one: WindowView, counts: tuple[tuple[ItemState, str, int], ...], known: Facts, sentence: str
) -> None:
    """In every state."""
    opened, told = of_window(one, counts, known)
    assert opened.sentence == "A window of the cadence Daily opened for ann by email."
    assert told.sentence == sentence
    assert told.is_expected is (one.closed_at is None)


def test_what_is_sent_alone_has_no_cadence_to_speak_of() -> None:
    """Its window is a detail nobody asked for."""
    opened, _ = of_window(ALONE, (), FACTS)
    assert opened.sentence == "Something for ann by email came that is sent alone."


@pytest.mark.parametrize(
    ("one", "sentences"),
    [
        (
            DIGEST,
            [
                "A digest (Daily) of 3 items for ann was handed to the dispatcher for email and was sent.",
                "It was sent, the dispatcher reported.",
            ],
        ),
        (
            replace(delivered("dead", "550"), item_count=1, template_error="division by zero"),
            [
                "A digest (Daily) of 1 item for ann was handed to the dispatcher for email but could not be delivered:"
                f" 550. {BACK}",
                "It could not be delivered, the dispatcher reported: 550.",
            ],
        ),
        (
            delivered("pending", "", PART_1),
            [
                "A digest (Daily) of 3 items for ann was handed to the dispatcher in 2 parts for email and is with the"
                " dispatcher, which has not said yet what became of it.",
                "Part 1 of 2 was sent, the dispatcher reported.",
                "Part 2 of 2 is with the dispatcher, which has not said yet what became of it.",
            ],
        ),
        (
            delivered("suppressed", "complained"),
            [
                "A digest (Daily) of 3 items for ann was handed to the dispatcher for email but was not delivered,"
                " because the address is suppressed: complained.",
                "It was not sent, because the address is suppressed, the dispatcher reported: complained.",
            ],
        ),
        (
            DEAD,
            [
                "A digest (Daily) of 3 items for ann could not be rendered, not even by the built-in templates: out"
                " of memory"
            ],
        ),
    ],
)
def test_what_became_of_a_digest(one: DigestView, sentences: list[str]) -> None:
    """As a whole, and of each part what the dispatcher said."""
    assert [told.sentence for told in of_digest(one, FACTS)] == sentences


CHOICES = [
    ({}, "Of flight.*, ann is told in the digest Daily, next on Mon 2 Mar 2026, 14:00 (Europe/Berlin), by email."),
    ({"cadence": "off", "channel": ""}, "Of flight.*, ann is told nothing, unless the type is mandatory."),
    (
        {"cadence": "immediate", "topic": "news", "filter": "payload.n > 3"},
        "Of flight.*, by the topic news, ann is told at once, by email. What the filter says no to is left out:"
        " payload.n > 3",
    ),
    ({"cadence": "gone"}, "Of flight.*, ann is told nothing, because the cadence gone does not exist, by email."),
    ({"cadence": "over"}, "Of flight.*, ann is told nothing, because the cadence over has no next time, by email."),
    (
        {"cadence": "batch", "channel": ""},
        "Of flight.*, ann is told in the digest batch, when the batch rebooking is triggered.",
    ),
    (
        {"cadence": "rolling"},
        "Of flight.*, ann is told in the digest rolling, 30 minutes after the first item, or 5 items, by email.",
    ),
]
CADENCES = {
    "daily": DAILY,
    "over": KnownCadence(id="over", name="", kind=WindowKind.ALIGNED),
    "batch": KnownCadence(id="batch", name="", kind=WindowKind.EXTERNAL, batch="rebooking"),
    "rolling": KnownCadence(
        id="rolling", name="", kind=WindowKind.ROLLING, duration=timedelta(minutes=30), maximum_items=5
    ),
}


@pytest.mark.parametrize(("choice", "sentence"), CHOICES)
def test_what_a_subscription_means_now(choice: dict[str, Any], sentence: str) -> None:
    """How often, by what, and when next on the subscriber's clock."""
    known = facts(cadences=CADENCES)
    choices = [replace(SUBSCRIBED, **choice)]
    _, told = of_subscriber(ANN, choices, known, lambda cadence, _zone: NOW + HOUR if cadence.id == "daily" else None)
    assert told.sentence == sentence


@pytest.mark.parametrize(
    ("one", "sentences"),
    [
        (ANN, ["ann has an email address, and lives in the zone Europe/Berlin."]),
        (
            replace(ANN, email="", zone="UTC"),
            ["ann has no address, and so gets nothing but what goes to the log, and lives in the zone UTC."],
        ),
        (
            replace(QUIET, webhook_url="https://example.com"),
            [
                "ann has an email address and a webhook URL, and lives in the zone Europe/Berlin.",
                "Quiet hours of ann are 08:00–09:00 (email); it is not quiet now.",
            ],
        ),
        (
            QUIET_AT_NOON,
            [
                "ann has an email address, and lives in the zone Europe/Berlin.",
                "Quiet hours of ann are 12:00–14:00; it is quiet now: email until Mon 2 Mar 2026, 14:00"
                " (Europe/Berlin); log until Mon 2 Mar 2026, 14:00 (Europe/Berlin).",
            ],
        ),
    ],
)
def test_how_somebody_can_be_reached(one: Subscriber, sentences: list[str]) -> None:
    """Which addresses there are, without showing them, and whether it is quiet now."""
    told = of_subscriber(one, (), facts(subscribers={"ann": one}), lambda _cadence, _zone: None)
    assert [each.sentence for each in told] == sentences
