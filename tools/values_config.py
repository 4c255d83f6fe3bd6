"""What may stand in the chart's `config` maps: the services' settings, as JSON Schema, taken from their code.

Left out are secrets, so that none ends in a ConfigMap; files, which `secrets` mounts; and what has a value of its own
in the chart. Settings in which all services must agree may only be set for all of them.
"""

import re
from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin

from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from libs.settings import Settings
from libs.settings_doc import all_groups

ROOT: Final = Path(__file__).resolve().parent.parent
SERVICES: Final = ("intake", "scheduler", "digest", "dispatcher")
DURATION: Final = r"^((\d+(\.\d+)?(d|h|ms|us|m|s))+|P[0-9TDHMS.]+)$"

Schema = dict[str, Any]

# What has a value of its own in the chart: ports, shards, drain, authentication, TLS, the page for unsubscribing.
_CHARTS_OWN: Final = re.compile(
    r"CARILLON_(SHARDS|(GRPC|HTTP)_(HOST|PORT)|GRPC_DRAIN_.*|GRPC_TLS_.*|DISPATCHER_UNSUBSCRIBE_(BASE_URL|HOST|PORT)"
    r"|AUTH_(MODE|DEFAULT_TENANT|JWT_ISSUER|JWT_AUDIENCE|JWKS_URL|JWKS_TOKEN_FILE))"
)
# Files that `secrets` mounts: elsewhere there is nothing at the path.
_FILES: Final = re.compile(r"CARILLON_.*_FILE")
# In which all services must agree: the settings of streams that several declare, and of the clock.
_SHARED_ONLY: Final = re.compile(r"CARILLON_(TEST_CLOCK|NATS_.*|LINK_INBOX_RETENTION)")


def shared_config() -> Schema:
    """Of `config`: the settings that every service has."""
    return _config(lambda owner, _name: owner is None)


def config_of(service: str) -> Schema:
    """Of `services.<name>.config`: the service's own settings, and the shared ones that may differ."""
    return _config(lambda owner, name: owner == service or (owner is None and _SHARED_ONLY.fullmatch(name) is None))


def object_of(properties: dict[str, Schema], *, or_null: bool = False) -> Schema:
    """An object with these properties and no others."""
    kind: Any = ["object", "null"] if or_null else "object"
    return {"type": kind, "additionalProperties": False, "properties": properties}


def text(pattern: str | None = None, *, least: int = 0) -> Schema:
    """Text that matches, of at least so many characters."""
    return {"type": "string"} | ({"pattern": pattern} if pattern else {}) | ({"minLength": least} if least else {})


def texts() -> Schema:
    """A map of text to text: labels, annotations."""
    return {"type": "object", "additionalProperties": {"type": "string"}}


def number(least: int, most: int) -> Schema:
    """A whole number, the bounds included."""
    return {"type": "integer", "minimum": least, "maximum": most}


def one_of(*choices: str) -> Schema:
    """One of these words."""
    return {"enum": list(choices)}


def _config(wanted: Callable[[str | None, str], bool]) -> Schema:
    """Of the settings that may stand in `config`, those that are wanted by (owner, name); None owns what all have."""
    found: dict[str, Schema] = {}
    for group in _groups():
        owner = re.match(r"services\.(\w+)\.", group.__module__)
        for name, field in group.model_fields.items():
            variable = group.variable_of(name)
            is_secret = "SecretStr" in str(field.annotation)
            if is_secret or _CHARTS_OWN.fullmatch(variable) or _FILES.fullmatch(variable):
                continue
            if wanted(owner and owner[1], variable):
                found[variable] = _address() if variable.endswith(("_URL", "_ENDPOINT")) else _setting(field)
    return object_of(found)


@cache
def _groups() -> list[type[Settings]]:
    return all_groups(ROOT)


def _setting(field: FieldInfo) -> Schema:
    kind = field.annotation
    if get_origin(kind) in (UnionType, Union):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if kind is timedelta:
        return text(DURATION)
    if kind is bool:
        return {"enum": [True, False, "on", "off", "true", "false"]}
    if kind is int:
        return {"type": "integer"} | _bounds(field)
    if kind is float:  # `helm --set` makes text of 0.5.
        return {"anyOf": [{"type": "number"} | _bounds(field), text(r"^\d+(\.\d+)?$")]}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return one_of(*(choice.value for choice in kind))
    if get_origin(kind) is dict:
        return {"type": ["object", "string"]}
    return text()


def _bounds(field: FieldInfo) -> Schema:
    found: Schema = {}
    for bound in field.metadata:
        found |= {"minimum": bound.ge} if isinstance(bound, Ge) else {}
        found |= {"maximum": bound.le} if isinstance(bound, Le) else {}
    return found


def _address() -> Schema:
    """Without credentials."""
    return text(r"^[^@]+$")
