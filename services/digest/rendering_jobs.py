"""What is to be rendered and what came of it, also as it travels to the process that renders. Pure.

Times travel as ISO text, payloads as the JSON text they were accepted as: the other process does the parsing. Items
travel by the thousand, so that neither side ever holds a large digest twice.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

import msgspec

_LINES_AT_ONCE: Final = 1_000
BATCH_S: Final = 2.0
BATCH_BYTES: Final = 16 << 20
"""Of the jobs asked for together, none but the first is begun after so much time, or once so much is written.

Seconds of the clock, since others wait; a batch of usual digests takes a tenth of both.
"""
ANSWER_HEAD: Final = 4
"""Bytes of an answer's length, big-endian, before the answer."""
_encode: Final = msgspec.json.encode


class Line(NamedTuple):
    """One item of a message. `occurred_at` is ISO 8601, `payload` a JSON object.

    `formatted`: what its business service wrote, by format (see formatting.py); it stands in for the templates.
    """

    notification_id: str
    type: str
    type_name: str
    entity: str
    group_key: str
    occurred_at: str
    payload: str
    formatted: Mapping[str, str] | None = None


class Source(NamedTuple):
    """A tenant's template; `name` is how errors call it."""

    name: str
    subject: str
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One window to be rendered: who for, what, and with which of the tenant's own templates.

    `templates` maps places to sources: `item/<format>/<type>` for the items, `layout/<format>` for the whole. A place
    without one gets the built-in template. `lines` are in the order in which they are shown: by type, group key, time.
    """

    tenant: str
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

    @property
    def has_own(self) -> bool:
        """Whether anything but our templates writes it."""
        return bool(self.templates) or any(line.formatted for line in self.lines)

    def with_ours_only(self) -> "Job":
        """The same, written by the built-in templates."""
        return replace(self, templates={}, lines=[line._replace(formatted=None) for line in self.lines])

    def to_wire(self) -> Iterator[bytes]:
        """As lines of JSON: the job without its items, how many lines of items follow, and these."""
        chunks = range(0, len(self.lines), _LINES_AT_ONCE)
        yield _encode(replace(self, lines=()))
        yield _encode(len(chunks))
        for start in chunks:
            yield _encode(self.lines[start : start + _LINES_AT_ONCE])

    @classmethod
    def from_wire(cls, wire: Iterator[bytes]) -> "Job":
        """The job in what `to_wire` gave; takes no more lines than are its own."""
        job = msgspec.json.decode(next(wire), type=cls)
        lines: list[Line] = []
        for _ in range(msgspec.json.decode(next(wire), type=int)):
            lines += msgspec.json.decode(next(wire), type=list[Line])
        return replace(job, lines=lines)


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

    @classmethod
    def collected(cls, job_id: str, pieces: Generator[Part | None, None, str]) -> "Rendered":
        """All of what is written piece by piece; see rendering.pieces."""
        parts: list[Part] = []
        while True:
            try:
                part = next(pieces)
            except StopIteration as end:
                return cls(id=job_id, parts=parts, error=end.value)
            if part is None:
                parts.clear()
            else:
                parts.append(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the process that renders is asked: a job, or whether a template compiles; in so much processor time.

    `is_first`: of the jobs asked for together.
    """

    limit_s: float
    job: Job | None = None
    is_first: bool = False
    check: Source | None = None
    is_html: bool = False

    def to_wire(self) -> Iterator[bytes]:
        """As lines of JSON: the request without its job, then the job's."""
        yield _encode(replace(self, job=None))
        if self.job is not None:
            yield from self.job.to_wire()

    @classmethod
    def from_wire(cls, line: bytes) -> "Request":
        """The request in the first line; what has nothing to check is followed by a job."""
        return msgspec.json.decode(line, type=cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A piece of an answer: perhaps a part, or that those before do not count. It is the last unless it `goes_on`.

    `is_left`: the job was not begun, see BATCH_S, nor will those be that were asked for with it.
    `line` and `place` (subject or body) tell where a template does not compile.
    """

    part: Part | None = None
    is_taken_back: bool = False
    is_left: bool = False
    goes_on: bool = False
    error: str = ""
    line: int = 0
    place: str = ""

    def to_wire(self) -> bytes:
        """As MessagePack, in which HTML needs no escaping, after its length in ANSWER_HEAD bytes."""
        body = msgspec.msgpack.encode(self)
        return len(body).to_bytes(ANSWER_HEAD) + body

    @classmethod
    def from_wire(cls, body: bytes) -> "Answer":
        """What follows the length in what `to_wire` gave."""
        return msgspec.msgpack.decode(body, type=cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One part on its way to the dispatcher; not worth sending from `expires_at` on. `list_id`: see windows.py.

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
    list_id: str = ""
    trace: bytes = b""
