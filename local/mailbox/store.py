"""Keeps mails as files and an index of mails and webhooks in SQLite; both are found again after a restart."""

import email
import email.policy
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from pathlib import Path

_FILES_PER_FOLDER = 1000
_header_parser = BytesHeaderParser(policy=email.policy.compat32)  # A tenth of the default policy's time.

_SCHEMA = """
CREATE TABLE IF NOT EXISTS mail (
    id INTEGER PRIMARY KEY, received_at TEXT NOT NULL, sender TEXT NOT NULL, recipients TEXT NOT NULL,
    subject TEXT NOT NULL, date TEXT NOT NULL, message_id TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS recipient (address TEXT NOT NULL, mail INTEGER NOT NULL, PRIMARY KEY (address, mail))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hook (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, received_at TEXT NOT NULL, status INTEGER NOT NULL,
    headers TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS hook_name ON hook (name, id);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """A line of the list; `date` is the Date header as written, `received_at` the real time (ISO 8601)."""

    id: int
    received_at: str
    sender: str
    recipients: tuple[str, ...]
    subject: str
    date: str
    message_id: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """A webhook as it came; `body` is JSON where it was JSON, else text; `status` is how it was answered;
    names of headers are lower case."""

    id: int
    name: str
    received_at: str
    status: int
    headers: Mapping[str, str]
    body: object


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedMail:
    """A mail's content."""

    headers: tuple[tuple[str, str], ...]
    text: str
    html: str


class Store:
    """Mails and webhooks in one directory; one process at a time."""

    def __init__(self, directory: Path) -> None:
        self._mails = directory / "mails"
        self._mails.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(directory / "index.sqlite", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")  # What a power cut takes from a test mailbox is not missed.
        self._db.executescript(_SCHEMA)
        self._last_id: int = self._one("SELECT coalesce(max(id), 0) FROM mail")
        self._folders: set[Path] = set()

    def close(self) -> None:
        """Close the index."""
        self._db.close()

    def path_of(self, mail_id: int) -> Path:
        """Where a mail's file is; 1,000 of them share a folder."""
        return self._mails / f"{mail_id // _FILES_PER_FOLDER:06d}" / f"{mail_id:09d}.eml"

    def add_mail(self, sender: str, recipients: Sequence[str], content: bytes) -> int:
        """Keep a mail and return its id. The envelope goes in front of it, as Return-Path and Delivered-To."""
        self._last_id += 1
        path = self.path_of(self._last_id)
        if path.parent not in self._folders:
            path.parent.mkdir(exist_ok=True)
            self._folders.add(path.parent)
        envelope = f"Return-Path: <{sender}>\r\n" + "".join(f"Delivered-To: {address}\r\n" for address in recipients)
        path.write_bytes(envelope.encode() + content)
        headers = _header_parser.parsebytes(content.partition(b"\r\n\r\n")[0])
        row = (
            self._last_id,
            _now(),
            sender,
            json.dumps(recipients),
            _readable(headers.get("Subject", "")),
            str(headers.get("Date", "")),
            str(headers.get("Message-ID", "")),
            len(content),
        )
        addresses = {address.lower() for address in recipients}
        self._db.execute("BEGIN")
        self._db.execute("INSERT INTO mail VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._db.executemany("INSERT INTO recipient VALUES (?, ?)", [(address, self._last_id) for address in addresses])
        self._db.execute("COMMIT")
        return self._last_id

    def newest_mails(self, *, to: str = "", before: int | None = None, limit: int = 50) -> list[Mail]:
        """Mails newest first, from `before` (an id) on; `to` is any part of a recipient's address."""
        return self._mails_where("id < ?", [before or 1 << 62], to, "DESC", limit)

    def mails_after(self, *, to: str = "", after: int = 0, limit: int = 1000) -> list[Mail]:
        """Mails oldest first, after the id `after`."""
        return self._mails_where("id > ?", [after], to, "ASC", limit)

    def mail(self, mail_id: int) -> Mail | None:
        """One line of the list."""
        return next(iter(self._mails_where("id = ?", [mail_id], "", "ASC", 1)), None)

    def open_mail(self, mail_id: int) -> OpenedMail:
        """Read a mail's file. Raises FileNotFoundError."""
        message = email.message_from_bytes(self.path_of(mail_id).read_bytes(), policy=email.policy.default)
        return OpenedMail(
            headers=tuple((name, str(value)) for name, value in message.items()),
            text=_part(message, "plain"),
            html=_part(message, "html"),
        )

    def add_hook(self, name: str, *, status: int, headers: Mapping[str, str], body: str) -> int:
        """Keep a webhook and return its id."""
        named = {key.lower(): value for key, value in headers.items()}
        row = (name, _now(), status, json.dumps(named), body)
        cursor = self._db.execute(
            "INSERT INTO hook (name, received_at, status, headers, body) VALUES (?, ?, ?, ?, ?)", row
        )
        return cursor.lastrowid or 0

    def newest_hooks(self, *, name: str | None = None, before: int | None = None, limit: int = 50) -> list[Hook]:
        """Webhooks newest first; of one name, or of all."""
        where, values = ("name = ? AND", [name]) if name is not None else ("", [])
        query = f"SELECT * FROM hook WHERE {where} id < ? ORDER BY id DESC LIMIT ?"  # noqa: S608 — a literal.
        return [_hook(row) for row in self._db.execute(query, [*values, before or 1 << 62, limit])]

    def hooks_after(self, name: str, *, after: int = 0, limit: int = 1000) -> list[Hook]:
        """Webhooks of one name, oldest first, after the id `after`."""
        query = "SELECT * FROM hook WHERE name = ? AND id > ? ORDER BY id LIMIT ?"
        return [_hook(row) for row in self._db.execute(query, [name, after, limit])]

    def count_mails(self, to: str = "") -> int:
        """How many mails there are, for recipients whose address has `to` in it."""
        if not to:
            return self._one("SELECT count(*) FROM mail")
        return self._one("SELECT count(DISTINCT mail) FROM recipient WHERE instr(address, ?)", to.lower())

    def mails_by_recipient(self) -> dict[str, int]:
        """Recipients in alphabetical order, with the number of their mails."""
        return dict(self._db.execute("SELECT address, count(*) FROM recipient GROUP BY address ORDER BY address"))

    def hooks_by_name(self) -> dict[str, int]:
        """Names in alphabetical order, with the number of their webhooks, refused ones included."""
        return dict(self._db.execute("SELECT name, count(*) FROM hook GROUP BY name ORDER BY name"))

    def _mails_where(self, condition: str, values: list[int], to: str, order: str, limit: int) -> list[Mail]:
        receives = "AND id IN (SELECT mail FROM recipient WHERE instr(address, ?))" if to else ""
        query = f"SELECT * FROM mail WHERE {condition} {receives} ORDER BY id {order} LIMIT ?"  # noqa: S608 — literals.
        return [_mail(row) for row in self._db.execute(query, [*values, *([to.lower()] if to else []), limit])]

    def _one(self, query: str, *values: object) -> int:
        [count] = self._db.execute(query, values).fetchone()
        return int(count)


def _mail(row: Sequence[object]) -> Mail:
    number, received_at, sender, recipients, subject, date, message_id, size = row
    return Mail(
        id=int(str(number)),
        received_at=str(received_at),
        sender=str(sender),
        recipients=tuple(json.loads(str(recipients))),
        subject=str(subject),
        date=str(date),
        message_id=str(message_id),
        bytes=int(str(size)),
    )


def _hook(row: Sequence[object]) -> Hook:
    number, name, received_at, status, headers, body = row
    try:
        parsed: object = json.loads(str(body))
    except ValueError:
        parsed = body
    return Hook(
        id=int(str(number)),
        name=str(name),
        received_at=str(received_at),
        status=int(str(status)),
        headers=json.loads(str(headers)),
        body=parsed,
    )


def _readable(header: object) -> str:
    """A header with its encoded words decoded; as it is, where it is wrong."""
    try:
        return str(make_header(decode_header(str(header))))
    except (LookupError, ValueError):
        return str(header)


def _part(message: EmailMessage, subtype: str) -> str:
    part = message.get_body(preferencelist=(subtype,))
    return str(part.get_content()).replace("\r\n", "\n") if part is not None else ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
