"""What is to be rendered and what came of it, also as it travels to the process that renders. Pure.

Times travel as ISO text, payloads as the JSON text they were accepted as: the other process does the parsing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID


class Line(NamedTuple):
    """One item of a message. `occurred_at` is ISO 8601, `payload` a JSON object."""

    notification_id: str
    type: str
    type_name: str
    entity: str
    group_key: str
    occurred_at: str
    payload: str


class Source(NamedTuple):
    """A tenant's template; `name` is how errors call it."""

    name: str
    subject: str
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One window to be rendered: who for, what, and with which of the tenant's own templates.

    `templates` maps places to sources: `item/<format>/<type>` for the items, `layout/<format>` for the whole. A place
    without one gets the built-in template. `lines` are in the order in which they are shown.
    """

    id: str
    is_alone: bool
    format: str
    style: str
    subscriber: str
    zone: str
    locale: str
    cadence: str
    cadence_name: str
    closed_at: str
    lines: Sequence[Line]
    templates: Mapping[str, Source] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """As plain lists and dicts, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Job":
        """The job in what `to_wire` gave, after JSON."""
        lines = [Line(*line) for line in wire["lines"]]
        templates = {place: Source(*source) for place, source in wire["templates"].items()}
        return cls(**{**wire, "lines": lines, "templates": templates})


class Part(NamedTuple):
    """One message; what its format does not have is empty."""

    subject: str
    html: str
    text: str
    json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What came of a job: its parts in order, none if not even the built-in templates could do it.

    `error` says why the tenant's templates were not used, or why there is nothing; empty when all is well.
    """

    id: str
    parts: Sequence[Part]
    error: str = ""

    def to_wire(self) -> dict[str, Any]:
        """As plain lists and dicts, for JSON."""
        return {"id": self.id, "parts": self.parts, "error": self.error}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Rendered":
        """What `to_wire` gave, after JSON."""
        return cls(id=wire["id"], parts=[Part(*part) for part in wire["parts"]], error=wire["error"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One part on its way to the dispatcher; not worth sending from `expires_at` on.

    `priority` as a number (catalog.Priority): the process that renders imports this module, and nothing it needs not.
    """

    tenant: str
    delivery_id: UUID
    digest_id: UUID
    subscriber: str
    channel: str
    address: str
    part: Part
    priority: int
    expires_at: datetime | None = None
