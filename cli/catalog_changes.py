"""The difference between the notification types that are declared and those that are stored. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from cli.notification_types import Declaration

_MOST_PLACES: Final = 8
_FIELDS: Final = (
    *("name", "description", "default_cadence", "default_channel", "is_mandatory", "retention", "formatting_service"),
    "payload_schema",
)


class Kind(StrEnum):
    """What applying a declaration would do."""

    NEW = "new"
    CHANGED = "changed"
    SAME = "same"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field, or one place in the schema, as it is stored and as it is declared; None where it is not there."""

    field: str
    stored: str | None
    declared: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What applying one declaration would do; `differences` are empty unless it is CHANGED."""

    declaration: Declaration
    kind: Kind
    differences: Sequence[Difference] = ()


def changes(declared: Sequence[Declaration], stored: Mapping[str, Declaration]) -> list[Change]:
    """One per declaration, in order. What is stored and not declared may be somebody else's: it is left alone."""
    return [_change(one, stored.get(one.id)) for one in declared]


def _change(one: Declaration, before: Declaration | None) -> Change:
    if before is None:
        return Change(declaration=one, kind=Kind.NEW)
    found = tuple(_differences(before, one))
    return Change(declaration=one, kind=Kind.CHANGED if found else Kind.SAME, differences=found)


def _differences(before: Declaration, after: Declaration) -> Iterator[Difference]:
    for field in _FIELDS:
        old, new = getattr(before, field), getattr(after, field)
        if old == new:
            continue
        if field == "payload_schema" and old and new:
            places = list(_places(field, old, new))
            yield from places[:_MOST_PLACES]
            if len(places) > _MOST_PLACES:
                yield Difference(field=f"{field} …", stored=None, declared=f"{len(places) - _MOST_PLACES} more places")
        else:
            yield Difference(field=field, stored=_shown(old), declared=_shown(new))


def _places(path: str, old: Any, new: Any) -> Iterator[Difference]:
    """Where two schemas differ, as deep as both go."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}"
            if key not in new:
                yield Difference(field=inner, stored=_shown(old[key]), declared=None)
            elif key not in old:
                yield Difference(field=inner, stored=None, declared=_shown(new[key]))
            else:
                yield from _places(inner, old[key], new[key])
    elif old != new:
        yield Difference(field=path, stored=_shown(old), declared=_shown(new))


def _shown(value: Any) -> str:
    match value:
        case timedelta():
            return f"{value.total_seconds() / 86400:g} days"
        case str():
            return value
        case _:
            return json.dumps(value, ensure_ascii=False)
