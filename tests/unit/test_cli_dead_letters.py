"""What operators type: dead letters, dead frames and suppressions."""

import json
from collections.abc import Iterator

import grpc
import pytest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.link.v1 import dead_frame_pb2 as link
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.fake_services import FakeServices, Refuses, fake_services

NOON = Timestamp(seconds=1_796_126_400)  # 2026-12-01T12:00:00Z


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """Answer nothing yet."""
    with fake_services() as found:
        yield found


def test_dead_letters_are_sent_again_only_when_somebody_agrees(services: FakeServices) -> None:
    """It says how many; no is exit code 3, a program must say --yes."""
    services.answers |= {
        "CountDeadLetters": dispatcher.CountDeadLettersResponse(total=7),
        "Redrive": dispatcher.RedriveResponse(redriven=7),
    }
    refused = services.run("dead-letters", "redrive", "--channel", "email", input="n\n")
    assert (refused.code, services.asked("Redrive")) == (3, [])
    assert "Send 7 of 7 again?" in refused.out
    assert services.run("dead-letters", "redrive", "--all", "--json").code == 2
    assert services.run("dead-letters", "redrive", "--channel", "email", "--yes").code == 0
    (request,) = services.asked("Redrive")
    assert request.filter == dispatcher.DeadLetterFilter(channel="email")
    assert request.idempotency_key


def test_an_address_is_suppressed_and_let_go_again(services: FakeServices) -> None:
    """Each option ends in its field; what is suppressed is listed with who wanted it so."""
    one = dispatcher.Suppression(
        channel="email",
        address="a@x.org",
        reason="left",
        list_id="type:shop/closed",
        create_time=NOON,
        source=dispatcher.SUPPRESSION_SOURCE_CALLER,
    )
    services.answers |= {
        "PutSuppression": dispatcher.PutSuppressionResponse(suppression=one),
        "DeleteSuppression": dispatcher.DeleteSuppressionResponse(),
        "ListSuppressions": dispatcher.ListSuppressionsResponse(suppressions=[one]),
    }
    ran = services.run("suppressions", "add", "a@x.org", "--reason", "left", "--list", "type:shop/closed")
    assert (ran.code, ran.out) == (0, "a@x.org gets nothing of type:shop/closed any more.\n")
    (put,) = services.asked("PutSuppression")
    assert put.suppression == dispatcher.Suppression(
        channel="email", address="a@x.org", reason="left", list_id="type:shop/closed"
    )
    assert json.loads(services.run("suppressions", "list", "--address", "a@x.org", "--json").out)["listId"] == (
        "type:shop/closed"
    )
    assert "caller" in services.run("suppressions", "list").out
    ran = services.run("suppressions", "remove", "h", "--channel", "webhook", "--source", "bounce")
    assert (ran.code, ran.out) == (0, "h is not suppressed any more.\n")
    (removed,) = services.asked("DeleteSuppression")
    assert removed == dispatcher.DeleteSuppressionRequest(
        channel="webhook", address="h", source=dispatcher.SUPPRESSION_SOURCE_BOUNCE
    )
    assert services.run("suppressions", "remove", "h", "--source", "nobody").code == 2


def test_dead_frames_of_all_services_are_listed_and_applied_once_more(services: FakeServices) -> None:
    """Each with who put it aside; those that stay are named, with exit code 3."""
    frame = link.DeadFrame(id="f1", sender="intake", entries=3, reason="a bug", bury_time=NOON)
    services.answers |= {
        "ListDeadFrames": link.ListDeadFramesResponse(dead_frames=[frame], total=1),
        "RedriveDeadFrames": link.RedriveDeadFramesResponse(redriven=1, left_ids=["f2"]),
    }
    told = services.run("dead-letters", "frames", "--json").out.splitlines()
    assert [json.loads(line)["service"] for line in told] == ["intake", "scheduler", "digest", "dispatcher"]
    ran = services.run("dead-letters", "redrive-frames", "digest", "f1", "f2")
    assert (ran.code, ran.out) == (3, "1 are on their way again.\n")
    assert ran.err.startswith("f2 stays where it is")


def test_frames_of_those_who_answer_are_listed(services: FakeServices) -> None:
    """Exit code 3 when not all do, 1 when none does."""
    services.answers["ListDeadFrames"] = link.ListDeadFramesResponse()
    assert services.run("dead-letters", "frames", CARILLON_INTAKE_ENDPOINT="127.0.0.1:1").code == 3
    services.answers["ListDeadFrames"] = Refuses(code=grpc.StatusCode.PERMISSION_DENIED, message="Operators only.")
    assert services.run("dead-letters", "frames").code == 1
