"""Items that their business services format: what is asked of whom, and what becomes of the answers. Pure.

A type may name a service. Then each of its items, in each format that a message has, is a fragment that the service
writes; around it stays what is ours: layout, subject, headers. What one service writes for one tenant in one manner
(format, style, language, zone) is asked together, MOST_ITEMS at a time. A fragment that does not come leaves its item
to the type's template, or the built-in one.

Subscribers are not told to services: their language and zone are, and so one answer serves everybody who shares these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import msgspec

from services.digest.formatting_answers import BadFragment, fragment_of
from services.digest.rendering_jobs import Line
from services.digest.rendering_views import Groups, is_collapsed

MOST_ITEMS: Final = 50
MOST_BYTES: Final = 1 << 20
"""What the payloads of one request add up to, unless one alone is larger."""

Key = bytes
"""Stands for everything that a fragment depends on."""


class Manner(NamedTuple):
    """Who writes for which tenant, and how: what all items of one request have in common."""

    service: str
    tenant: str
    format: str
    style: str
    zone: str
    locale: str

    @property
    def accept(self) -> str:
        """The request's Accept header."""
        return f"NotificationFormat/{self.format}; style={self.style}"


class Order(NamedTuple):
    """A message to be; `services` says of types by which service their items are formatted."""

    tenant: str
    format: str
    style: str
    is_alone: bool
    zone: str
    locale: str
    lines: Sequence[Line]
    services: Mapping[str, str]


class Formatted(NamedTuple):
    """A message's lines with the fragments that came, and why others did not; `error` is empty when all did."""

    lines: Sequence[Line]
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: fragments for these lines, at most MOST_ITEMS."""

    manner: Manner
    lines: Mapping[Key, Line]

    def body(self) -> bytes:
        """What is posted."""
        return msgspec.json.encode(
            {
                "tenant": self.manner.tenant,
                "locale": self.manner.locale,
                "zone": self.manner.zone,
                "items": [_told(line) for line in self.lines.values()],
            }
        )


class Answered(NamedTuple):
    """What came of one request, by key: fragments, and why there is none."""

    fragments: Mapping[Key, str]
    failures: Mapping[Key, str]


class _Reply(msgspec.Struct):
    """What a service says: one value per item, in order; null leaves the item to the template."""

    items: list[msgspec.Raw]


_REPLY: Final = msgspec.json.Decoder(_Reply)


def wanted_by(order: Order) -> Iterator[tuple[Manner, Line, Key]]:
    """The fragments that a message needs; what a summary only counts is not asked for."""
    if not any(line.type in order.services for line in order.lines):
        return
    collapses = is_collapsed(style=order.style, text_format=order.format, is_alone=order.is_alone)
    for line in Groups(order.lines, is_collapsed=collapses).shown(order.lines):
        if service := order.services.get(line.type, ""):
            for one_format in _formats(order.format):
                manner = Manner(service, order.tenant, one_format, order.style, order.zone, order.locale)
                yield manner, line, _key(manner, line)


def asks_for(wanted: Mapping[Manner, Mapping[Key, Line]]) -> Iterator[Ask]:
    """As few requests as their bounds allow."""
    for manner, lines in wanted.items():
        batch: dict[Key, Line] = {}
        room = MOST_BYTES
        for key, line in lines.items():
            room -= len(line.payload)
            if batch and (room < 0 or len(batch) == MOST_ITEMS):
                yield Ask(manner=manner, lines=batch)
                batch, room = {}, MOST_BYTES - len(line.payload)
            batch[key] = line
        if batch:
            yield Ask(manner=manner, lines=batch)


def answered(ask: Ask, body: bytes) -> Answered:
    """What a service's answer comes to; raises BadFragment when it is none at all. Takes a while: HTML is parsed."""
    try:
        values = _REPLY.decode(body).items
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadFragment(f"it answered something else than items: {err}") from err
    if len(values) != len(ask.lines):
        raise BadFragment(f"it answered {len(values)} items to {len(ask.lines)}")
    fragments: dict[Key, str] = {}
    failures: dict[Key, str] = {}
    for key, value in zip(ask.lines, values, strict=True):
        try:
            fragment = fragment_of(ask.manner.format, bytes(value))
        except BadFragment as err:
            failures[key] = str(err)
        else:
            if fragment is None:
                failures[key] = "it left that to the template"
            else:
                fragments[key] = fragment
    return Answered(fragments, failures)


def put_together(order: Order, fragments: Mapping[Key, str], failures: Mapping[Key, str]) -> Formatted:
    """The lines of a message with what came for each, and the first reason why something did not, by service."""
    own: dict[str, dict[str, str]] = {}
    counts: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for manner, line, key in wanted_by(order):
        count = counts.setdefault(manner.service, [0, 0])
        count[1] += 1
        if (fragment := fragments.get(key)) is not None:
            own.setdefault(line.notification_id, {})[manner.format] = fragment
        else:
            count[0] += 1
            reasons.setdefault(manner.service, failures.get(key, "there was no answer in time"))
    lines = [line._replace(formatted=own.get(line.notification_id)) for line in order.lines] if own else order.lines
    error = "; ".join(
        f"{service} formatted {of - missing} of {of}, templates the rest: {reasons[service]}"
        for service, (missing, of) in sorted(counts.items())
        if missing
    )
    return Formatted(lines, error[:500])


def services_in(order: Order) -> frozenset[str]:
    """The services that a message's items need."""
    return frozenset(order.services[kind] for kind in {line.type for line in order.lines} & order.services.keys())


def _formats(text_format: str) -> Sequence[str]:
    """HTML always has a plain-text twin."""
    return ("html", "text") if text_format == "html" else (text_format,)


def _key(manner: Manner, line: Line) -> Key:
    told = (line.notification_id, line.type, line.entity, line.group_key, line.occurred_at, line.payload)
    return blake2b(msgspec.msgpack.encode((manner, told)), digest_size=16).digest()


def _told(line: Line) -> dict[str, Any]:
    """An item as services see it; its payload to the letter."""
    return {
        "notification_id": line.notification_id,
        "type": line.type,
        "entity": line.entity,
        "group_key": line.group_key,
        "occur_time": line.occurred_at,
        "payload": msgspec.Raw((line.payload or "{}").encode()),
    }
