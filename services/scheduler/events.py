"""Events for business services on their way to JetStream: what is published, and on which subject. Pure.

A fired timer with an event target becomes a CloudEvent on the stream EVENTS, which business services consume with plain
JetStream. The subject is `carillon.events.<tenant>.<type>`, so that a consumer's filter chooses what it gets:

    carillon.events.acme.trial.over     one type of one tenant
    carillon.events.acme.trial.*        trial.over, trial.reminder, …: dots in a type are levels of the subject
    carillon.events.acme.>              everything of one tenant
    carillon.events.*.trial.over        one type of every tenant

A tenant is always one token, so the dots in its name become %2E. What else a subject cannot hold is percent-encoded as
in a URL, UTF-8 first. A type whose dots would leave a token empty (`.a`, `a..b`, `a.`) is one token as well, with all
its dots as %2E. Decoding the tokens gives tenant and type back: no two pairs share a subject.
"""

from dataclasses import dataclass
from urllib.parse import quote
from uuid import UUID

STREAM = "EVENTS"
ALL_SUBJECTS = "carillon.events.>"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingEvent:
    """An encoded event. `id` is the CloudEvent's: the same timer and attempt always has the same."""

    id: UUID
    tenant: str
    subject: str
    payload: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBacklog:
    """What JetStream has not acknowledged, in all replicas; `oldest_s` is 0 without any."""

    events: int
    oldest_s: float


def subject_of(tenant: str, event_type: str) -> str:
    """Where an event is published; ValueError when one of them is empty."""
    if not tenant or not event_type:
        raise ValueError("an event needs a tenant and a type")
    levels = event_type.split(".")
    path = ".".join(quote(level) for level in levels) if all(levels) else _token(event_type)
    return f"carillon.events.{_token(tenant)}.{path}"


def _token(text: str) -> str:
    return quote(text).replace(".", "%2E")
