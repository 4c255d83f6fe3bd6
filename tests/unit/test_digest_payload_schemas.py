"""Schemas of payloads: what is taken, what is refused, and what a payload hears."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.digest.payload_schemas import BadSchema, PayloadSchemas, compiled, schema_id

ORDER = {
    "type": "object",
    "required": ["order"],
    "properties": {
        "order": {"type": "string", "pattern": "^[A-Z]+-[0-9]+$"},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/Line"}},
    },
    "$defs": {"Line": {"type": "object", "properties": {"count": {"type": "integer", "minimum": 1}}}},
}

KEYWORDS = ["$ref", "$id", "items", "allOf", "properties", "type", "not", "enum", "pattern"]
SCHEMA_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYWORDS) | st.text(), inner),
)


def of(schema: Any) -> str:
    """What compiling a schema says; empty when it is taken."""
    try:
        compiled(schema if isinstance(schema, str) else json.dumps(schema))
    except BadSchema as error:
        return str(error)
    return ""


def test_a_payload_that_fits_has_no_problem() -> None:
    """A payload as the schema asks for it is fine."""
    assert compiled(json.dumps(ORDER)).problem('{"order": "A-1", "lines": [{"count": 3}]}') == ""


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        ('{"order": "A-1", "lines": [{"count": 1}, {"count": 0}]}', "payload.lines[1].count: value is less than"),
        ("{}", 'payload: "order" is a required property'),
        ('{"order": "SECRET"}', "payload.order: value does not match"),
        ('{"order"', "payload: unexpected end of data"),
    ],
)
def test_a_payload_that_does_not_fit_hears_where_and_why(payload: str, problem: str) -> None:
    """The path comes first; the payload's values are not repeated, for they may be private."""
    found = compiled(json.dumps(ORDER)).problem(payload)
    assert found.startswith(problem)
    assert "SECRET" not in found


def test_a_payload_nested_beyond_reason_is_a_problem_not_a_crash() -> None:
    """What the validator does not walk is refused."""
    deep = '{"a":' * 900 + "1" + "}" * 900
    assert compiled(json.dumps({"type": "object"})).problem(deep) != "crash"


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ({"type": "strin"}, "is no JSON Schema: type: "),
        ({"minLength": -1}, "is no JSON Schema: minLength: "),
        ({"pattern": "(?=a)b"}, "is no JSON Schema: pattern: "),
        ({"pattern": "(a{1000}){1000}"}, "is no JSON Schema: pattern: "),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "must be of the dialect"),
        ({"$schema": 3}, "must be of the dialect"),
        ({"$ref": "https://example.com/a.json"}, "must refer to itself only"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "must refer to itself only"),
        ({"$ref": "#/$defs/no"}, "refers to #/$defs/no, which it does not hold"),
        ({"$ref": "#"}, "must refer to itself only, as #/$defs/…"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, "must not refer to itself in a cir"),
        ({"items": {"$dynamicRef": "#x"}}, "must not use $dynamicRef"),
        ({"items": {"$id": "https://example.com/b"}}, "must have $id at its root only"),
        ({"description": "x" * 70_000}, "must be at most 64 KiB, got 70,0"),
        ({"allOf": [{"minimum": 1}] * 1_000}, "has more than 1,000 subschemas"),
        ({"allOf": [{"pattern": "a"}] * 51}, "has more than 50 patterns"),
        ({"pattern": "(\\p{L}{9}){9}"}, "is no JSON Schema: pattern: "),
    ],
)
def test_a_schema_that_cannot_be_used_says_why(schema: Any, why: str) -> None:
    """Invalid, remote, circular and unbounded schemas are refused in words."""
    assert of(schema).startswith(why)


def test_references_that_double_at_each_step_are_counted_unfolded() -> None:
    """Twelve small definitions that each name the next one twice would cost 4,096 looks at each value."""
    definitions = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(12)} | {"d12": {}}
    assert "each $ref counted" in of({"$ref": "#/$defs/d0", "$defs": definitions})


def test_a_name_that_looks_like_a_reference_is_none() -> None:
    """Payloads may have a field called $ref, and constants may hold anything."""
    assert of({"properties": {"$ref": {"type": "string"}}, "const": {"$ref": "http://example.com"}}) == ""


def test_a_slow_pattern_is_not_slow() -> None:
    """Patterns run in linear time; with backtracking this one would take years."""
    assert compiled(json.dumps({"properties": {"a": {"pattern": "^(a+)+$"}}})).problem(
        json.dumps({"a": "a" * 50_000 + "!"})
    )


@given(SCHEMA_LIKE)
def test_whatever_is_put_is_compiled_or_refused(schema: Any) -> None:
    """No text makes the check fail in another way."""
    of({"items": schema})
    of(schema)


def test_schemas_are_compiled_once_per_content() -> None:
    """The same text is the same schema, and is there when it is asked for again."""
    schemas, text = PayloadSchemas(), json.dumps(ORDER)
    one = schemas.add(schema_id(text), text)
    assert schemas.get(schema_id(text)) is one
    assert schemas.get(schema_id("{}")) is None


def test_a_stored_schema_that_no_longer_compiles_stops_nobody() -> None:
    """Should a later release refuse what an earlier one took, notifications still go out."""
    assert PayloadSchemas().add(schema_id("no"), "no").problem("{}") == ""
