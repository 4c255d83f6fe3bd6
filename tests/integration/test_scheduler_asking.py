"""The asker against a real HTTP service that is slow, broken, hostile or away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from pydantic import SecretStr

from libs.ids import new_id
from libs.trace_points import carrier_at, point_of
from services.scheduler import loops_asking, metrics
from services.scheduler.conditions import Answer, NoAnswer, Question, ServiceCondition
from services.scheduler.loops_asking import MAX_ANSWER_BYTES, MAX_REASON, Asker
from services.scheduler.settings import SchedulerSettings
from tests.support.condition_service import (
    Behaviour,
    ConditionService,
    drips,
    hangs_up,
    responds,
    says,
    waits_for,
)
from tests.support.link_world import running

SECOND = timedelta(seconds=1)
NOWHERE = "http://127.0.0.1:9/"  # The discard port: nobody listens.


class Asking:
    """A running asker, and the answers it has given."""

    def __init__(self, **settings: Any) -> None:
        self.asker = Asker(settings=SchedulerSettings(**settings))
        self.asker.on_answer = self._on_answer
        self.answers: list[Answer] = []
        self._has_news = asyncio.Event()

    def _on_answer(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._has_news.set()

    async def answered(self, count: int) -> list[Answer]:
        """Wait until there are `count` answers."""
        async with asyncio.timeout(10):
            while len(self.answers) < count:
                self._has_news.clear()
                await self._has_news.wait()
        return self.answers


@asynccontextmanager
async def asking(**settings: Any) -> AsyncIterator[Asking]:
    """An asker that runs."""
    it = Asking(**settings)
    async with running(it.asker.run()):
        yield it


def question(service: str = "crm", *, timeout: timedelta = 5 * SECOND, **about: object) -> Question:
    """The first question about some timer."""
    condition = ServiceCondition(service=service, timeout=timeout, no_answer=NoAnswer.FAIL)
    return Question(shard=3, timer_id=new_id(), number=1, condition=condition, about={"entity": "e", **about})


async def answer_to(behaviour: Behaviour, *, timeout: timedelta = 5 * SECOND) -> Answer:
    """What one behaviour of the service comes to."""
    service = ConditionService(behaviour)
    async with service.listening(), asking(condition_services={"crm": service.url}) as it:
        it.asker.ask([question(timeout=timeout)])
        (answer,) = await it.answered(1)
        return answer


async def test_the_service_is_asked_as_the_contract_says() -> None:
    """POST, JSON, our name and the operator's token; the answer belongs to the question."""
    service = ConditionService(says(True, reason="still a customer"))
    async with (
        service.listening(),
        asking(condition_services={"crm": service.url}, condition_token=SecretStr("hunter2")) as it,
    ):
        it.asker.ask([one := question(facts={"plan": "Grüße"})])
        assert await it.answered(1) == [
            Answer(shard=3, timer_id=one.timer_id, number=1, holds=True, reason="still a customer")
        ]
    (request,) = service.requests
    assert service.questions == [{"entity": "e", "facts": {"plan": "Grüße"}}]
    assert request.method == "POST"
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["User-Agent"] == "carillon"
    assert request.headers["Authorization"] == "Bearer hunter2"


async def test_a_question_is_a_span_that_the_service_can_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its firing, where no spans are made; no traceparent where nobody traces that, no token where none is set."""
    service, firing = ConditionService(says(True)), bytes(range(24))
    async with service.listening(), asking(condition_services={"crm": service.url}) as it:
        it.asker.ask([question()])
        await it.answered(1)
        it.asker.ask([replace(question(), trace=firing)])
        await it.answered(2)
        provider = TracerProvider(shutdown_on_exit=False)
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
        monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
        it.asker.ask([replace(question(), trace=firing)])
        await it.answered(3)
    first, second, third = service.requests
    assert "traceparent" not in first.headers
    assert "Authorization" not in first.headers
    assert second.headers["traceparent"] == carrier_at(firing)["traceparent"]
    own = point_of(third.headers)
    assert own[:16] == firing[:16]
    assert own[16:] != firing[16:]


@pytest.mark.parametrize(
    ("behaviour", "holds", "reason"),
    [
        (says(True), True, ""),
        (says(False, reason="left"), False, "left"),
        (says(True, reason=None, more=[1]), True, ""),
        (says(False, reason="a\0b\n c" + "x" * 5_000), False, ("a b c" + "x" * 5_000)[:MAX_REASON]),
    ],
)
async def test_a_verdict_is_taken_with_its_reason(behaviour: Behaviour, holds: bool, reason: str) -> None:
    """A reason is optional, and made fit for the record; what else is said is ignored."""
    answer = await answer_to(behaviour)
    assert (answer.holds, answer.reason) == (holds, reason)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (responds(500, text="out of\0cheese"), "it answered 500 out of cheese"),
        (responds(204, text=""), "it answered 204"),
        (responds(302, text="there", Location="http://127.0.0.1:9/"), "it answered 302 there"),
        (responds(307, text="", Location="/elsewhere"), "it answered 307"),
        (responds(text="true"), "Expected `object`, got `bool`"),
        (responds(text='{"holds": "yes"}'), "Expected `bool`, got `str` - at `$.holds`"),
        (responds(text='{"holds": true, "reason": 1}'), "Expected `str | null`, got `int` - at `$.reason`"),
        (responds(text="{}"), "missing required field `holds`"),
        (responds(text='{"holds": yes}'), "JSON is malformed"),
        (responds(text=""), "truncated"),
        (responds(text="[" * 60_000), "it answered something else than holds true or false"),
        (says(True, reason="x" * MAX_ANSWER_BYTES), "it answered 200 with more than 64 KiB"),
        (responds(500, text="x" * 1_000_000), "it answered 500 with more than 64 KiB"),
        (hangs_up, "disconnected"),
    ],
)
async def test_anything_else_is_no_answer_and_says_why(behaviour: Behaviour, words: str) -> None:
    """In words that tell the operator what to look for."""
    answer = await answer_to(behaviour)
    assert answer.holds is None
    assert answer.was_asked
    assert words in answer.reason


async def test_redirects_are_not_followed() -> None:
    """The token must not go anywhere else."""
    service = ConditionService(responds(307, text="", Location="/elsewhere"))
    async with service.listening(), asking(condition_services={"crm": service.url}) as it:
        it.asker.ask([question()])
        await it.answered(1)
    assert [request.path for request in service.requests] == ["/condition"]


@pytest.mark.parametrize("behaviour", [drips, waits_for(asyncio.Event(), says(True))], ids=["drips", "silent"])
async def test_each_question_has_its_own_timeout(behaviour: Behaviour) -> None:
    """However slowly the service goes on."""
    answer = await answer_to(behaviour, timeout=timedelta(milliseconds=150))
    assert (answer.holds, answer.reason) == (None, "no answer within 0.15 s")


async def test_a_service_that_is_away_gives_no_answer() -> None:
    """Nobody listens; the name is known, the address is not in the way of the others."""
    service = ConditionService(says(True))
    async with service.listening(), asking(condition_services={"crm": service.url, "gone": NOWHERE}) as it:
        it.asker.ask([question("gone"), question("crm")])
        answers = {answer.holds: answer.reason for answer in await it.answered(2)}
    assert answers[True] == ""
    assert "Cannot connect" in answers[None]


async def test_an_unknown_name_is_answered_at_once_and_says_which_setting() -> None:
    """Not even the loops need to run."""
    it = Asking(condition_services={"crm": NOWHERE})
    it.asker.ask([question("crn")])
    (answer,) = it.answers
    assert answer.holds is None
    assert answer.reason == "there is no service 'crn' in CARILLON_SCHEDULER_CONDITION_SERVICES"


async def test_a_slow_service_holds_up_no_other() -> None:
    """All connections to one are waiting; the other is asked a hundred times meanwhile."""
    gate = asyncio.Event()
    slow, quick = ConditionService(waits_for(gate, says(False))), ConditionService(says(True))
    async with (
        slow.listening(),
        quick.listening(),
        asking(condition_services={"slow": slow.url, "quick": quick.url}, condition_concurrency=2) as it,
    ):
        it.asker.ask([question("slow") for _ in range(10)])
        await slow.asked(2)
        it.asker.ask([question("quick") for _ in range(100)])
        assert [one.holds for one in await it.answered(100)] == [True] * 100
        assert len(slow.questions) == 2
        gate.set()
        assert len(await it.answered(110)) == 110


async def test_connections_are_kept_and_bounded() -> None:
    """A hundred questions over at most four connections."""
    service = ConditionService(says(True))
    async with service.listening(), asking(condition_services={"crm": service.url}, condition_concurrency=4) as it:
        it.asker.ask([question() for _ in range(100)])
        await it.answered(100)
    assert len(service.connections) <= 4


async def test_inv9_what_there_is_no_room_for_is_dropped_and_counts_as_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By number and by bytes; and a timer whose question still waits is not asked about twice."""
    monkeypatch.setattr(loops_asking, "_QUEUE_QUESTIONS", 3)
    monkeypatch.setattr(loops_asking, "_QUEUE_BYTES", 1_000)
    dropped = metrics.QUESTIONS.labels("dropped")
    before = dropped._value.get()
    it = Asking(condition_services={"crm": NOWHERE})
    waiting = question()
    it.asker.ask([waiting, waiting, question(facts="x" * 1_000), question(), question(), question()])
    assert [(one.holds, one.was_asked, one.reason) for one in it.answers] == [
        (None, False, "the question before still waits to be asked of crm"),
        (None, False, "too many questions wait to be asked of crm"),
        (None, False, "too many questions wait to be asked of crm"),
    ]
    assert dropped._value.get() - before == 3


async def test_room_comes_back_when_questions_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, places and timers are given back."""
    monkeypatch.setattr(loops_asking, "_QUEUE_QUESTIONS", 1)
    monkeypatch.setattr(loops_asking, "_QUEUE_BYTES", 200)
    service = ConditionService(says(True))
    async with service.listening(), asking(condition_services={"crm": service.url}) as it:
        one = question(facts="x" * 150)
        for count in (1, 2, 3):
            it.asker.ask([one])
            assert (await it.answered(count))[-1].holds


async def test_questions_are_counted_by_what_came_of_them() -> None:
    """Also those of a service that is unknown."""
    before = {one: metrics.QUESTIONS.labels(one)._value.get() for one in ("true", "false", "no_answer")}
    service = ConditionService(says(True))
    service.of_entity = {"f": says(False), "g": hangs_up}
    async with service.listening(), asking(condition_services={"crm": service.url}) as it:
        it.asker.ask([question(), question(entity="f"), question(entity="g"), question("unknown")])
        await it.answered(4)
    after = {one: metrics.QUESTIONS.labels(one)._value.get() for one in before}
    assert {one: after[one] - before[one] for one in before} == {"true": 1, "false": 1, "no_answer": 2}
