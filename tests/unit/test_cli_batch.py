"""A CronJob's run names its window by when it was scheduled, and tries again what may pass."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from carillon.intake.v1 import intake_pb2 as intake

from cli.batch import minute_in, window_from_schedule
from libs.wire import from_timestamp
from tests.support.fake_services import FakeServices, Refuses, fake_services

CLOSED = intake.TriggerBatchResponse(windows=12, is_applied=True)
AWAY = Refuses(code=grpc.StatusCode.UNAVAILABLE, message="Postgres is away.")


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """Close twelve windows each time."""
    with fake_services() as found:
        found.answers["TriggerBatch"] = CLOSED
        yield found


@pytest.mark.parametrize(
    ("now", "start", "end"),
    [
        ("2026-12-01T12:00:00", "2026-12-01T08:00:00", "2026-12-01T12:00:00"),
        ("2026-12-01T12:00:41", "2026-12-01T08:00:00", "2026-12-01T12:00:00"),
        ("2026-12-01T15:59:59", "2026-12-01T08:00:00", "2026-12-01T12:00:00"),
        ("2026-12-01T00:00:00", "2026-11-30T20:00:00", "2026-12-01T00:00:00"),
    ],
)
def test_a_window_ends_with_the_latest_run_of_the_schedule(now: str, start: str, end: str) -> None:
    """On the minute it is this one; however late the run, it is the one it was to be."""
    assert window_from_schedule("", "", "0 */4 * * *", "UTC", at(now)) == (at(start), at(end))


def test_what_whoever_runs_it_says_wins() -> None:
    """A run that is made up for later names its own window; the schedule then says the start only."""
    scheduled = "2026-12-01T08:00:00-04:00"
    later = at("2026-12-01T17:30:00")
    assert window_from_schedule(scheduled, "", "", "UTC", later) == (None, at("2026-12-01T12:00:00"))
    both = window_from_schedule(scheduled, "flights-29934600", "0 */4 * * *", "UTC", later)
    assert both == (at("2026-12-01T08:00:00"), at("2026-12-01T12:00:00"))


@pytest.mark.parametrize(
    ("now", "cron", "start"),
    [
        ("2026-12-01T12:00:04", "0 */4 * * *", "2026-12-01T08:00:00"),
        ("2026-12-01T17:59:00", "0 */4 * * *", "2026-12-01T08:00:00"),
        ("2026-12-04T12:00:00", "", None),
    ],
)
def test_the_name_of_the_job_says_when_it_was_scheduled(now: str, cron: str, start: str | None) -> None:
    """29,935,440 minutes after 1970 it was 12:00; tries that go on into the next window still close the one before."""
    found = window_from_schedule("", "carillon-batch-flights-29935440", cron, "UTC", at(now))
    assert found == (at(start) if start else None, at("2026-12-01T12:00:00"))


@pytest.mark.parametrize(
    "name",
    ["", "by-hand", "flights-1", "flights-20261201", "flights-29935499", "flights-29890000", "29935440", "a-299354400"],
)
def test_a_name_that_somebody_gave_says_nothing(name: str) -> None:
    """Neither a date nor a number nor a minute to come or long past is taken for one; then the schedule says it."""
    now = at("2026-12-01T12:50:00")
    assert minute_in(name, now) is None
    end = at("2026-12-01T12:00:00")
    assert window_from_schedule("", name, "0 */4 * * *", "UTC", now) == (at("2026-12-01T08:00:00"), end)


def test_a_schedule_is_read_in_its_zone() -> None:
    """09:00 in Berlin is 08:00 in UTC in winter, and 07:00 the day before clocks went back."""
    found = window_from_schedule("", "", "0 9 * * *", "Europe/Berlin", at("2026-10-25T12:00:00"))
    assert found == (at("2026-10-24T07:00:00"), at("2026-10-25T08:00:00"))


def test_a_run_sends_the_window_of_its_environment(services: FakeServices) -> None:
    """As a CronJob's pod does; two runs ask for the same."""
    environment = {"CARILLON_SCHEDULED_TIME": "2026-12-01T12:00:00Z"}
    arguments = ["batch", "trigger", "flights", "--window-from-schedule", "--schedule", "0 */4 * * *"]
    ran = [services.run(*arguments, **environment) for _ in range(2)]
    assert [one.code for one in ran] == [0, 0]
    assert ran[0].out == "Closed 12 windows of flights up to 2026-12-01 12:00:00+00:00.\n"
    first, second = services.asked("TriggerBatch")
    assert first == second
    assert from_timestamp(first.window_start_time) == at("2026-12-01T08:00:00")
    assert from_timestamp(first.window_end_time) == at("2026-12-01T12:00:00")


def test_a_run_of_a_cron_job_sends_the_window_that_its_pod_knows(services: FakeServices) -> None:
    """By the label with the Job's name, with a length of its own; an empty variable is none."""
    minute = (datetime.now(UTC) - timedelta(hours=9)).replace(second=0, microsecond=0)
    environment = {
        "CARILLON_SCHEDULED_TIME": "",
        "CARILLON_JOB_NAME": f"carillon-batch-flights-{int(minute.timestamp()) // 60}",
    }
    arguments = ["batch", "trigger", "flights", "--window-from-schedule", "--window-length", "90m"]
    assert services.run(*arguments, **environment).code == 0
    (request,) = services.asked("TriggerBatch")
    assert from_timestamp(request.window_end_time) == minute
    assert from_timestamp(request.window_start_time) == minute - timedelta(minutes=90)


def test_without_anything_that_says_when_it_was_scheduled_it_is_unusable(services: FakeServices) -> None:
    """Exit code 2, and nothing is sent: "now" would be a window of its own."""
    ran = services.run("batch", "trigger", "flights", "--window-from-schedule", CARILLON_JOB_NAME="by-hand")
    assert (ran.code, services.asked("TriggerBatch")) == (2, [])
    assert "CARILLON_JOB_NAME" in ran.err


def test_a_repeated_run_is_done_too(services: FakeServices) -> None:
    """Exit code 0, and it says that there was nothing to do; so it does when intake has not applied it yet."""
    services.answers["TriggerBatch"] = intake.TriggerBatchResponse(is_repeated=True, is_applied=True)
    ran = services.run("batch", "trigger", "flights", "--window-end", "2026-12-01T12:00:00Z")
    assert (ran.code, "had been triggered before" in ran.out) == (0, True)
    services.answers["TriggerBatch"] = intake.TriggerBatchResponse()
    ran = services.run("batch", "trigger", "flights", "--json")
    assert (ran.code, json.loads(ran.out)["isApplied"]) == (0, False)


def test_what_may_pass_is_tried_again_with_the_same_window(services: FakeServices) -> None:
    """Also without a window of its own: now is taken once. gRPC's own four tries count as one here."""
    services.answers["TriggerBatch"] = [AWAY, AWAY, AWAY, AWAY, CLOSED]
    ran = services.run("batch", "trigger", "flights", "--attempts", "3")
    assert ran.code == 0
    assert "Trying again in " in ran.err
    assert "Postgres is away. (UNAVAILABLE)" in ran.err
    asked = services.asked("TriggerBatch")
    assert len(asked) == 5
    assert all(request == asked[0] and request.HasField("window_end_time") for request in asked)


def test_what_was_refused_is_not_tried_again(services: FakeServices) -> None:
    """Exit code 1 at once."""
    services.answers["TriggerBatch"] = Refuses(code=grpc.StatusCode.INVALID_ARGUMENT, message="No such window.")
    ran = services.run("batch", "trigger", "flights")
    assert (ran.code, len(services.asked("TriggerBatch"))) == (1, 1)


def test_tries_come_to_an_end(services: FakeServices) -> None:
    """Exit code 1, so that the Job is tried again by its own policy."""
    services.answers["TriggerBatch"] = AWAY
    ran = services.run("batch", "trigger", "flights", "--attempts", "1")
    assert ran.code == 1
    assert "Postgres is away." in ran.err


def at(text: str) -> datetime:
    """In UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
