"""JSON Schemas (2020-12) of notification types' payloads: checked when they are put, compiled once, then cheap. Pure.

jsonschema-rs validates a payload of five lines in 1.0 µs, fastjsonschema in 11.8 µs (and knows no 2020-12). What a
tenant writes must not stop anybody, so beyond being valid a schema is bounded here:

- it refers to nothing but itself (`#/…`), and nothing is ever fetched;
- unfolded, with each `$ref` replaced by what it names, it has at most MAX_UNFOLDED subschemas. So it cannot refer to
  itself in a circle, and each value of a payload is looked at that often at most: the worst schema takes 0.3 s for
  the largest payload;
- its patterns run in time linear in the text, and must therefore do without look-around and back-references; there are
  at most 50, of 256 KiB when compiled: the worst ones take 0.1 s to compile.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import orjson
from jsonschema_rs import Draft202012Validator, RegexOptions, ValidationError

from libs.ids import derived_id

MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_UNFOLDED: Final = 1_000
_MAX_DEPTH: Final = 64
_MOST_KEPT: Final = 250
_MOST_PATTERNS: Final = 50
_PATTERN_BYTES: Final = 256 * 1024
_LONGEST_PROBLEM: Final = 500
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_SUBSCHEMA: Final = (
    *("items", "contains", "additionalProperties", "propertyNames", "not", "if", "then", "else"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS: Final = ("properties", "patternProperties", "dependentSchemas", "dependencies")
_UNBOUNDED: Final = ("$dynamicRef", "$recursiveRef")


class BadSchema(ValueError):
    """The schema cannot be used; the message says why, for the person who wrote it."""


def schema_id(text: str) -> UUID:
    """What a schema is kept under: the same for the same text."""
    return derived_id("payload-schema", text)


@dataclass(frozen=True, slots=True)
class PayloadSchema:
    """A compiled schema; without a validator it allows everything."""

    _validator: Draft202012Validator | None

    def problem(self, payload: str) -> str:
        """What is wrong with a payload, its path first; empty when nothing is. Never shows the payload's values."""
        if self._validator is None:
            return ""
        try:
            self._validator.validate(orjson.loads(payload))
        except ValidationError as error:
            path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
            return f"payload{path}: {error.message}"[:_LONGEST_PROBLEM]
        except ValueError as error:  # No JSON, or nested beyond what the validator walks.
            return f"payload: {error}"[:_LONGEST_PROBLEM]
        return ""


def compiled(text: str) -> PayloadSchema:
    """The schema in a text; raises BadSchema."""
    if (size := len(text.encode())) > MAX_SCHEMA_BYTES:
        raise BadSchema(f"must be at most {MAX_SCHEMA_BYTES // 1024} KiB, got {size:,} bytes")
    try:
        schema = orjson.loads(text)
    except ValueError as error:
        raise BadSchema(f"is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise BadSchema("must be a JSON object")
    if schema.get("$schema", _DIALECT) not in (_DIALECT, f"{_DIALECT}#"):
        raise BadSchema(f"must be of the dialect {_DIALECT}")
    _Unfolding(schema).run()
    try:
        validator = Draft202012Validator(
            schema, pattern_options=RegexOptions(size_limit=_PATTERN_BYTES), mask="value", offline=True
        )
    except ValueError as error:
        raise BadSchema(f"is no JSON Schema: {_why(error)}") from error
    return PayloadSchema(validator)


def _why(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        place = "/".join(map(str, error.instance_path))
        return (f"{place}: " if place else "") + error.message[:_LONGEST_PROBLEM]
    return str(error)[:_LONGEST_PROBLEM]


class _Unfolding:
    """Walks a schema as a payload's validation would at worst, and raises BadSchema where that has no good bound."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root, self._left, self._patterns = root, MAX_UNFOLDED, 0
        self._within: set[str] = set()

    def run(self) -> None:
        """Definitions count where they are referred to; what nobody refers to is never looked at."""
        self._walk(self._root, 0)

    def _walk(self, schema: object, depth: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise BadSchema(f"has more than {MAX_UNFOLDED:,} subschemas, each $ref counted as what it refers to")
        if depth > _MAX_DEPTH:
            raise BadSchema(f"must not be nested deeper than {_MAX_DEPTH}")
        if not isinstance(schema, dict):
            return
        if found := [name for name in _UNBOUNDED if name in schema]:
            raise BadSchema(f"must not use {found[0]}")
        if schema is not self._root and (found := [name for name in ("$id", "$schema") if name in schema]):
            raise BadSchema(f"must have {found[0]} at its root only")
        self._count_patterns(schema)
        if "$ref" in schema:
            self._follow(schema["$ref"], depth)
        for one in _subschemas(schema):
            self._walk(one, depth + 1)

    def _count_patterns(self, schema: dict[str, Any]) -> None:
        self._patterns += ("pattern" in schema) + sum(1 for _ in _values(schema.get("patternProperties")))
        if self._patterns > _MOST_PATTERNS:
            raise BadSchema(f"has more than {_MOST_PATTERNS} patterns, each $ref counted as what it refers to")

    def _follow(self, reference: object, depth: int) -> None:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise BadSchema(f"must refer to itself only, as #/$defs/…, not to {str(reference)[:200]!r}")
        if reference in self._within:
            raise BadSchema(f"must not refer to itself in a circle, as {reference[:200]} does")
        self._within.add(reference)
        self._walk(_resolved(self._root, reference), depth + 1)
        self._within.remove(reference)


def _subschemas(schema: dict[str, Any]) -> Iterator[object]:
    for name in _SUBSCHEMA:
        if name in schema:
            yield schema[name]
    for name in _LISTS:
        if isinstance(listed := schema.get(name), list):
            yield from listed
    for name in _MAPS:
        yield from _values(schema.get(name))


def _values(named: object) -> Iterator[object]:
    if isinstance(named, dict):
        yield from named.values()


def _resolved(root: dict[str, Any], reference: str) -> object:
    found: Any = root
    for part in reference.removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(name)] if isinstance(found, list) else found[name]
        except (LookupError, TypeError, ValueError) as error:
            raise BadSchema(f"refers to {reference[:200]}, which it does not hold") from error
    return found


class PayloadSchemas:
    """Compiled schemas by their content, the most recently used 250."""

    def __init__(self) -> None:
        self._kept: OrderedDict[UUID, PayloadSchema] = OrderedDict()

    def get(self, one_id: UUID) -> PayloadSchema | None:
        """The schema with this id, if it is here."""
        if one_id in self._kept:
            self._kept.move_to_end(one_id)
        return self._kept.get(one_id)

    def add(self, one_id: UUID, text: str) -> PayloadSchema:
        """Compile a stored schema and keep it. One that was taken once and cannot be used any more stops nobody."""
        try:
            one = compiled(text)
        except BadSchema:
            one = PayloadSchema(None)
        self._kept[one_id] = one
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return one
