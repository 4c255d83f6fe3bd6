"""Writes mails as bytes: headers, and a text with its HTML twin. Pure.

Python's own generator parses and folds each header it is given, which takes 2.3 ms for a mail of two bodies: more than
everything else that is done for it. Ours are few, known and made by us, so that they are written as they are; that
what comes out is what Python's parser reads again is tested. Bodies are quoted-printable, in which no line is too long,
no byte above 127, and no boundary can occur: `=` is always followed by two hex digits or the end of a line.
"""

from binascii import b2a_qp
from collections.abc import Iterable
from email.header import Header

_MAX_LINE = 998  # RFC 5322 §2.1.1.

Headers = Iterable[tuple[str, str]]


def write_mail(headers: Headers, *, text: str, html: str, boundary: str) -> bytes:
    """A mail with the bodies there are, or an empty text; CRLF line ends.

    Header values are written as UTF-8. `boundary` is unique to the mail and has `=_` in it. Raises ValueError for a
    header that would not be one: its value has a line end, or is too long for a line.
    """
    head = [_header(name, value) for name, value in (*headers, ("MIME-Version", "1.0"))]
    if not (text and html):
        return b"".join([*head, _part("html", html) if html else _part("plain", text)])
    kind = _header("Content-Type", f'multipart/alternative;\r\n boundary="{boundary}"')
    mark = f"--{boundary}".encode()
    parts = [mark, b"\r\n", _part("plain", text), b"\r\n", mark, b"\r\n", _part("html", html), b"\r\n", mark, b"--\r\n"]
    return b"".join([*head, kind, b"\r\n", *parts])


def encoded_text(text: str) -> str:
    """Words of a header: as they are when ASCII, else as RFC 2047 encodes them; also what only looks encoded."""
    if text.isascii() and "=?" not in text:
        return text
    return Header(text, "utf-8").encode(linesep="\r\n")


def _header(name: str, value: str) -> bytes:
    lines = value.split("\r\n ")  # Where RFC 2047's words were folded.
    if any(not line.isprintable() or len(line) > _MAX_LINE - len(name) - 4 for line in lines):
        raise ValueError(f"not fit for the header {name}")
    return f"{name}: {value}\r\n".encode()


def _part(subtype: str, body: str) -> bytes:
    lines = body.replace("\r\n", "\n").replace("\r", "\n")
    quoted = b2a_qp(lines.encode("utf-8", "replace"), istext=True).replace(b"\n", b"\r\n")
    return (
        f'Content-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n'
    ).encode() + quoted
