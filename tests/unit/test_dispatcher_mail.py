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
