"""Notification types declared beside the code that tells them, for `carillon catalog sync`.

    @notification_type(id="procurement/purchase-order-created", name="Purchase order created")
    @dataclass
    class PurchaseOrderCreated:
        order: str
        total: Decimal

The JSON Schema of the payload follows from the dataclass, as pydantic reads it. Nothing happens when a class is
declared: it is remembered on the class, and `declaration_of` finds it there.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from datetime import timedelta
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from libs.settings import parse_duration

Channel = Literal["email", "webhook", "apprise", "log"]

_ATTRIBUTE: Final = "__carillon_notification_type__"

ClassT = TypeVar("ClassT", bound=type)


class Declaration(BaseModel):
    """A notification type as its owner wants it; see NotificationType in the contract for bounds and meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str
    description: str = ""
    default_cadence: str = "immediate"
    default_channel: Channel = "email"
    is_mandatory: bool = False
    retention: Annotated[timedelta, BeforeValidator(parse_duration)] = timedelta(days=90)
    formatting_service: str = ""
    payload_schema: Mapping[str, Any] = Field(default_factory=dict, description="Empty: any object.")


def notification_type(
    *,
    id: str,  # noqa: A002 - the contract's word.
    name: str,
    description: str = "",
    default_cadence: str = "immediate",
    default_channel: Channel = "email",
    is_mandatory: bool = False,
    retention: timedelta = timedelta(days=90),
    formatting_service: str = "",
) -> Callable[[ClassT], ClassT]:
    """Declare the decorated dataclass the payload of a notification type. Without a description its docstring is it."""

    def declare(cls: ClassT) -> ClassT:
        declared = {
            "id": id,
            "name": name,
            "description": description or _own_docstring(cls),
            "default_cadence": default_cadence,
            "default_channel": default_channel,
            "is_mandatory": is_mandatory,
            "retention": retention,
            "formatting_service": formatting_service,
        }
        setattr(cls, _ATTRIBUTE, declared)
        return cls

    return declare


def is_declared(value: object) -> bool:
    """Whether it is a class that was declared itself, not only one of its bases."""
    return isinstance(value, type) and _ATTRIBUTE in vars(value)


def declaration_of(cls: type) -> Declaration:
    """What was declared, with the schema of the payload; TypeError when the class cannot be a payload."""
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} is not a dataclass: put @notification_type above @dataclass")
    try:
        schema = TypeAdapter(cls).json_schema(mode="serialization", schema_generator=_PayloadSchema)
        return Declaration(**vars(cls)[_ATTRIBUTE], payload_schema=schema)
    except ValueError as error:
        raise TypeError(f"{cls.__qualname__}: {error}") from error


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as it is stored: the same text for the same schema, empty for none."""
    return json.dumps(schema, sort_keys=True, separators=(",", ":"), ensure_ascii=False) if schema else ""


class _PayloadSchema(GenerateJsonSchema):
    """Without look-ahead in patterns, which digest refuses: it could be slow."""

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        return {"type": "string", "pattern": r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)$"}


def _own_docstring(cls: type) -> str:
    """The first paragraph; not the signature that dataclasses write where there is none."""
    text = (cls.__doc__ or "").strip()
    return "" if text.startswith(f"{cls.__name__}(") else " ".join(text.split("\n\n", 1)[0].split())
