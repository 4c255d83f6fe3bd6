"""`carillon tail` tells what is new since its first look, once per state."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import grpc
import pytest
from carillon.digest.v1 import digest_pb2 as digest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.intake.v1 import intake_pb2 as intake
from carillon.link.v1 import status_pb2
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer

from libs.wire import from_timestamp, to_timestamp
from tests.support.fake_services import SERVICES, FakeServices, Refuses, fake_services

NOON = to_timestamp(datetime(2026, 12, 1, 12, tzinfo=UTC))


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """Answer nothing yet."""
    with fake_services() as found:
        yield found


def deliveries(**states: int) -> dispatcher.ListDeliveriesResponse:
    """A list with these."""
    return dispatcher.ListDeliveriesResponse(
        deliveries=[
            dispatcher.Delivery(id=name, state=state, create_time=NOON, channel="email", subscriber="ann")  # type: ignore[arg-type]
            for name, state in states.items()
        ]
    )


def test_what_is_new_and_what_changed_is_told_once(services: FakeServices) -> None:
    """What was there at the first look is not; a service that is away in between is told and asked again."""
    pending, sent = dispatcher.DELIVERY_STATE_PENDING, dispatcher.DELIVERY_STATE_SENT
    services.answers["ListDeliveries"] = [
        deliveries(old=sent, d1=pending),
        deliveries(old=sent, d1=pending, d2=pending),
        Refuses(code=grpc.StatusCode.INTERNAL, message="Broken."),
        deliveries(old=sent, d1=sent, d2=sent),
    ]
    ran = services.run("tail", "--only", "deliveries", "--interval", "10ms", "--count", "3", "--json")
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert [(one["id"], one["state"]) for one in told] == [("d2", "pending"), ("d1", "sent"), ("d2", "sent")]
    assert told[0]["object"]["subscriber"] == "ann"
    assert (ran.code, ran.err) == (0, "Broken. (INTERNAL)\n")


def test_all_kinds_are_followed(services: FakeServices) -> None:
    """Requests, timers, digests and deliveries, one line each for people; timers by the scheduler's own time."""
    logged = intake.LoggedRequest(
        id="r1", request=intake.Request(customer="ann", item="bike"), state=intake.REQUEST_STATE_OPEN, submit_time=NOON
    )
    fired = timer.Timer(id="t1", entity="e", state=timer.TIMER_STATE_FIRED, fire_time=NOON)
    one = digest.Digest(id="g1", subscriber="ann", close_time=NOON, outcome="pending", item_count=2)
    services.answers |= {
        "ListRequests": [intake.ListRequestsResponse(), intake.ListRequestsResponse(requests=[logged])],
        "GetStatus": status_pb2.GetStatusResponse(time=NOON),
        "ListTimers": [scheduler.ListTimersResponse(), scheduler.ListTimersResponse(timers=[fired])],
        "ListDigests": [digest.ListDigestsResponse(), digest.ListDigestsResponse(digests=[one])],
        "ListDeliveries": [deliveries(), deliveries(d1=dispatcher.DELIVERY_STATE_SENT)],
    }
    ran = services.run("tail", "--interval", "10ms", "--count", "4")
    assert [line.split()[2:4] for line in ran.out.splitlines()] == [
        ["request", "open"],
        ["timer", "fired"],
        ["digest", "pending"],
        ["delivery", "sent"],
    ]
    since = from_timestamp(services.asked("ListTimers")[0].from_time)
    assert since == datetime(2026, 12, 1, 11, 59, tzinfo=UTC)


def test_following_ends_when_its_time_is_over(services: FakeServices) -> None:
    """Exit code 0, although nothing happened."""
    services.answers["ListDeliveries"] = deliveries()
    ran = services.run("tail", "--only", "deliveries", "--interval", "10ms", "--for", "100ms")
    assert (ran.code, ran.out) == (0, "")


def test_where_nothing_can_be_followed_it_ends_at_once(services: FakeServices) -> None:
    """Events without NATS: exit code 1."""
    ran = services.run("tail", "--only", "events", CARILLON_NATS_URL="")
    assert ran.code == 1
    assert "--nats" in ran.err


NO_SERVICES = {f"CARILLON_{name.upper()}_ENDPOINT": "" for name in SERVICES}
NOBODY = "nats://127.0.0.1:1"


def test_events_need_no_service_and_where_nobody_is_it_says_so_once(
    services: FakeServices, caplog: pytest.LogCaptureFixture
) -> None:
    """Exit code 1, in as long as a call may take, without a log of the tries."""
    ran = services.run("tail", "--only", "events", "--nats", NOBODY, "--timeout", "1", **NO_SERVICES)
    assert (ran.code, ran.out) == (1, "")
    (said,) = ran.err.splitlines()
    assert said.startswith(f"Events cannot be followed at {NOBODY}: ")
    assert "Connect call failed" in said
    assert caplog.records == []


@pytest.mark.parametrize("only", ["events", "deliveries"])
def test_where_nobody_answered_until_its_end_it_was_in_vain(services: FakeServices, only: str) -> None:
    """Exit code 1, where something was wrong and nothing could be followed; the reason once."""
    services.answers["ListDeliveries"] = Refuses(code=grpc.StatusCode.INTERNAL, message="Broken.")
    ran = services.run("tail", "--only", only, "--nats", NOBODY, "--interval", "10ms", "--for", "300ms")
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (1, "", 1)


def test_without_events_the_rest_is_followed(services: FakeServices) -> None:
    """For as long as it is wanted."""
    services.answers["ListDeliveries"] = deliveries()
    arguments = ["--only", "deliveries", "--only", "events", "--nats", NOBODY, "--timeout", "0.2"]
    ran = services.run("tail", *arguments, "--interval", "10ms", "--for", "1s")
    assert (ran.code, len(ran.err.splitlines())) == (0, 1)
    assert len(services.asked("ListDeliveries")) > 25


@pytest.mark.parametrize(
    ("url", "says"), [("127.0.0.1:4222", "nats://host:port"), ("nats://ann:secret@127.0.0.1:4222", "credentials")]
)
def test_an_address_that_is_none_is_named(services: FakeServices, url: str, says: str) -> None:
    """Exit code 2, before anybody is asked."""
    ran = services.run("tail", "--nats", url)
    assert (ran.code, services.calls) == (2, [])
    assert "--nats" in ran.err
    assert says in ran.err
    assert "secret" not in ran.err


def test_a_certificate_that_is_not_there_is_told(services: FakeServices) -> None:
    """Exit code 2, at once."""
    ran = services.run("tail", "--only", "events", "--nats", NOBODY, CARILLON_NATS_TLS_CA_FILE="/not/there")
    assert (ran.code, "No such file" in ran.err) == (2, True)


def test_without_any_address_it_ends_at_once(services: FakeServices) -> None:
    """Exit code 1."""
    ran = services.run("tail", CARILLON_NATS_URL="", **NO_SERVICES)
    assert (ran.code, "give endpoints, or --nats" in ran.err) == (1, True)
