"""Files go in batches, each with a key that follows from what is in it."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import grpc
import pytest
import typer
from carillon.intake.v1 import intake_pb2 as intake

from cli.bulk import BATCH, batches
from tests.support.fake_services import FakeServices, Refuses, fake_services


@pytest.fixture
def services() -> Iterator[FakeServices]:
    """Accept everything that is about something."""
    with fake_services() as found:
        found.answers["Notify"] = answer
        yield found


def answer(request: intake.NotifyRequest) -> intake.NotifyResponse:
    """Refuses notifications without an entity."""
    error = intake.ItemError(code=3, reason="NO_ENTITY", message="It is about nothing.")
    results = [
        intake.ItemResult(id=one.entity) if one.entity else intake.ItemResult(error=error)
        for one in request.notifications
    ]
    return intake.NotifyResponse(results=results, is_applied=False)


def lines(count: int) -> bytes:
    """Notifications of one subscriber."""
    return b"".join(
        json.dumps({"entity": f"e{number}", "content": {"type": "a", "payload": {"n": number}}}).encode() + b"\n"
        for number in range(count)
    )


def test_batches_hold_what_a_call_may_hold() -> None:
    """At most 500 lines and about 2 MiB; empty lines count as lines only."""
    many = list(batches(BytesIO(lines(BATCH + 1)), intake.Notification, ""))
    assert [len(one.messages) for one in many] == [BATCH, 1]
    assert many[-1].lines == [BATCH + 1]
    long = b'{"entity": "%s"}\n\n' % (b"x" * 400_000)
    assert [one.lines for one in batches(BytesIO(long * 6), intake.Notification, "")] == [[1, 3, 5, 7, 9], [11]]


def test_keys_follow_from_place_and_content() -> None:
    """The same file gives the same ones, with another --key others; equal batches of one file differ."""
    same = b'{"entity": "e"}\n' * 2 * BATCH
    first, again, other = (
        [one.key for one in batches(BytesIO(same), intake.Notification, key)] for key in ("", "", "second run")
    )
    assert first == again
    assert len({*first, *other}) == 4
    edited = next(batches(BytesIO(same.replace(b'"e"', b'"f"', 1)), intake.Notification, ""))
    assert edited.key not in first


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"colour": "red"}', b'{"entity": "' + b"x" * 600_000 + b'"}'])
def test_a_line_that_is_none_is_named(line: bytes) -> None:
    """With its number."""
    with pytest.raises(typer.BadParameter, match="line 2"):
        list(batches(BytesIO(b"{}\n" + line), intake.Notification, ""))


def test_lines_that_were_refused_are_told_and_the_rest_is_accepted(services: FakeServices, tmp_path: Path) -> None:
    """Exit code 3."""
    (tmp_path / "many.jsonl").write_bytes(lines(2) + b'{"content": {"type": "a"}}\n')
    ran = services.run("notify", "--file", str(tmp_path / "many.jsonl"))
    assert (ran.code, ran.out) == (3, "2 accepted, 1 refused.\n")
    assert ran.err == "line 3: It is about nothing., NO_ENTITY\n"
    (request,) = services.asked("Notify")
    assert json.loads(request.notifications[1].content.payload) == {"n": 1}
    assert request.wait_for == intake.WAIT_FOR_ACCEPTED


def test_programs_get_a_line_per_line(services: FakeServices) -> None:
    """With its id, or its error; from standard input too."""
    ran = services.run("notify", "--file", "-", "--json", input='{"entity": "e"}\n{}\n')
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert told[0] == {"line": 1, "id": "e"}
    assert (told[1]["line"], told[1]["error"]["reason"]) == (2, "NO_ENTITY")


def test_an_interrupted_run_is_finished_by_running_it_again(services: FakeServices, tmp_path: Path) -> None:
    """It says where it stopped; the second run sends the first batch under the same key."""
    (tmp_path / "many.jsonl").write_bytes(lines(BATCH + 1))
    broken = Refuses(code=grpc.StatusCode.INTERNAL, message="Broken.")
    services.answers["Notify"] = [answer, broken, answer]
    ran = services.run("notify", "--file", str(tmp_path / "many.jsonl"))
    assert (ran.code, ran.out) == (3, "500 accepted, 0 refused.\n")
    assert "Stopped at line 501: Broken. (INTERNAL)" in ran.err
    ran = services.run("notify", "--file", str(tmp_path / "many.jsonl"))
    assert (ran.code, ran.out) == (0, "501 accepted, 0 refused.\n")
    first, second, third, fourth = (request.idempotency_key for request in services.asked("Notify"))
    assert (first, second) == (third, fourth)


def test_a_line_that_is_none_stops_it_and_what_was_sent_before_is_told(services: FakeServices, tmp_path: Path) -> None:
    """Exit code 3; mended, the second run sends the first batch under the same key."""
    good = lines(BATCH + 101)
    (tmp_path / "many.jsonl").write_bytes(good[: good.rindex(b'{"entity')] + b"nonsense\n")
    ran = services.run("notify", "--file", str(tmp_path / "many.jsonl"))
    assert (ran.code, ran.out) == (3, "500 accepted, 0 refused.\n")
    assert ran.err.startswith("Stopped: line 601 is not JSON")
    assert "Run it again" in ran.err
    (tmp_path / "many.jsonl").write_bytes(good)
    ran = services.run("notify", "--file", str(tmp_path / "many.jsonl"))
    assert (ran.code, ran.out) == (0, "601 accepted, 0 refused.\n")
    first, second, third = (request.idempotency_key for request in services.asked("Notify"))
    assert first == second != third


def test_a_line_that_is_none_before_anything_was_sent_is_a_wrong_file(services: FakeServices) -> None:
    """Exit code 2: nothing has happened."""
    ran = services.run("notify", "--file", "-", input='{"entity": "e"}\nnonsense\n')
    assert (ran.code, ran.out, services.calls) == (2, "", [])
    assert "line 2 is not JSON" in ran.err


def test_a_line_that_is_none_after_refusals_only_is_told_with_them(services: FakeServices) -> None:
    """Exit code 1: they were sent, and nothing was accepted."""
    ran = services.run("notify", "--file", "-", input="{}\n" * BATCH + "nonsense\n")
    assert (ran.code, ran.out) == (1, "0 accepted, 500 refused.\n")
    assert "Stopped: line 501 is not JSON" in ran.err


def test_schedules_and_requests_come_from_files_too(services: FakeServices) -> None:
    """The same way."""
    services.answers["Schedule"] = intake.ScheduleResponse(results=[intake.ItemResult(id="t1")])
    services.answers["SubmitRequest"] = intake.SubmitRequestResponse(results=[intake.ItemResult(id="r1")])
    assert services.run("schedule", "--file", "-", input='{"entity": "e", "after": "60s"}').code == 0
    assert services.run("requests", "submit", "--file", "-", input='{"batch": "b", "item": "i"}').code == 0
    assert services.asked("Schedule")[0].schedules[0].after.seconds == 60
    assert services.asked("SubmitRequest")[0].requests[0].item == "i"
