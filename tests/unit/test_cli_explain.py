"""What the services know of an id becomes one story."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from carillon.digest.v1 import digest_pb2 as digest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.explain.v1.explain_pb2 import Entry
from carillon.intake.v1 import intake_pb2 as intake
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.fake_services import FakeServices, Refuses, fake_services

ANSWERS = {
    "IntakeService": intake.ExplainResponse,
    "SchedulerService": scheduler.ExplainResponse,
    "DigestService": digest.ExplainResponse,
    "DispatcherService": dispatcher.ExplainResponse,
}


def entry(second: int, service: str, sentence: str, *related: str, is_expected: bool = False) -> Entry:
    """One thing that happened."""
    return Entry(
        time=Timestamp(seconds=1_796_126_400 + second),
        service=service,
        kind="k",
        sentence=sentence,
        related_ids=related,
        is_expected=is_expected,
    )


@pytest.fixture
def story() -> Iterator[tuple[FakeServices, dict[tuple[str, str], list[Entry]]]]:
    """Services that explain from a table: (service, id) → entries."""
    table: dict[tuple[str, str], list[Entry]] = {}

    def explain(service: str) -> Any:
        return lambda request: ANSWERS[f"{service.title()}Service"](entries=table.get((service, request.id), []))

    with fake_services() as found:
        found.answers |= {f"{name}/Explain": explain(name) for name in ("intake", "scheduler", "digest", "dispatcher")}
        yield found, table


def test_all_parts_are_told_in_order_of_time(story: Any) -> None:
    """Whoever knows them; what is expected says so."""
    services, table = story
    table["dispatcher", "n1"] = [entry(0, "dispatcher", "Long before.")]
    table["digest", "n1"] = [entry(2, "digest", "It waits."), entry(9, "digest", "It goes out.", is_expected=True)]
    table["scheduler", "n1"] = [entry(1, "scheduler", "The timer fired.")]
    ran = services.run("explain", "n1")
    assert ran.code == 0
    body = ran.out
    assert (
        body.index("Long before.")
        < body.index("The timer fired.")
        < body.index("It waits.")
        < body.index("(expected) It goes out.")
    )
    assert "2026-12-01 12:00:01+00:00" in body


def test_the_story_goes_on_where_another_service_knows_more(story: Any) -> None:
    """From the notification to its digest's delivery, and no further into the digest's other items."""
    services, table = story
    table["digest", "n1"] = [entry(1, "digest", "It is in a digest.", "g1")]
    table["digest", "g1"] = [entry(1, "digest", "Another item is in it.")]
    table["dispatcher", "g1"] = [entry(2, "dispatcher", "It was sent.", "g1", "d1")]
    told = json.loads(services.run("explain", "n1", "--json").out)
    assert [one["sentence"] for one in told["entries"]] == ["It is in a digest.", "It was sent."]
    assert (told["errors"], told["notAsked"], told["isCut"]) == ({}, [], False)
    alone = json.loads(services.run("explain", "n1", "--json", "--alone").out)
    assert [one["sentence"] for one in alone["entries"]] == ["It is in a digest."]


def test_what_two_answers_tell_is_told_once(story: Any) -> None:
    """The same thing found by two ids."""
    services, table = story
    sent = entry(2, "dispatcher", "It was sent.", "g1", "d1")
    table["digest", "n1"] = [entry(1, "digest", "It is in a digest.", "g1", "d1")]
    table["dispatcher", "g1"] = table["dispatcher", "d1"] = [sent]
    assert services.run("explain", "n1").out.count("It was sent.") == 1


def test_a_story_without_end_is_cut_and_says_so(story: Any) -> None:
    """At most two hundred calls."""
    services, table = story
    table["intake", "x"] = [entry(1, "intake", "Many.", *(f"id{number}" for number in range(100)))]
    ran = services.run("explain", "x", "--json")
    assert json.loads(ran.out)["isCut"]
    assert len(services.calls) == 200


def test_an_answer_that_is_not_all_says_so(story: Any) -> None:
    """In words and for programs, whichever service it comes from."""
    services, table = story
    table["digest", "n1"] = [entry(1, "digest", "It waits.")]
    services.answers["scheduler/Explain"] = scheduler.ExplainResponse(is_cut=True)
    assert json.loads(services.run("explain", "n1", "--json").out)["isCut"]
    assert "There is more than this" in services.run("explain", "n1").err


def test_a_service_that_does_not_answer_is_told(story: Any) -> None:
    """Exit code 3 with the rest of the story; 1 where nothing is left of it."""
    services, table = story
    table["digest", "n1"] = [entry(1, "digest", "It waits.")]
    services.answers["dispatcher/Explain"] = Refuses(code=grpc.StatusCode.PERMISSION_DENIED, message="Not yours.")
    ran = services.run("explain", "n1", CARILLON_INTAKE_ENDPOINT="")
    assert (ran.code, "It waits." in ran.out) == (3, True)
    assert "dispatcher has not answered: Not yours." in ran.err
    assert "it is not known where they are: intake" in ran.err
    assert services.run("explain", "n2").code == 1


def test_an_id_that_nobody_knows_is_no_success(story: Any) -> None:
    """Exit code 1."""
    services, _ = story
    ran = services.run("explain", "nothing")
    assert (ran.code, ran.out) == (1, "Nobody who was asked knows anything of nothing.\n")
