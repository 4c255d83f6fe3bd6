"""What a business service may write: text, JSON, or a fragment of HTML, cleaned. Pure.

What comes back is nobody's code. HTML is parsed as browsers do and written anew from what a mail shows: text, tables,
lists, links, pictures, and styles that stay in their place. Scripts, style sheets, forms, frames, comments, event
handlers, classes, ids and addresses other than http, https, mailto and tel are left out; whatever was opened is closed.
So a fragment can neither run, nor cover or swallow what stands beside it. Links and pictures may lead anywhere, as in a
tenant's own templates.
"""

import unicodedata
from typing import Final

import msgspec
import nh3

MOST_BYTES: Final = 64 << 10
"""The largest fragment; a message has at most 240 KiB."""

_MOST_TAGS: Final = 2_000
"""Parsing takes time with the square of the nesting: 13,000 elements in each other 0.3 s, so many 7 ms."""

_EVERYWHERE: Final = frozenset(
    {"style", "align", "valign", "width", "height", "bgcolor", "dir", "lang", "title", "role"}
)
_ATTRIBUTES: Final = {
    "*": set(_EVERYWHERE),
    "a": {"href"},
    "img": {"src", "alt", "border"},
    "table": {"border", "cellpadding", "cellspacing"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
    "ol": {"start"},
    "col": {"span"},
}
_TAGS: Final = {
    *("a", "abbr", "b", "bdi", "bdo", "blockquote", "br", "caption", "center", "code", "col", "colgroup", "dd", "del"),
    *("div", "dl", "dt", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins", "kbd", "li", "mark", "ol"),
    *("p", "pre", "q", "s", "small", "span", "strong", "sub", "sup", "table", "tbody", "td", "tfoot", "th", "thead"),
    *("tr", "u", "ul", "wbr"),
}
_BOX: Final = ("margin", "padding", "border", *(f"border-{one}" for one in ("color", "style", "width", "radius")))
# Nothing that leaves its place (position, float, transform), or is fetched (background: url).
_STYLES: Final = {
    *(f"{one}{side}" for one in ("margin", "padding", "border") for side in ("-top", "-right", "-bottom", "-left")),
    *_BOX,
    *("color", "background-color", "font", "font-family", "font-size", "font-style", "font-weight", "line-height"),
    *("letter-spacing", "text-align", "text-decoration", "text-transform", "vertical-align", "white-space"),
    *("word-break", "overflow-wrap", "width", "height", "max-width", "min-width", "display", "list-style-type"),
    *("border-collapse", "border-spacing", "direction"),
}
_CLEANER: Final = nh3.Cleaner(
    tags=_TAGS,
    clean_content_tags={"script", "style", "title", "textarea", "noscript", "iframe", "svg", "math"},
    attributes=_ATTRIBUTES,
    filter_style_properties=_STYLES,
    url_schemes={"http", "https", "mailto", "tel"},
    url_relative="deny",
    strip_comments=True,
)


class BadFragment(Exception):
    """What a service wrote cannot be used; the message says why."""


def fragment_of(text_format: str, value: bytes) -> str | None:
    """A fragment that may stand in a message, from a JSON value; None for null. Raises BadFragment."""
    if value == b"null":
        return None
    if len(value) > 2 * MOST_BYTES:  # Before it is decoded: escapes make it longer, never so much in earnest.
        raise BadFragment(f"it wrote more than {MOST_BYTES // 1024} KiB for an item")
    if text_format == "json":
        return _bounded(_json(value))
    try:
        written = msgspec.json.decode(value, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadFragment(f"it wrote something else than text for an item: {err}") from err
    return _html(_bounded(written)) if text_format == "html" else _text(_bounded(written))


def _bounded(written: str) -> str:
    if len(written.encode()) > MOST_BYTES:
        raise BadFragment(f"it wrote more than {MOST_BYTES // 1024} KiB for an item")
    return written


def _json(value: bytes) -> str:
    try:
        msgspec.json.decode(value)
        return value.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadFragment(f"it wrote something else than JSON for an item: {err}") from err


def _html(written: str) -> str:
    if written.count("<") > _MOST_TAGS:
        raise BadFragment(f"it wrote more than {_MOST_TAGS:,} tags for an item")
    return _bounded(_CLEANER.clean(written))


def _text(written: str) -> str:
    """Lines and tabs stay, other control characters do not."""
    plain = "".join(char for char in written if char in "\n\t" or unicodedata.category(char) != "Cc")
    return plain.rstrip() + "\n"
