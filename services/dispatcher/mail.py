"""Builds the mail for a delivery: HTML with its plain-text twin, and headers that come from nobody but us. Pure.

Everything in it follows from the delivery, so that a second copy of the same delivery is the same mail with the same
Message-ID, which is what receivers recognise duplicates by.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from email.utils import format_datetime
from uuid import UUID

from services.dispatcher.addresses import is_email
from services.dispatcher.delivery import Letter

MAX_SUBJECT = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """Who mails come from: a bare address, and the name shown with it, which may be empty."""

    address: str
    name: str

    @property
    def domain(self) -> str:
        """The right-hand side of the address, and of every Message-ID."""
        return self.address.rpartition("@")[2]


def message_id(delivery_id: UUID, domain: str) -> str:
    """The Message-ID of every copy of a delivery."""
    return f"<{delivery_id}@{domain}>"


def compose(letter: Letter, sender: Envelope) -> bytes:
    """The whole mail as it goes over the wire, CRLF line ends; ValueError for an address that is_email refuses."""
    delivery = letter.delivery
    if not is_email(delivery.address):
        raise ValueError("not an e-mail address")
    mail = EmailMessage(policy=SMTP if delivery.address.isascii() else SMTPUTF8)
    mail["From"] = _mailbox(sender)
    mail["To"] = delivery.address
    mail["Subject"] = clean_subject(delivery.subject)
    mail["Date"] = format_datetime(_whole_second(letter.created_at))
    mail["Message-ID"] = message_id(delivery.id, sender.domain)
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office replies, please.
    mail["X-Carillon-Delivery"] = str(delivery.id)
    mail["X-Carillon-Digest"] = str(delivery.digest_id)
    if delivery.html and delivery.text:
        mail.set_content(delivery.text)
        mail.add_alternative(delivery.html, subtype="html")
    elif delivery.html:
        mail.set_content(delivery.html, subtype="html")
    else:
        mail.set_content(delivery.text)
    return mail.as_bytes()


def clean_subject(subject: str) -> str:
    """One line without control characters, cut to MAX_SUBJECT."""
    line = " ".join("".join(char if char.isprintable() else " " for char in subject).split())
    return line if len(line) <= MAX_SUBJECT else line[: MAX_SUBJECT - 1] + "…"


def _mailbox(sender: Envelope) -> str:
    name = clean_subject(sender.name).replace("\\", "").replace('"', "")
    return f'"{name}" <{sender.address}>' if name else sender.address


def _whole_second(instant: datetime) -> datetime:
    return instant.astimezone(UTC).replace(microsecond=0)
