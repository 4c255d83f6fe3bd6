"""Notification types declared beside code and in files, and how they differ from what is stored."""

import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cli.catalog_changes import Difference, Kind, changes
from cli.catalog_sources import SourceError, declarations_in
from cli.notification_types import Declaration, declaration_of, is_declared, notification_type, schema_text
from services.digest.payload_schemas import compiled

CODE = '''
from dataclasses import dataclass
from cli.notification_types import notification_type

@notification_type(id="{id}", name="Order created")
@dataclass
class OrderCreated:
    """An order has come."""

    order: str
'''
FILE = """
notification_types:
  - id: trial/ends
    name: Your trial ends
    retention: 30d
    payload_schema: {type: object, required: [day]}
"""


@pytest.fixture(autouse=True)
def _path_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanning puts directories on the path, as a command may that ends soon."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@dataclass
class Line:
    """One thing ordered."""

    item: str
    price: Decimal


@notification_type(id="orders/created", name="Order created", retention=timedelta(days=30))
@dataclass
class OrderCreated:
    """An order has come.

    What follows is for programmers.
    """

    order: str
    at: datetime
    lines: list[Line] = field(default_factory=list)
    note: str | None = None


def test_a_dataclass_declares_its_type() -> None:
    """Id and name as given, the description from its docstring's first paragraph."""
    one = declaration_of(OrderCreated)
    assert (one.id, one.name, one.description) == ("orders/created", "Order created", "An order has come.")
    assert one.retention == timedelta(days=30)


@pytest.mark.parametrize(
    ("payload", "is_fine"),
    [
        ('{"order": "A1", "at": "2026-01-01T00:00:00Z"}', True),
        (
            '{"order": "A1", "at": "2026-01-01T00:00:00Z", "lines": [{"item": "nut", "price": "0.10"}], "note": null}',
            True,
        ),
        ('{"order": "A1"}', False),
        ('{"order": "A1", "at": "2026-01-01T00:00:00Z", "lines": [{"item": "nut", "price": "dear"}]}', False),
    ],
)
def test_the_schema_follows_from_the_dataclass_and_digest_takes_it(payload: str, is_fine: bool) -> None:
    """What pydantic would write for the dataclass fits; what it would not does not."""
    schema = compiled(schema_text(declaration_of(OrderCreated).payload_schema))
    assert (schema.problem(payload) == "") is is_fine


def test_a_service_may_be_named_to_format_a_type() -> None:
    """In code; changing it is a difference like any other."""

    @notification_type(id="orders/created", name="Order created", formatting_service="crm")
    @dataclass
    class Formatted:
        order: str

    after = declaration_of(Formatted)
    assert after.formatting_service == "crm"
    (change,) = changes([after], {after.id: after.model_copy(update={"formatting_service": ""})})
    assert change.differences == (Difference(field="formatting_service", stored="", declared="crm"),)


def test_a_subclass_does_not_declare_its_bases_type_again() -> None:
    """Only a class that is decorated itself is a type."""

    class Special(OrderCreated):
        pass

    assert is_declared(OrderCreated)
    assert not is_declared(Special)


def test_a_class_that_is_no_dataclass_is_refused() -> None:
    """The message says what to do."""

    @notification_type(id="a", name="A")
    class Plain:
        pass

    with pytest.raises(TypeError, match="put @notification_type above @dataclass"):
        declaration_of(Plain)


def test_a_directory_is_searched_for_code_and_files(tmp_path: Path) -> None:
    """Both kinds are found wherever they lie; other files, and those of installed packages, are not looked at."""
    package = tmp_path / "scanned_orders" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "events.py").write_text(CODE.format(id="orders/created"))
    (package / "broken.py").write_text("raise RuntimeError('not to be imported')")
    (tmp_path / "types.yaml").write_text(FILE)
    (tmp_path / "values.yaml").write_text("replicas: {{ .Values.replicas }}")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "other.yaml").write_text(FILE.replace("trial/ends", "not/ours"))
    found = declarations_in(str(tmp_path))
    assert [one.id for one in found] == ["orders/created", "trial/ends"]
    assert found[1].retention == timedelta(days=30)
    assert found[1].payload_schema == {"type": "object", "required": ["day"]}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("bad.yaml", "notification_types: [{id: a, name: A, retension: 3d}]", "notification_types.0.retension: Extra"),
        ("bad.yaml", "notification_types: [{id: a}]", "notification_types.0.name: Field required"),
        ("bad.yaml", "notification_types: [{id: a, name: A, retention: soon}]", "a duration is written like"),
        ("bad.yaml", "notification_types: [", "is not YAML"),
        ("scanned_bad.py", "import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("scanned_empty.py", "", "declares no notification types"),
        ("types.toml", "", "is neither Python nor YAML"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(tmp_path: Path, name: str, text: str, problem: str) -> None:
    """The message names file and field."""
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=problem) as refused:
        declarations_in(str(tmp_path / name))
    assert name.partition(".")[0] in str(refused.value)


def test_a_type_declared_twice_must_be_the_same(tmp_path: Path) -> None:
    """Otherwise the order of files would decide."""
    (tmp_path / "a.yaml").write_text(FILE)
    (tmp_path / "b.yaml").write_text(FILE)
    assert len(declarations_in(str(tmp_path))) == 1
    (tmp_path / "b.yaml").write_text(FILE.replace("30d", "31d"))
    with pytest.raises(SourceError, match="trial/ends is declared twice, and not the same"):
        declarations_in(str(tmp_path))


def of(**fields: Any) -> Declaration:
    """A declaration."""
    return Declaration(**{"id": "a", "name": "A", **fields})


def test_what_is_not_stored_is_new_and_what_is_the_same_is_left() -> None:
    """Stored types that nobody declares here are no change at all."""
    found = changes([of(), of(id="b")], {"b": of(id="b"), "c": of(id="c")})
    assert [(one.declaration.id, one.kind) for one in found] == [("a", Kind.NEW), ("b", Kind.SAME)]


def test_a_change_names_its_fields_and_the_places_in_the_schema() -> None:
    """People see what would change, not two texts to compare."""
    before = of(retention=timedelta(days=90), payload_schema={"properties": {"n": {"minimum": 0}, "old": {}}})
    after = of(retention=timedelta(days=1), payload_schema={"properties": {"n": {"minimum": 1}}})
    (change,) = changes([after], {"a": before})
    assert change.differences == (
        Difference(field="retention", stored="90 days", declared="1 days"),
        Difference(field="payload_schema.properties.n.minimum", stored="0", declared="1"),
        Difference(field="payload_schema.properties.old", stored="{}", declared=None),
    )
