"""The mail that is made of a delivery."""

import email
import email.policy
from dataclasses import replace
from datetime import UTC, datetime
from email.message import EmailMessage
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dispatcher.delivery import Delivery, Letter, clean_reply
from services.dispatcher.mail import Envelope, clean_subject, compose

SENDER = Envelope(address="bells@carillon.example", name='The "Bells"')
NOW = datetime(2013, 7, 4, 12, 0, 0, 999, tzinfo=UTC)
MAIL = Delivery(
    tenant="shop",
    id=UUID(int=1),
    digest_id=UUID(int=2),
    subscriber="ann",
    channel="email",
    address="ann@example.com",
    subject="Hello",
    html="<p>Hello</p>",
    text="Hello",
)


def composed(delivery: Delivery) -> EmailMessage:
    """The mail as its receiver reads it."""
    raw = compose(Letter(delivery=delivery, created_at=NOW, signed_at=NOW), SENDER)
    mail = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    return mail


def test_two_copies_have_the_same_identity() -> None:
    """Whoever gets a delivery twice can tell by its Message-ID and its date."""
    first, second = composed(MAIL), composed(MAIL)
    assert first["Message-ID"] == second["Message-ID"] == f"<{UUID(int=1)}@carillon.example>"
    assert first["Date"] == second["Date"] == "Thu, 04 Jul 2013 12:00:00 +0000"


@pytest.mark.parametrize(
    ("fields", "content_type"),
    [
        ({}, "multipart/alternative"),
        ({"html": ""}, "text/plain"),
        ({"text": ""}, "text/html"),
        ({"html": "", "text": ""}, "text/plain"),
    ],
)
def test_a_mail_has_the_bodies_there_are(fields: dict[str, Any], content_type: str) -> None:
    """Two twins in one mail, or the one there is, or an empty text."""
    assert composed(replace(MAIL, **fields)).get_content_type() == content_type


@given(st.text(max_size=400))
def test_no_subject_makes_a_second_header(subject: str) -> None:
    """Whatever a subject holds, the mail has exactly our headers and one line of subject."""
    mail = composed(replace(MAIL, subject=subject))
    ours = ["Auto-Submitted", "Content-Type", "Date", "From", "MIME-Version", "Message-ID", "Subject", "To"]
    assert sorted(mail.keys()) == [*ours, "X-Carillon-Delivery", "X-Carillon-Digest"]
    assert mail["To"] == "ann@example.com"
    assert len(clean_subject(subject)) <= 255
    assert clean_subject(subject).isprintable()


_BODY = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=600)


@given(text=_BODY, html=_BODY)
def test_every_body_is_read_again_as_it_was_written(text: str, html: str) -> None:
    """Whatever is in them: dots, boundaries, long lines, spaces at line ends, other scripts."""
    mail = composed(replace(MAIL, text=f"{text}.", html=f"<p>{html}</p>"))
    for kind, given_ in (("plain", f"{text}."), ("html", f"<p>{html}</p>")):
        body = mail.get_body((kind,))
        assert body is not None
        assert body.get_payload(decode=True) == given_.replace("\n", "\r\n").encode()
        assert not body.defects
    assert not mail.defects


@pytest.mark.parametrize(
    "body", ["x" * 5_000, ".\n..\n--=_00000000000000000000000000000001--\n", "a \n\tb\t\n", "grüße 🔔\n"]
)
def test_lines_on_the_wire_are_short_ascii_and_end_in_crlf(body: str) -> None:
    """No server has to break, refuse or re-encode anything, whatever it supports."""
    raw = compose(Letter(delivery=replace(MAIL, text=body, html=body), created_at=NOW, signed_at=NOW), SENDER)
    lines = raw.split(b"\r\n")
    assert raw.isascii()
    assert max(map(len, lines)) <= 78
    assert not any(b"\n" in line or b"\r" in line for line in lines)


def test_two_copies_are_the_same_to_the_byte() -> None:
    """A second copy after a crash is the same mail; nothing in it is made up anew."""
    letter = Letter(delivery=MAIL, created_at=NOW, signed_at=NOW)
    assert compose(letter, SENDER) == compose(letter, SENDER)


@pytest.mark.parametrize(
    "subject", ["=?utf-8?q?Bcc?= x", "Grüße an alle, die lange auf ihren Flug warten müssen " * 4, "a" * 255]
)
def test_a_subject_is_read_as_it_was_written(subject: str) -> None:
    """Also what only looks encoded, and what is longer than a line."""
    assert composed(replace(MAIL, subject=subject))["Subject"] == clean_subject(subject)


def test_a_sender_in_another_script_is_encoded() -> None:
    """Its name is what people read."""
    raw = compose(Letter(delivery=MAIL, created_at=NOW, signed_at=NOW), replace(SENDER, name="Grüße"))
    mail = email.message_from_bytes(raw, policy=email.policy.default)
    assert mail["From"].addresses[0].display_name == "Grüße"


def test_an_address_with_a_line_break_is_never_composed() -> None:
    """Even if the pipeline let it through."""
    with pytest.raises(ValueError, match="address"):
        composed(replace(MAIL, address="ann@example.com\r\nBcc: all@example.com"))


def test_the_sender_is_quoted() -> None:
    """A name with quotes cannot change who the mail is from."""
    mail = composed(MAIL)
    assert mail["From"].addresses[0].addr_spec == "bells@carillon.example"
    assert mail["From"].addresses[0].display_name == "The Bells"


def test_replies_are_cleaned_for_the_record() -> None:
    """No control characters, no NUL, one line, bounded."""
    assert clean_reply("550 no\r\n\x00 such\tuser ") == "550 no such user"
    assert len(clean_reply("x" * 10_000)) == 2_048
