"""Which subject an event has, and that it is a CloudEvent as the official SDK reads it."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import unquote
from uuid import UUID

import pytest
from carillon.scheduler.v1 import timer_pb2
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from libs.ids import derived_id
from services.scheduler.events import ALL_SUBJECTS, OutgoingEvent, subject_of
from services.scheduler.stream_events import encode_event
from services.scheduler.timer import StepOf, TargetKind, Timer

DUE = datetime(2013, 7, 31, 9, 0, 0, 250_000, tzinfo=UTC)
TIMER = UUID("018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f")
TYPES = st.text("abc019._/-", min_size=1, max_size=128)
ANY_TEXT = st.text(min_size=1, max_size=64)


def timer(**fields: Any) -> Timer:
    """A timer of an account, due at 09:00."""
    given: dict[str, Any] = {
        "tenant": "acme",
        "entity": "account/7",
        "type": "trial",
        "schedule_id": TIMER,
        "target": b"",
    } | fields
    return Timer(id=TIMER, shard=3, due_at=DUE, fire_at=DUE, target_kind=TargetKind.EVENT, sequence=1, **given)


def encode(
    of: Timer | None = None,
    *,
    payload: str = "",
    attempt: int = 1,
    deadline: datetime | None = None,
    trace: bytes = b"",
) -> OutgoingEvent:
    """The event `trial.over` of a timer."""
    content = timer_pb2.EventContent(type="trial.over", payload=payload)
    return encode_event(of or timer(), content, attempt=attempt, deadline=deadline, trace=trace)


def read(event: OutgoingEvent) -> BaseCloudEvent:
    """As a consumer reads it, checks of the SDK included."""
    return JSONFormat().read(None, event.payload)


@pytest.mark.parametrize(
    ("tenant", "event_type", "subject"),
    [
        ("acme", "trial", "carillon.events.acme.trial"),
        ("acme", "trial.over", "carillon.events.acme.trial.over"),
        ("acme", "com.example/trial_over-v2", "carillon.events.acme.com.example/trial_over-v2"),
        ("acme.eu", "trial", "carillon.events.acme%2Eeu.trial"),
        ("a b*>", "trial", "carillon.events.a%20b%2A%3E.trial"),
        ("Käse", "trial", "carillon.events.K%C3%A4se.trial"),
        ("100%", "trial", "carillon.events.100%25.trial"),
        ("acme", ".trial", "carillon.events.acme.%2Etrial"),
        ("acme", "trial.", "carillon.events.acme.trial%2E"),
        ("acme", "a.b..c", "carillon.events.acme.a%2Eb%2E%2Ec"),
        ("acme", "...", "carillon.events.acme.%2E%2E%2E"),
    ],
)
def test_subjects_are_what_their_module_says(tenant: str, event_type: str, subject: str) -> None:
    """Dots in a type are levels, dots in a tenant are not; the rest is encoded as in a URL."""
    assert subject_of(tenant, event_type) == subject


@given(tenant=ANY_TEXT, event_type=TYPES | ANY_TEXT)
def test_every_subject_is_one_that_nats_takes_and_can_be_read_back(tenant: str, event_type: str) -> None:
    """No empty token, no wildcard, no space; and as decoding gives both back, no two pairs share a subject."""
    subject = subject_of(tenant, event_type)
    tokens = subject.split(".")
    assert all(tokens)
    assert subject.isascii()
    assert subject.isprintable()
    assert not set(subject) & set(" *>")
    assert subject.startswith(ALL_SUBJECTS.removesuffix(">"))
    assert [unquote(tokens[2]), unquote(".".join(tokens[3:]))] == [tenant, event_type]


@given(tenant=ANY_TEXT, levels=st.lists(st.text("abc019_/-", min_size=1, max_size=8), min_size=1, max_size=10))
def test_levels_of_a_type_are_levels_of_its_subject(tenant: str, levels: list[str]) -> None:
    """So that `carillon.events.acme.trial.*` takes what it looks like, whatever the tenant is called."""
    assert subject_of(tenant, ".".join(levels)).split(".")[3:] == levels


def test_an_event_has_every_attribute() -> None:
    """A timeline's step with a report: all of CloudEvents' attributes and of ours, and no others."""
    step = StepOf(run_id=derived_id("run"), timeline="trial", version=2, step="deactivate")
    event = encode(timer(step_of=step), payload='{"plan": "pro"}', attempt=2, deadline=DUE + timedelta(hours=1))
    assert event.subject == "carillon.events.acme.trial.over"
    assert event.tenant == "acme"
    assert event.headers["Content-Type"] == "application/cloudevents+json"
    assert read(event).get_attributes() == {
        "specversion": "1.0",
        "id": str(event.id),
        "source": "/carillon/scheduler",
        "type": "trial.over",
        "subject": "account/7",
        "time": DUE,
        "datacontenttype": "application/json",
        "carillontenant": "acme",
        "carillontimerid": "018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f",
        "carillonscheduleid": "018f4e0c-6b1e-7cc3-98c4-dc0c0c07398f",
        "carillonattempt": 2,
        "carillontimertype": "trial",
        "carillondeadline": "2013-07-31T10:00:00.250000Z",
        "carillontimeline": "trial",
        "carillonstep": "deactivate",
    }
    assert read(event).get_data() == {"plan": "pro"}


def test_an_event_leaves_out_what_there_is_not() -> None:
    """No report expected, no type of timer, no timeline, no trace: no attributes for them."""
    attributes = read(encode(timer(type=""))).get_attributes()
    assert [name for name in attributes if name.startswith(("carillon", "trace"))] == [
        "carillontenant",
        "carillontimerid",
        "carillonscheduleid",
        "carillonattempt",
    ]


def test_an_attempt_always_has_the_same_id_and_each_its_own() -> None:
    """Whoever encodes it again makes the same event; a consumer tells a duplicate from another attempt."""
    assert encode().id == encode().id == derived_id("event", TIMER, 1)
    assert encode(attempt=2).id != encode(attempt=1).id


def test_an_empty_payload_is_an_empty_object() -> None:
    """As the contract says."""
    assert read(encode(payload="")).get_data() == {}


def test_a_payload_keeps_its_digits() -> None:
    """Through a float, 1.10 would lose its zero and large integers their end."""
    payload = '{"price": 1.10, "big": 123456789012345678901234567890, "text": "Grüße\\u0000"}'
    assert encode(payload=payload).payload.endswith(f'"data":{payload}}}'.encode())


@given(entity=ANY_TEXT)
def test_any_entity_makes_a_cloud_event(entity: str) -> None:
    """Quotes, line ends, other scripts."""
    assert read(encode(timer(entity=entity))).get_subject() == entity


def test_times_are_in_utc() -> None:
    """Whatever zone an instant comes in."""
    event = encode(deadline=DUE.astimezone(timezone(timedelta(hours=5.5))))
    assert read(event).get_extension("carillondeadline") == "2013-07-31T09:00:00.250000Z"


def test_an_event_carries_the_trace() -> None:
    """As CloudEvents' extension Distributed Tracing; where nobody traces it there is none."""
    event = encode(trace=bytes(range(24)))
    parent = "00-000102030405060708090a0b0c0d0e0f-1011121314151617-01"
    assert read(event).get_extension("traceparent") == parent
    assert read(encode()).get_extension("traceparent") is None
