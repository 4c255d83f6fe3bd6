"""`carillon doctor` finds what is wrong and says what to do."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.link.v1 import backlog_pb2, dead_frame_pb2, status_pb2
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from libs.wire import to_timestamp
from tests.support.fake_services import SERVICES, FakeServices, Refuses, fake_services


def status(service: str, ahead: timedelta = timedelta(0), **other: Any) -> Any:
    """What a service that is well says of itself, with what is otherwise."""

    def answer(_: Any) -> status_pb2.GetStatusResponse:
        found = status_pb2.GetStatusResponse(
            service=service, version="1.0", is_nats_connected=True, is_postgres_alive=True, **other
        )
        found.time.CopyFrom(to_timestamp(datetime.now(UTC) + ahead))
        return found

    return answer


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """All is well. One server is all services, so it cannot know which one is asked for its status."""
    shard = scheduler.Shard(number=0, holder="s-1", watermark_time=to_timestamp(datetime.now(UTC)))
    with fake_services() as found:
        found.answers |= {
            "Check": health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING),
            "ListBacklogs": backlog_pb2.ListBacklogsResponse(),
            "ListDeadFrames": dead_frame_pb2.ListDeadFramesResponse(),
            "ListShards": scheduler.ListShardsResponse(shards=[shard]),
            "CountDeadLetters": dispatcher.CountDeadLettersResponse(),
        }
        yield found


def examined(services: FakeServices, *only: str, **environment: str) -> tuple[int, list[dict[str, str]]]:
    """Exit code, and what is not good."""
    away = {f"CARILLON_{name.upper()}_ENDPOINT": "" for name in SERVICES if name not in only}
    ran = services.run("doctor", "--json", **away, **environment)
    told = json.loads(ran.out)
    assert told["isWell"] == (ran.code == 0)
    return ran.code, [one for one in told["findings"] if one["verdict"] != "good" and one["service"] in only]


def test_a_well_installation_is_called_well(services: FakeServices) -> None:
    """Exit code 0, for people too; those whose address is not known are named."""
    services.answers["GetStatus"] = status("scheduler")
    assert examined(services, "scheduler") == (0, [])
    ran = services.run(
        "doctor", CARILLON_INTAKE_ENDPOINT="", CARILLON_DIGEST_ENDPOINT="", CARILLON_DISPATCHER_ENDPOINT=""
    )
    assert ran.out.rstrip().endswith("Nothing is wrong.")
    assert "Set CARILLON_INTAKE_ENDPOINT" in ran.out


@pytest.mark.parametrize(
    ("method", "answer", "check", "text", "advice"),
    [
        (
            "Check",
            health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING),
            "connection",
            "starting or stopping",
            "log",
        ),
        (
            "GetStatus",
            Refuses(code=grpc.StatusCode.UNAUTHENTICATED, message="The token has expired."),
            "credential",
            "The token has expired. (UNAUTHENTICATED)",
            "CARILLON_TOKEN",
        ),
        (
            "GetStatus",
            Refuses(code=grpc.StatusCode.PERMISSION_DENIED, message="Another tenant."),
            "credential",
            "Another tenant.",
            "CARILLON_TENANT",
        ),
        ("GetStatus", status("scheduler", timedelta(minutes=5)), "clock", "5m ahead of this machine's", "NTP"),
        ("GetStatus", status("scheduler", -timedelta(minutes=5)), "clock", "5m behind this machine's", "NTP"),
        ("GetStatus", status("digest"), "connection", "This is digest, not scheduler", "endpoint"),
        (
            "ListBacklogs",
            backlog_pb2.ListBacklogsResponse(
                backlogs=[backlog_pb2.Backlog(receiver="digest", frames=7, oldest_age=Duration(seconds=90))]
            ),
            "backlog",
            "7 frames to digest, the oldest for 1m30s",
            "Check that digest runs",
        ),
        (
            "ListDeadFrames",
            dead_frame_pb2.ListDeadFramesResponse(dead_frames=[dead_frame_pb2.DeadFrame(reason="a bug")], total=3),
            "dead frames",
            "3 frames were put aside, the last because: a bug",
            "dead-letters frames",
        ),
        (
            "ListShards",
            scheduler.ListShardsResponse(shards=[scheduler.Shard(number=3)]),
            "shards",
            "Nobody holds 3",
            "start more schedulers",
        ),
        (
            "ListShards",
            scheduler.ListShardsResponse(
                shards=[
                    scheduler.Shard(holder="s-1", due=40, watermark_time=to_timestamp(datetime(2026, 1, 1, tzinfo=UTC)))
                ]
            ),
            "shards",
            "40 timers in 1 shards have been due for over a minute",
            "add replicas",
        ),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(
    services: FakeServices, method: str, answer: Any, check: str, text: str, advice: str
) -> None:
    """Exit code 1, and nothing else is blamed."""
    services.answers["GetStatus"] = status("scheduler")
    services.answers[method] = answer
    code, found = examined(services, "scheduler")
    assert (code, [one["check"] for one in found]) == (1, [check])
    assert text in found[0]["text"]
    assert advice in found[0]["advice"]


@pytest.mark.parametrize(("missing", "check"), [("is_nats_connected", "NATS"), ("is_postgres_alive", "Postgres")])
def test_a_process_that_lacks_what_it_stands_on_says_so(services: FakeServices, missing: str, check: str) -> None:
    """By its own word."""

    def answer(_: Any) -> status_pb2.GetStatusResponse:
        found: status_pb2.GetStatusResponse = status("intake")(_)
        setattr(found, missing, False)
        return found

    services.answers["GetStatus"] = answer
    code, found = examined(services, "intake")
    assert (code, [one["check"] for one in found]) == (1, [check])


def test_a_service_that_goes_away_in_between_takes_no_findings_with_it(services: FakeServices) -> None:
    """The status is asked twice of a scheduler: the second time in vain, everything else is told all the same."""
    away = Refuses(code=grpc.StatusCode.FAILED_PRECONDITION, message="Going away.")
    services.answers["GetStatus"] = [status("scheduler"), away]
    code, found = examined(services, "scheduler")
    assert (code, [(one["check"], one["text"]) for one in found]) == (
        1,
        [("status", "Going away. (FAILED_PRECONDITION)")],
    )


def test_of_a_service_that_cannot_be_reached_nothing_else_is_asked(services: FakeServices) -> None:
    """One finding, with the address."""
    ran = services.run(
        "doctor",
        "--json",
        CARILLON_INTAKE_ENDPOINT="127.0.0.1:1",
        CARILLON_SCHEDULER_ENDPOINT="",
        CARILLON_DIGEST_ENDPOINT="",
        CARILLON_DISPATCHER_ENDPOINT="",
    )
    (found,) = [one for one in json.loads(ran.out)["findings"] if one["service"] == "intake"]
    assert (ran.code, found["check"]) == (1, "connection")
    assert "127.0.0.1:1 cannot be reached" in found["text"]
    assert "--tls" in found["advice"]


def test_notes_are_no_errors(services: FakeServices) -> None:
    """A test clock, dead letters, a caller who is no operator, a service that is older: exit code 0."""
    count = dispatcher.DeadLetterCount(channel="email", reason="address_rejected", count=5)
    services.answers |= {
        "GetStatus": status("dispatcher", timedelta(days=-4000), is_test_clock=True),
        "ListBacklogs": Refuses(code=grpc.StatusCode.PERMISSION_DENIED, message="Operators only."),
        "ListDeadFrames": Refuses(code=grpc.StatusCode.PERMISSION_DENIED, message="Operators only."),
        "CountDeadLetters": dispatcher.CountDeadLettersResponse(counts=[count], total=5),
    }
    code, found = examined(services, "dispatcher")
    assert (code, [one["check"] for one in found]) == (0, ["clock", "backlog", "dead letters"])
    assert "5 deliveries were given up or are held, most: email address_rejected" in found[2]["text"]
    del services.answers["GetStatus"]
    code, found = examined(services, "dispatcher")
    assert (code, found[0]["text"]) == (0, "It is older and does not tell its status.")


def test_versions_that_differ_are_noted(services: FakeServices) -> None:
    """As in a roll-out."""
    numbers = iter(range(10))

    def answer(_: Any) -> status_pb2.GetStatusResponse:
        found: status_pb2.GetStatusResponse = status("intake")(_)
        found.version = f"1.{next(numbers)}"
        return found

    services.answers["GetStatus"] = answer
    told = json.loads(services.run("doctor", "--json").out)["findings"]
    assert next(one["text"] for one in told if one["check"] == "versions").startswith("They differ: ")
