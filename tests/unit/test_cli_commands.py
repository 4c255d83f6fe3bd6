"""What people type becomes what the contracts say, and what services answer becomes words, tables and JSON."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from carillon.digest.v1 import digest_pb2 as digest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.intake.v1 import intake_pb2 as intake
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.fake_services import FakeServices, Refuses, fake_services

NOON = Timestamp(seconds=1_796_126_400)  # 2026-12-01T12:00:00Z


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """Answer nothing yet."""
    with fake_services() as found:
        yield found


def accepted(*ids: str) -> list[intake.ItemResult]:
    """Results of items that were."""
    return [intake.ItemResult(id=one) for one in ids]


REFUSED = intake.ItemResult(
    error=intake.ItemError(code=3, reason="TYPE_TOO_LONG", message="It is too long.", field="notifications[0].type")
)


def test_notify_says_everything_the_contract_has(services: FakeServices) -> None:
    """Each option ends in its field; the key is the one given."""
    services.answers["Notify"] = intake.NotifyResponse(results=accepted("n1"), is_applied=True)
    ran = services.run(
        *("notify", "shop/closed", "--to", "ann", "--to", "bob", "--topic", "shops", "--payload", '{"shop": 1}'),
        *("--entity", "shop:1", "--group-key", "g", "--priority", "high", "--key", "k"),
        *("--occurred", "2026-12-01T13:00:00+01:00"),
    )
    assert (ran.code, ran.out) == (0, "Accepted n1\n")
    (request,) = services.asked("Notify")
    content = timer.NotificationContent(
        type="shop/closed",
        subscribers=["ann", "bob"],
        topics=["shops"],
        payload='{"shop": 1}',
        group_key="g",
        priority=timer.PRIORITY_HIGH,
    )
    notification = intake.Notification(content=content, entity="shop:1", occur_time=NOON)
    assert request == intake.NotifyRequest(
        notifications=[notification], idempotency_key="k", wait_for=intake.WAIT_FOR_APPLIED
    )


def test_json_has_the_names_of_proto_json_and_fields_that_are_empty(services: FakeServices) -> None:
    """One document; programs need not ask whether a field is there."""
    services.answers["Notify"] = intake.NotifyResponse(results=accepted("n1"))
    ran = services.run("notify", "a", "--to", "ann", "--json")
    assert (ran.code, json.loads(ran.out)) == (0, {"results": [{"id": "n1"}], "isApplied": False})


def test_an_item_that_was_refused_is_an_error(services: FakeServices) -> None:
    """Exit code 1, and the service's own words."""
    services.answers["Notify"] = intake.NotifyResponse(results=[REFUSED], is_applied=True)
    ran = services.run("notify", "a", "--to", "ann")
    assert (ran.code, ran.err) == (1, "Refused: It is too long. (notifications[0].type), TYPE_TOO_LONG\n")


def test_a_refusal_is_shown_as_the_service_words_it(services: FakeServices) -> None:
    """Exit code 1, with code, reason and where."""
    services.answers["Notify"] = Refuses(
        code=grpc.StatusCode.PERMISSION_DENIED, message="That is another tenant.", reason="OTHER_TENANT"
    )
    ran = services.run("notify", "a", "--to", "ann")
    assert ran.code == 1
    assert f"intake at {services.address}: That is another tenant. (PERMISSION_DENIED, OTHER_TENANT)" in ran.err


def test_a_service_that_is_not_there_is_told_with_its_address(services: FakeServices) -> None:
    """Exit code 1, without a traceback."""
    ran = services.run("timers", "get", "x", CARILLON_SCHEDULER_ENDPOINT="127.0.0.1:1")
    assert ran.code == 1
    assert "scheduler at 127.0.0.1:1: " in ran.err
    assert "UNAVAILABLE" in ran.err


def test_a_service_whose_address_is_not_known_is_a_matter_of_the_command_line(services: FakeServices) -> None:
    """Exit code 2, with the ways to say it."""
    ran = services.run("timers", "list", CARILLON_SCHEDULER_ENDPOINT="")
    assert ran.code == 2
    assert "CARILLON_SCHEDULER_ENDPOINT or --scheduler-endpoint, or a profile" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["notify"],
        ["notify", "a", "--payload", "[1]"],
        ["notify", "a", "--payload", "nonsense"],
        ["notify", "a", "--priority", "urgent"],
        ["notify", "a", "--occurred", "2026-12-01T12:00:00"],
        ["notify", "a", "--payload", "@/nowhere"],
        ["schedule", "e", "--notify", "a"],
        ["schedule", "e", "--at", "now", "--in", "1h", "--notify", "a"],
        ["schedule", "e", "--in", "1h"],
        ["schedule", "e", "--in", "soon", "--event", "a"],
        ["cancel", "e", "--type", "t", "--timeline", "l"],
        ["timers", "list", "--state", "lost"],
        ["timers", "preview"],
        ["requests", "submit", "b", "c"],
        ["dead-letters", "redrive"],
        ["dead-letters", "redrive", "id", "--all"],
        ["batch", "trigger", "b", "--window-from-schedule"],
        ["tail", "--only", "birds"],
    ],
)
def test_a_command_line_that_cannot_be_used_calls_nobody(services: FakeServices, arguments: list[str]) -> None:
    """Exit code 2."""
    assert services.run(*arguments).code == 2
    assert services.calls == []


def test_the_token_goes_along_and_is_never_shown(services: FakeServices, tmp_path: Path) -> None:
    """From the environment or a file; neither output nor help has it."""
    services.answers["Cancel"] = intake.CancelResponse(is_applied=True)
    (tmp_path / "token").write_text("from-file\n")
    shown = [
        services.run("cancel", "e", CARILLON_TOKEN="from-env", CARILLON_TENANT="shop"),
        services.run("cancel", "e", "--token-file", str(tmp_path / "token")),
        services.run("cancel", "--help", CARILLON_TOKEN="from-env"),
    ]
    told = [(metadata["authorization"], metadata.get("carillon-tenant")) for _, _, metadata in services.calls]
    assert told == [("Bearer from-env", "shop"), ("Bearer from-file", None)]
    assert not any("from-" in ran.out + ran.err for ran in shown)


def test_schedule_takes_one_when_and_one_then(services: FakeServices) -> None:
    """A while, a rule; a notification, an event that wants a report."""
    services.answers["Schedule"] = intake.ScheduleResponse(results=accepted("t1"), is_applied=True)
    services.run("schedule", "e", "--in", "1h30m", "--event", "trial.over", "--report-within", "5m", "--if", "true")
    services.run("schedule", "e", "--cron", "0 9 * * 1-5", "--zone", "Europe/Berlin", "--notify", "a", "--to", "ann")
    first, second = (request.schedules[0] for request in services.asked("Schedule"))
    assert first == intake.Schedule(
        entity="e",
        after=Duration(seconds=5400),
        target=timer.Target(event=timer.EventContent(type="trial.over", report_within=Duration(seconds=300))),
        condition=timer.Condition(cel="true"),
    )
    assert second.recurrence == timer.Recurrence(cron="0 9 * * 1-5", zone="Europe/Berlin")
    assert second.target.notification.subscribers == ["ann"]


def test_cancel_tells_what_it_hit(services: FakeServices) -> None:
    """By entity, type, ids or timeline, with its cause."""
    services.answers["Cancel"] = intake.CancelResponse(timers=2, items=1, already_left=3, is_applied=True)
    ran = services.run("cancel", "account:1", "--timeline", "trial", "--cause", "paid")
    assert ran.out == "Cancelled 2 timers and 1 items that waited in digests; 3 had already left.\n"
    services.run("cancel", "account:1", "--id", "a", "--id", "b")
    services.run("cancel", "account:1", "--type", "t")
    by_timeline, by_ids, by_type = services.asked("Cancel")
    assert by_timeline.cause == "paid"
    assert by_timeline.selector.timeline == intake.TimelineSelector(entity="account:1", timeline="trial")
    assert by_ids.selector.ids == intake.IdSelector(entity="account:1", ids=["a", "b"])
    assert by_type.selector.entity == intake.EntitySelector(entity="account:1", type="t")


def test_lists_go_through_all_pages_up_to_their_limit(services: FakeServices) -> None:
    """JSON Lines for programs; of the second page only what is wanted."""

    def page(request: scheduler.ListTimersRequest) -> scheduler.ListTimersResponse:
        first = 2 * len(request.page_token)
        found = [timer.Timer(id=f"t{number}", fire_time=NOON) for number in (first, first + 1)]
        return scheduler.ListTimersResponse(timers=found, next_page_token=request.page_token + "x")

    services.answers["ListTimers"] = page
    ran = services.run("timers", "list", "--limit", "3", "--state", "fired", "--json")
    assert [json.loads(line)["id"] for line in ran.out.splitlines()] == ["t0", "t1", "t2"]
    assert [request.page_token for request in services.asked("ListTimers")] == ["", "x"]
    assert services.asked("ListTimers")[0].states == [timer.TIMER_STATE_FIRED]


def test_text_of_others_is_shown_and_not_obeyed(services: FakeServices) -> None:
    """What looks like markup is not."""
    one = timer.Timer(id="t1", entity="[red]e[/red]", fire_time=NOON, state=timer.TIMER_STATE_SCHEDULED)
    services.answers["ListTimers"] = scheduler.ListTimersResponse(timers=[one])
    ran = services.run("timers", "list")
    assert "[red]e[/red]" in ran.out
    assert "2026-12-01 12:00:00+00:00" in ran.out
    assert "scheduled" in ran.out


def test_timers_are_held_moved_let_go_fired_and_made_up_for(services: FakeServices) -> None:
    """Each goes to intake as an order, and its count is told."""
    services.answers |= {
        "Pause": intake.PauseResponse(timers=2, is_applied=True),
        "Resume": intake.ResumeResponse(timers=2, is_applied=True),
        "Reschedule": intake.RescheduleResponse(timers=1, is_applied=True),
        "TriggerSchedule": intake.TriggerScheduleResponse(results=accepted("t9"), is_applied=True),
        "BackfillSchedule": intake.BackfillScheduleResponse(results=accepted(""), timers=4, is_applied=True),
    }
    told = [
        services.run("timers", *arguments).out
        for arguments in (
            ["pause", "e"],
            ["resume", "e"],
            ["move", "e", "--in", "1h"],
            ["fire", "s", "e"],
            ["backfill", "s", "e", "--from", "2026-12-01T12:00:00Z"],
        )
    ]
    assert told == [
        "Paused 2 timers.\n",
        "Resumed 2 timers.\n",
        "Moved 1 timers.\n",
        "Fires now: t9\n",
        "Made up for 4 occurrences.\n",
    ]
    assert services.asked("Reschedule")[0].after == Duration(seconds=3600)
    assert services.asked("BackfillSchedule")[0].backfills[0].start_time == NOON


def test_a_timeline_is_stored_from_yaml_and_shown_step_by_step(services: FakeServices, tmp_path: Path) -> None:
    """Fields as in the contract, payloads written out; follow-ups stand below their step."""
    services.answers["PutTimeline"] = lambda request: scheduler.PutTimelineResponse(
        timeline=timer.Timeline(name=request.timeline.name, version=1)
    )
    (tmp_path / "trial.yaml").write_text("""
name: trial
steps:
  - name: remind
    offset: 2160000s
    condition: {cel: "!facts.paid"}
    target: {notification: {type: trial/ends, subscribers: [ann], payload: {day: 25}}}
    followUps:
      - {name: check, offset: 60s, target: {event: {type: trial.check}}}
""")
    ran = services.run("timelines", "put", str(tmp_path / "trial.yaml"))
    assert (ran.code, ran.out) == (0, "trial is stored as version 1.\n")
    timeline = services.asked("PutTimeline")[0].timeline
    assert timeline.steps[0].offset == Duration(seconds=25 * 86400)
    assert json.loads(timeline.steps[0].target.notification.payload) == {"day": 25}
    services.answers["ListTimelines"] = scheduler.ListTimelinesResponse(timelines=[timeline])
    shown = services.run("timelines", "get", "trial").out
    assert "25d" in shown
    assert "  check" in shown


def test_off_is_a_cadence_and_no_boolean(services: FakeServices, tmp_path: Path) -> None:
    """YAML 1.1 would make false of it."""
    services.answers["PutSubscriptions"] = digest.PutSubscriptionsResponse()
    (tmp_path / "s.yaml").write_text("{id: s, subscriber: ann, type: '*', choices: [{cadence: off}]}")
    assert services.run("subscriptions", "put", str(tmp_path / "s.yaml")).code == 0
    assert services.asked("PutSubscriptions")[0].subscriptions[0].choices[0].cadence == "off"


def test_a_file_with_a_field_that_is_none_stores_nothing(services: FakeServices, tmp_path: Path) -> None:
    """Exit code 2; which of them, and which field."""
    (tmp_path / "s.yaml").write_text("[{id: s}, {id: t, colour: red}]")
    ran = services.run("subscriptions", "put", str(tmp_path / "s.yaml"))
    assert ran.code == 2
    assert "number 2" in ran.err
    assert "colour" in ran.err
    assert services.calls == []


def test_requests_are_logged_answered_shown_and_withdrawn(services: FakeServices) -> None:
    """The life of one."""
    logged = intake.LoggedRequest(
        id="r1",
        request=intake.Request(batch="b", customer="ann", item="bike"),
        state=intake.REQUEST_STATE_ANSWERED,
        submit_time=NOON,
        responses=[intake.LoggedResponse(id="a1", provider="bob", payload='{"price": 9}', receive_time=NOON)],
        history=[intake.RequestChange(state=intake.REQUEST_STATE_OPEN, time=NOON)],
    )
    services.answers |= {
        "SubmitRequest": intake.SubmitRequestResponse(results=accepted("r1"), is_applied=True),
        "RecordResponse": intake.RecordResponseResponse(results=accepted("a1"), is_applied=True),
        "GetRequest": intake.GetRequestResponse(request=logged),
        "ListRequests": intake.ListRequestsResponse(requests=[logged]),
        "WithdrawRequest": intake.WithdrawRequestResponse(results=accepted("r1"), items=1, is_applied=True),
    }
    assert services.run("requests", "submit", "b", "ann", "bike", "--answer-within", "3d").out == "Logged r1\n"
    assert services.asked("SubmitRequest")[0].requests[0].answer_within == Duration(seconds=3 * 86400)
    assert services.run("requests", "respond", "r1", "bob", "--payload", '{"price": 9}').code == 0
    assert '{"price": 9}' in services.run("requests", "get", "r1").out
    assert "answered" in services.run("requests", "list", "--state", "answered").out
    assert "1 items taken out" in services.run("requests", "withdraw", "r1", "--cause", "bought").out


def test_digests_and_deliveries_are_listed_and_shown(services: FakeServices) -> None:
    """With their outcomes; attempts and items below."""
    sent = dispatcher.Delivery(
        id="d1",
        subscriber="ann",
        channel="email",
        subject="Two things",
        state=dispatcher.DELIVERY_STATE_SENT,
        create_time=NOON,
        priority=timer.PRIORITY_NORMAL,
    )
    attempt = dispatcher.Attempt(number=1, start_time=NOON, is_sent=True, reply="250 OK")
    one = digest.Digest(
        id="g1", subscriber="ann", cadence="daily", channel=digest.CHANNEL_EMAIL, close_time=NOON, outcome="sent"
    )
    item = digest.Item(notification_id="n1", type="a", occur_time=NOON, state=digest.ITEM_STATE_DIGESTED)
    window = digest.Window(id="w1", subscriber="ann", state=digest.WINDOW_STATE_OPEN, items=7, due_time=NOON)
    services.answers |= {
        "ListDeliveries": dispatcher.ListDeliveriesResponse(deliveries=[sent]),
        "GetDelivery": dispatcher.GetDeliveryResponse(delivery=sent, attempts=[attempt]),
        "ListDigests": digest.ListDigestsResponse(digests=[one]),
        "GetDigest": digest.GetDigestResponse(digest=one, items=[item]),
        "ListWindows": digest.ListWindowsResponse(windows=[window]),
        "PreviewDigest": digest.PreviewDigestResponse(subject="Seven things", text="One, two."),
    }
    assert "Two things" in services.run("deliveries", "list", "ann").out
    assert "250 OK" in services.run("deliveries", "get", "d1").out
    assert "daily" in services.run("digests", "list").out
    assert "n1" in services.run("digests", "get", "g1").out
    assert "w1" in services.run("digests", "waiting").out
    assert services.asked("ListWindows")[0].states == [digest.WINDOW_STATE_OPEN, digest.WINDOW_STATE_CLOSING]
    assert services.run("digests", "preview", "w1").out == "Seven things\n\nOne, two.\n"
