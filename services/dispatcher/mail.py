"""Builds the mail for a delivery: HTML with its plain-text twin, and headers that come from nobody but us. Pure.

Everything in it follows from the delivery, so that a second copy of the same delivery is the same mail with the same
Message-ID, which is what receivers recognise duplicates by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from uuid import UUID

from services.dispatcher.addresses import is_email
from services.dispatcher.delivery import Delivery, Letter
from services.dispatcher.mime import encoded_text, write_mail

MAX_SUBJECT = 255

ListHeaders = Callable[[Delivery], Sequence[tuple[str, str]]]
"""How a reader gets off the delivery's list: headers that follow from the delivery, or none. See unsubscribe.py."""


def no_headers(_delivery: Delivery) -> Sequence[tuple[str, str]]:
    """Nobody can unsubscribe."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """Who mails come from: a bare address, and the name shown with it, which may be empty."""

    address: str
    name: str

    @property
    def domain(self) -> str:
        """The right-hand side of the address, and of every Message-ID."""
        return self.address.rpartition("@")[2]

    @property
    def mailbox(self) -> str:
        """As it stands in the header From."""
        name = clean_subject(self.name).replace("\\", "").replace('"', "")
        if not name:
            return self.address
        shown = f'"{name}"' if name.isascii() else encoded_text(name)
        return f"{shown} <{self.address}>"


def message_id(delivery_id: UUID, domain: str) -> str:
    """The Message-ID of every copy of a delivery."""
    return f"<{delivery_id}@{domain}>"


def compose(letter: Letter, sender: Envelope, list_headers: ListHeaders = no_headers) -> bytes:
    """The whole mail as it goes over the wire, CRLF line ends; ValueError for an address that is_email refuses."""
    delivery = letter.delivery
    if not is_email(delivery.address):
        raise ValueError("not an e-mail address")
    headers = [
        ("From", sender.mailbox),
        ("To", delivery.address),
        ("Subject", encoded_text(clean_subject(delivery.subject))),
        ("Date", format_datetime(_whole_second(letter.created_at))),
        ("Message-ID", message_id(delivery.id, sender.domain)),
        ("Auto-Submitted", "auto-generated"),  # RFC 3834: no out-of-office replies, please.
        ("X-Carillon-Delivery", str(delivery.id)),
        ("X-Carillon-Digest", str(delivery.digest_id)),
        *list_headers(delivery),
    ]
    return write_mail(headers, text=delivery.text, html=delivery.html, boundary=f"=_{delivery.id.hex}")


def clean_subject(subject: str) -> str:
    """One line without control characters, cut to MAX_SUBJECT."""
    line = " ".join("".join(char if char.isprintable() else " " for char in subject).split())
    return line if len(line) <= MAX_SUBJECT else line[: MAX_SUBJECT - 1] + "…"


def _whole_second(instant: datetime) -> datetime:
    return instant.astimezone(UTC).replace(microsecond=0)
