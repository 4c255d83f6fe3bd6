"""What templates see: items, and a part's items by type and group key. Pure.

A view reads its payload when it is asked for, and forgets it when it has been written: of fifty thousand items only
the lines and what was written of them are kept.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo

from services.digest.rendering_jobs import Line
from services.digest.speech import Speech

COLLAPSED_TO: Final = 20
"""Items with one group key that a summary shows, the newest; the rest are counted."""
_TITLES: Final = ("title", "subject", "headline", "summary")


_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Labelled:
    """A payload's field as people read it."""

    label: str
    value: str


class ItemView:
    """What templates see as `item`; `body` is the item's own rendering and there in layouts only."""

    __slots__ = ("_line", "_pairs", "_payload", "_speech", "_title", "body")

    def __init__(self, line: Line, speech: Speech) -> None:
        self._line, self._speech = line, speech
        self._payload: dict[str, Any] | None = None
        self._pairs: list[tuple[str, str]] | None = None
        self._title = ""
        self.body = ""

    @property
    def id(self) -> str:
        """The notification's."""
        return self._line.notification_id

    @property
    def type(self) -> str:
        """The notification type's id."""
        return self._line.type

    @property
    def name(self) -> str:
        """The notification type's name."""
        return self._line.type_name

    @property
    def entity(self) -> str:
        """Whom it is about."""
        return self._line.entity

    @property
    def group_key(self) -> str:
        """What it belongs to; may be empty."""
        return self._line.group_key

    @property
    def time(self) -> datetime:
        """When it happened, in the subscriber's zone."""
        return datetime.fromisoformat(self._line.occurred_at).astimezone(ZoneInfo(self._speech.zone))

    @property
    def moment(self) -> str:
        """The same as its subscriber reads it."""
        return self._speech.instant(self._line.occurred_at)

    @property
    def occurred_at(self) -> str:
        """When it happened, as ISO 8601 text in UTC."""
        return self._line.occurred_at

    @property
    def payload_text(self) -> str:
        """The payload to the letter, so that no number loses a digit; raises ValueError for what is no JSON."""
        is_object = self._line.payload.lstrip()[:1] == "{" and self.payload is not None
        return self._line.payload if is_object else json.dumps(self.payload)

    @property
    def payload(self) -> dict[str, Any]:
        """As it was accepted; {"value": …} if that was no object."""
        if self._payload is None:
            self._payload = object_of(self._line.payload)
        return self._payload

    def fragment(self, text_format: str) -> str | None:
        """What its business service wrote."""
        return None if self._line.formatted is None else self._line.formatted.get(text_format)

    @property
    def title(self) -> str:
        """The payload's title or subject in one line, else the entity, else the type's name."""
        return self._read()[0]

    @property
    def fields(self) -> list[Labelled]:
        """The payload's other fields, those that are null left out."""
        return [Labelled(label, value) for label, value in self.pairs]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The same as label and value."""
        return self._read()[1]

    def _read(self) -> tuple[str, list[tuple[str, str]]]:
        if self._pairs is None:
            payload = self.payload
            named = next((name for name in _TITLES if isinstance(payload.get(name), str) and payload[name]), "")
            self._title = " ".join(payload[named].split()) if named else self.entity or self.name
            self._pairs = [
                (_label(name), self._shown(value))
                for name, value in payload.items()
                if name != named and value is not None
            ]
        return self._title, self._pairs

    def _shown(self, value: Any) -> str:
        if isinstance(value, str):
            return self._speech.field(value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int):
            return str(value)
        # Not whole numbers: they are as often ids and years as amounts, and nobody reads "order 20,260,709".
        return self._speech.number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)

    def _forget(self) -> None:
        """Until somebody asks again."""
        self._payload = self._pairs = None


def object_of(payload: str) -> dict[str, Any]:
    """The JSON object in a payload. Raises ValueError for what is no JSON."""
    try:
        parsed, end = _DECODER.raw_decode(payload)
    except ValueError:
        parsed, end = {}, 0
    if end != len(payload):  # White space around it, or an error, which the slower one tells.
        parsed = json.loads(payload)
    return parsed if isinstance(parsed, dict) else {"value": parsed}


@lru_cache(maxsize=4096)
def _label(name: str) -> str:
    words = name.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:64]


# Groups


def kinds_of(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Types with their number of items, most frequent first."""
    counts = Counter((line.type, line.type_name) for line in lines)
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return [{"type": key[0], "name": key[1], "count": count} for key, count in ordered]


def is_collapsed(*, style: str, text_format: str, is_alone: bool) -> bool:
    """Whether of many items with one group key only the newest are shown. What programs read is whole."""
    return style == "summary" and not is_alone and text_format != "json"


class Groups:
    """The items of a digest by type and group key, and how many there are of each in all its parts."""

    def __init__(self, lines: Sequence[Line], *, is_collapsed: bool) -> None:
        self._counts = Counter((line.type, line.group_key) for line in lines)
        self._types = Counter(line.type for line in lines)
        self._is_collapsed = is_collapsed

    def shown(self, lines: Sequence[Line]) -> Iterator[Line]:
        """All lines, in order, or of those with one group key the last few."""
        seen: Counter[tuple[str, str]] = Counter()
        for line in lines:
            key = (line.type, line.group_key)
            seen[key] += 1
            if seen[key] > self._more(key):
                yield line

    def _more(self, key: tuple[str, str]) -> int:
        """How many with this key are counted, not shown."""
        return max(0, self._counts[key] - COLLAPSED_TO) if self._is_collapsed and key[1] else 0

    def of(self, views: Sequence[ItemView], before: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
        """A part's items as templates see them; `before` says how many with each key the parts before it show.

        A group has type, name, items, clusters and `count`, that of the whole digest. A cluster has key, items, `count`
        (of the whole digest), `more` (counted there, but shown nowhere; 0 but in its first part) and is_continued.
        """
        groups: dict[str, dict[str, Any]] = {}
        clusters: dict[tuple[str, str], dict[str, Any]] = {}
        for view in views:
            key = (view.type, view.group_key)
            if view.type not in groups:
                groups[view.type] = {
                    "type": view.type,
                    "name": view.name,
                    "count": self._types[view.type],
                    "items": [],
                    "clusters": [],
                }
            if key not in clusters:
                clusters[key] = self._cluster(key, is_continued=before.get(key, 0) > 0)
                groups[view.type]["clusters"].append(clusters[key])
            groups[view.type]["items"].append(view)
            clusters[key]["items"].append(view)
        return list(groups.values())

    def _cluster(self, key: tuple[str, str], *, is_continued: bool) -> dict[str, Any]:
        more = 0 if is_continued else self._more(key)
        return {
            "key": key[1],
            "count": self._counts[key],
            "more": more,
            "items": [],
            "is_continued": is_continued,
        }
