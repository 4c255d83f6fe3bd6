"""Every sentence that Explain can say of notifications and items, word for word."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from services.digest import metrics
from services.digest.catalog import ItemState, Priority, WindowState
from services.digest.explaining import REASONS, kept_until, of_item, of_notification
from services.digest.stories import Facts
from tests.support.digest_story import (
    ABOUT,
    ALONE,
    ANN,
    BACK,
    CANCEL,
    DAY,
    DEAD,
    DIGEST,
    EXTERNAL,
    FACTS,
    FALL,
    HELD,
    HOUR,
    ITEM,
    KNOWN,
    NOW,
    PART_1,
    QUIET,
    QUIET_AT_NOON,
    ROLLING,
    SUBSCRIBED,
    TIMER,
    TYPE,
    WINDOW,
    delivered,
    facts,
    window,
)

WAITING = [
    (FACTS, {}, "waits for the digest Daily by email, which closes on Tue 3 Mar 2026, 08:00 (Europe/Berlin)."),
    (
        facts(cadences={}, subscribers={"ann": replace(ANN, zone="Mars/Olympus")}),
        {},
        "waits for the digest daily by email, which closes on Tue 3 Mar 2026, 07:00 (UTC).",
    ),
    (
        facts(subscribers={"ann": QUIET}),
        {},
        "waits for the digest Daily by email, which closes on Tue 3 Mar 2026, 08:00 (Europe/Berlin); then quiet hours"
        " hold it until Tue 3 Mar 2026, 09:00 (Europe/Berlin).",
    ),
    (
        window(ROLLING),
        {},
        "waits for the digest Daily by email, which closes on Mon 2 Mar 2026, 14:00 (Europe/Berlin), or later if more"
        " comes, on Mon 2 Mar 2026, 17:00 (Europe/Berlin) at the latest, or as soon as it has been given 10 items.",
    ),
    (
        window(ROLLING, latest_at=NOW + HOUR, full_at=None),
        {},
        "waits for the digest Daily by email, which closes on Mon 2 Mar 2026, 14:00 (Europe/Berlin).",
    ),
    (
        window(EXTERNAL),
        {},
        "waits for the digest Daily by email, which closes when the batch rebooking is triggered, or else on Wed 4 Mar"
        " 2026, 13:00 (Europe/Berlin).",
    ),
    (window(state=WindowState.CLOSING), {}, "waits for the digest Daily by email, which is about to be rendered."),
    (
        window(state=WindowState.CLOSING, is_asked_about=True),
        {},
        "waits for the digest Daily by email, which waits for business services to format its items, and is then"
        " rendered.",
    ),
    (
        window(**HELD),
        {},
        "waits for the digest Daily by email, which is held by the quiet hours of ann until Mon 2 Mar 2026, 14:00"
        " (Europe/Berlin).",
    ),
    (window(ALONE), {}, "is to be sent alone by email; it is about to be rendered."),
    (
        window(ALONE, **HELD),
        {},
        "is to be sent alone by email; it is held by the quiet hours of ann until Mon 2 Mar 2026, 14:00"
        " (Europe/Berlin).",
    ),
    (
        replace(window(ALONE), subscribers={"ann": QUIET_AT_NOON}),
        {},
        "is to be sent alone by email; it is about to be rendered; then quiet hours hold it until Mon 2 Mar 2026, 14:00"
        " (Europe/Berlin).",
    ),
    (
        replace(window(ALONE, priority=Priority.HIGH), subscribers={"ann": QUIET_AT_NOON}),
        {},
        "is to be sent alone by email; it is about to be rendered.",
    ),
    (
        window(ALONE, **HELD),
        {"expires_at": NOW + HOUR / 2},
        "is to be sent alone by email; it is held by the quiet hours of ann until Mon 2 Mar 2026, 14:00"
        " (Europe/Berlin). But it expires before that, on Mon 2 Mar 2026, 13:30 (Europe/Berlin), and will then not be"
        " sent.",
    ),
    (
        replace(window(ALONE), subscribers={"ann": replace(ANN, email="")}),
        {},
        "is to be sent alone by email; it is about to be rendered. As things are it will not be sent then, because ann"
        " has no email address.",
    ),
    (
        replace(
            window(ALONE),
            types={TYPE: replace(KNOWN, is_mandatory=True)},
            choices=(replace(SUBSCRIBED, cadence="off"),),
        ),
        {},
        "is to be sent alone by email; it is about to be rendered. ann has turned this type off, but it is mandatory.",
    ),
    (
        replace(
            window(ALONE), types={TYPE: replace(KNOWN, is_mandatory=True)}, choices=(replace(SUBSCRIBED, filter="x"),)
        ),
        {},
        "is to be sent alone by email; it is about to be rendered. The filters of ann do not count, because the type is"
        " mandatory.",
    ),
    (facts(windows={}), {}, f"waits in the window {WINDOW}, which does not exist. {FALL}"),
    (
        window(state=WindowState.CLOSED, closed_at=NOW),
        {},
        f"waits in the window {WINDOW}, which has closed without it. {FALL}",
    ),
]


@pytest.mark.parametrize(("known", "about", "words"), WAITING)
def test_what_waits_is_told_with_when_it_leaves(known: Facts, about: dict[str, Any], words: str) -> None:
    """Cadence, next close on the subscriber's clock, quiet hours, and what will keep it from being sent."""
    assert of_item(ITEM, replace(ABOUT, **about), known).sentence == f"For ann it {words}"


def test_what_waits_is_expected_when_it_really_leaves() -> None:
    """At the end of the quiet hours that will hold it, not at the close before."""
    told = of_item(ITEM, ABOUT, facts(subscribers={"ann": QUIET}))
    assert (told.at, told.is_expected, told.kind) == (NOW + 20 * HOUR, True, "item_pending")
    assert not of_item(ITEM, ABOUT, facts(windows={})).is_expected


WENT = "went out by email in the digest Daily of Mon 2 Mar 2026, 13:00 (Europe/Berlin), with 3 items,"
OUT = [
    (ItemState.DIGESTED, FACTS, f"{WENT} and was sent."),
    (
        ItemState.SENT_ALONE,
        facts(digest=replace(DIGEST, cadence="immediate", item_count=1)),
        "left alone by email on Mon 2 Mar 2026, 13:00 (Europe/Berlin) and was sent.",
    ),
    (
        ItemState.DIGESTED,
        facts(digest=delivered("pending")),
        f"{WENT} and is with the dispatcher, which has not said yet what became of it.",
    ),
    (
        ItemState.DIGESTED,
        facts(digest=delivered("dead", "550 no such\r\nuser")),
        f"{WENT} but could not be delivered: 550 no such user.",
    ),
    (
        ItemState.DIGESTED,
        facts(digest=delivered("suppressed", "unsubscribed", PART_1)),
        f"{WENT} but was not delivered, because the address is suppressed (part 2 of 2): unsubscribed.",
    ),
    (
        ItemState.DIGESTED,
        facts(digest=delivered("held")),
        f"{WENT} but whether it arrived is not known, and somebody must decide whether to send it again.",
    ),
    (
        ItemState.DIGESTED,
        facts(digest=delivered("expired")),
        f"{WENT} but had expired before it could be delivered.",
    ),
    (
        ItemState.DIGESTED,
        facts(digest=replace(DIGEST, template_error="division by zero")),
        f"{WENT} and was sent. {BACK}",
    ),
    (
        ItemState.DIGESTED,
        facts(digests={}),
        f"went out in the digest {WINDOW}, of which nothing is on record. {FALL}",
    ),
    (
        ItemState.DEAD,
        facts(digest=DEAD),
        "could not be rendered, not even by the built-in templates: out of memory",
    ),
    (
        ItemState.DEAD,
        facts(digests={}),
        "could not be rendered, not even by the built-in templates: nobody said why",
    ),
]


@pytest.mark.parametrize(("state", "known", "words"), OUT)
def test_what_went_out_is_told_with_what_became_of_it(state: ItemState, known: Facts, words: str) -> None:
    """Every outcome, the dispatcher's reason, and a template that failed."""
    told = of_item(replace(ITEM, state=state, changed_at=NOW), ABOUT, known)
    assert (told.sentence, told.at, told.is_expected) == (f"For ann it {words}", NOW, False)


ON_TIMER = replace(CANCEL, type=TYPE, timeline="trial", timer_ids=(TIMER,))
BEFORE = "was cancelled before it left, by"
ENDED = [
    (ItemState.CANCELLED, {}, {}, FACTS, f"{BEFORE} the cancel number 9 of UA1."),
    (
        ItemState.CANCELLED,
        {},
        {"timeline": "trial"},
        facts(cancels=(replace(CANCEL, type="another"), replace(CANCEL, sequence=5), ON_TIMER)),
        f"{BEFORE} the cancel number 9 of UA1, the type {TYPE}, the timeline trial, 1 timer by id.",
    ),
    (
        ItemState.CANCELLED,
        {"window_id": None},
        {"timer_id": None},
        facts(cancels=(ON_TIMER,)),
        "had been cancelled before it came, by a command that is no longer on record.",
    ),
    (
        ItemState.EXPIRED,
        {},
        {"expires_at": NOW},
        FACTS,
        "expired on Mon 2 Mar 2026, 13:00 (Europe/Berlin), before it could leave.",
    ),
    (
        ItemState.EXPIRED,
        {"window_id": None},
        {"expires_at": NOW - 2 * HOUR + timedelta(seconds=5)},
        FACTS,
        "had expired on Mon 2 Mar 2026, 11:00:05 (Europe/Berlin) when it came.",
    ),
]


@pytest.mark.parametrize(("state", "item", "about", "known", "words"), ENDED)
def test_what_ended_on_its_way_is_told_with_who_or_what_ended_it(
    state: ItemState, item: dict[str, Any], about: dict[str, Any], known: Facts, words: str
) -> None:
    """The cancel that hit it by its number and what it selected; the time at which it expired."""
    told = of_item(replace(ITEM, state=state, **item), replace(ABOUT, **about), known)
    assert told.sentence == f"For ann it {words}"


OFF = replace(SUBSCRIBED, cadence="off")
FILTERED = replace(SUBSCRIBED, filter="payload.n > 3")
SCHEMA = '{"type": "object", "required": ["gate"]}'
SUPPRESSED = [
    ("off", {}, facts(choices=(OFF,)), "ann has turned it off, by the subscription s1 to flight.*"),
    (
        "off",
        {},
        facts(choices=(), types={TYPE: replace(KNOWN, default_cadence="off")}),
        f"ann has not asked for the type {TYPE}, which is off unless somebody does",
    ),
    ("off", {}, FACTS, "it was turned off; that has changed since, and counts for what comes from now on"),
    (
        "off",  # The exact subscription decides, not the prefix; nor one for a topic that this was not told by.
        {},
        facts(choices=(OFF, replace(SUBSCRIBED, type=TYPE), replace(OFF, topic="else", type=TYPE))),
        "it was turned off; that has changed since, and counts for what comes from now on",
    ),
    (
        "filter",
        {},
        facts(choices=(FILTERED, replace(FILTERED, topic="news", subscription="s2", filter="false"))),
        "the filter of the subscription s1 left it out: payload.n > 3; and the filter of the subscription s2 left it"
        " out: false",
    ),
    ("filter", {}, FACTS, "a subscription's filter left it out; the subscription has changed since"),
    (
        "no_address",
        {"choice": "a/b/webhook/json/full"},
        FACTS,
        "ann had no webhook URL",
    ),
    ("no_address", {}, FACTS, "ann had no email address; there is one now, for what comes from now on"),
    ("no_address", {"choice": "?"}, FACTS, "ann had no address for its channel"),
    (
        "no_subscriber",
        {"choice": "topic:news/sport", "subscriber": ""},
        FACTS,
        f"nobody had subscribed to the type {TYPE} by the topic news/sport",
    ),
    ("unknown_type", {}, facts(types={}), f"the type {TYPE} was not in the catalog"),
    ("unknown_type", {}, FACTS, f"the type {TYPE} was not in the catalog; it is now"),
    ("unknown_subscriber", {}, facts(subscribers={}), "there was no subscriber ann"),
    ("unknown_subscriber", {}, FACTS, "there was no subscriber ann; there is now"),
    ("unknown_cadence", {"choice": "a/b/email/html/full"}, FACTS, "the cadence a/b did not exist"),
    ("unknown_cadence", {}, FACTS, "the cadence daily did not exist; it does now"),
    ("cadence_over", {}, FACTS, "the cadence Daily had no next time any more"),
    ("subscriber_deleted", {}, FACTS, "ann was deleted while it waited"),
    (
        "payload_invalid",
        {},
        facts(types={TYPE: replace(KNOWN, payload_schema=SCHEMA)}),
        'its payload is not what the type\'s schema asks for: payload: "gate" is a required property',
    ),
    (
        "payload_invalid",
        {},
        FACTS,
        "its payload is not what the type's schema asks for, or was not then: the schema has changed",
    ),
    ("of_a_later_version", {}, FACTS, "of_a_later_version"),
]


@pytest.mark.parametrize(("reason", "item", "known", "words"), SUPPRESSED)
def test_what_was_suppressed_is_told_with_its_reason(
    reason: str, item: dict[str, Any], known: Facts, words: str
) -> None:
    """Every reason; where what decided has changed since, that too."""
    told = of_item(replace(ITEM, state=ItemState.SUPPRESSED, reason=reason, window_id=None, **item), ABOUT, known)
    who = "For ann it" if told.details["subscriber"] else "It"
    assert told.sentence == f"{who} was not sent: {words}."
    assert (told.details["reason"], told.kind) == (reason, "item_suppressed")


def test_every_reason_that_there_is_has_its_words() -> None:
    """What metrics count, Explain can say, and the table here has tried."""
    assert set(REASONS) == set(metrics.REASONS)
    assert {reason for reason, *_ in SUPPRESSED} >= set(metrics.REASONS)


@pytest.mark.parametrize(
    ("about", "known", "sentence"),
    [
        ({}, FACTS, f"A notification of the type {TYPE} about UA1 came for 2 subscribers and the topic news."),
        (
            {"entity": "", "subscribers": 0, "topics": ("a", "b"), "expires_at": NOW},
            FACTS,
            f"A notification of the type {TYPE} came for the topics a, b. It expires on Mon 2 Mar 2026, 12:00 (UTC).",
        ),
        (
            {"subscribers": 1, "topics": ()},
            facts(types={}),
            f"A notification of the type {TYPE}, which is not in the catalog, about UA1 came for 1 subscriber.",
        ),
    ],
)
def test_how_a_notification_came(about: dict[str, Any], known: Facts, sentence: str) -> None:
    """For whom, about what, and until when it is worth telling."""
    assert of_notification(replace(ABOUT, **about), known).sentence == sentence


def test_retention_is_told_once_all_is_over() -> None:
    """Counted from when the last window closed; not while anything waits."""
    over = replace(ITEM, state=ItemState.DIGESTED)
    settled = replace(ITEM, state=ItemState.SUPPRESSED, window_id=None)
    closed = window(state=WindowState.CLOSED, closed_at=NOW + HOUR)
    (told,) = kept_until(ABOUT, [over, settled], closed)
    assert (told.at, told.is_expected) == (NOW + HOUR + 30 * DAY, True)
    assert told.sentence == "It is kept for 30 days after it was over, as its type says, and then forgotten."
    assert not list(kept_until(ABOUT, [over, replace(ITEM, window_id=None)], closed))
    assert not list(kept_until(ABOUT, [over], FACTS))
    (without_type,) = kept_until(ABOUT, [settled], facts(types={}))
    assert without_type.at == settled.changed_at + 90 * DAY


def test_no_sentence_is_longer_than_the_contract_allows() -> None:
    """Whatever others say is quoted in part, on one line."""
    told = of_item(
        replace(ITEM, state=ItemState.DEAD), ABOUT, facts(digest=replace(DEAD, template_error="long\n" * 1_000))
    )
    assert len(told.sentence) < 400
    assert "\n" not in told.sentence
    many = replace(ABOUT, topics=("t" * 256,) * 5)
    assert len(of_notification(many, FACTS).sentence) == 1_000
