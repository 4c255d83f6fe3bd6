"""Asks business services whether conditions hold, by HTTP, and hands their answers to the engine.

    engine ──ask──▶ one queue per service ──▶ POST ──▶ on_answer ──▶ engine

Nothing here is durable and nothing waits for it: a timer whose question or answer is lost is asked about again by its
shard. So questions may be asked more than once, by several replicas, and a lost process costs a few seconds.

Each service has a queue and connections of its own, so a slow one keeps only its own timers waiting. What its queue has
no room for is dropped and told as not asked: it does not count against the attempts that a service has to answer.

Which services there are, and what is sent to them besides, libs/business_services.py says.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

import aiohttp
import msgspec
from opentelemetry.trace import Span, SpanKind

from libs.business_services import BadReply, one_line, open_session, read_body, refusal
from libs.telemetry import traces
from libs.trace_points import carrier_at
from services.scheduler import metrics
from services.scheduler.conditions import Answer, Question
from services.scheduler.settings import SchedulerSettings

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 * 1024
MAX_REASON = 1_000
"""Characters that are kept of a reason: it goes on record with the verdict."""

_QUEUE_QUESTIONS = 10_000
_QUEUE_BYTES = 32 << 20
"""What waits to be asked of one service at most (INV-9)."""


class _Reply(msgspec.Struct):
    """What a service says."""

    holds: bool
    reason: str | None = None


_REPLY = msgspec.json.Decoder(_Reply)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A question in a queue."""

    question: Question
    body: bytes


class _Line:
    """What waits to be asked of one service."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(_QUEUE_QUESTIONS)
        self._timers: set[UUID] = set()
        self._bytes = 0

    def put(self, question: Question) -> str | None:
        """Have a question wait; why it cannot, otherwise."""
        if question.timer_id in self._timers:
            return f"the question before still waits to be asked of {question.condition.service}"
        body = json.dumps(question.about).encode()
        if self._queue.full() or self._bytes + len(body) > _QUEUE_BYTES:
            return f"too many questions wait to be asked of {question.condition.service}"
        self._queue.put_nowait(_Waiting(question, body))
        self._timers.add(question.timer_id)
        self._bytes += len(body)
        return None

    async def get(self) -> _Waiting:
        """The one that has waited longest."""
        waiting = await self._queue.get()
        self._timers.discard(waiting.question.timer_id)
        self._bytes -= len(waiting.body)
        return waiting


class Asker:
    """Asks for one replica; `on_answer` hears of every question that does not get lost."""

    def __init__(self, *, settings: SchedulerSettings) -> None:
        """See CARILLON_SCHEDULER_CONDITION_*."""
        self._settings = settings
        self._services = settings.condition_services
        self._lines = {name: _Line() for name in self._services}
        self.on_answer: Callable[[Answer], None] = lambda _answer: None

    def ask(self, questions: Sequence[Question]) -> None:
        """Have questions asked, soon; never blocks, never raises."""
        for question in questions:
            name = question.condition.service
            if (line := self._lines.get(name)) is None:
                variable = SchedulerSettings.variable_of("condition_services")
                metrics.QUESTIONS.labels("no_answer").inc()
                self.on_answer(_answer(question, None, f"there is no service {name!r} in {variable}"))
            elif (why_not := line.put(question)) is not None:
                metrics.QUESTIONS.labels("dropped").inc()
                self.on_answer(_answer(question, None, why_not, was_asked=False))

    async def run(self) -> None:
        """Ask until cancelled."""
        async with open_session(self._settings.condition_token) as session, asyncio.TaskGroup() as tasks:
            for name in self._services:
                for _ in range(self._settings.condition_concurrency):
                    tasks.create_task(self._ask_loop(session, name))
            await asyncio.Event().wait()  # A group without tasks would end.

    async def _ask_loop(self, session: aiohttp.ClientSession, name: str) -> None:
        while True:
            waiting = await self._lines[name].get()
            answer = await self._ask(session, waiting)
            metrics.QUESTIONS.labels("no_answer" if answer.holds is None else str(answer.holds).lower()).inc()
            self.on_answer(answer)

    async def _ask(self, session: aiohttp.ClientSession, waiting: _Waiting) -> Answer:
        question = waiting.question
        try:
            with traces.doing(_request(question)) as span, metrics.ANSWER_SECONDS.time():
                reply = await self._post(session, waiting, span)
        except TimeoutError:
            return _answer(question, None, f"no answer within {question.condition.timeout.total_seconds():g} s")
        except (BadReply, aiohttp.ClientError, OSError) as err:
            return _answer(question, None, str(err) or type(err).__name__)
        except Exception as err:  # Outermost frame of a question: the others must be asked all the same.
            log.exception("A question could not be asked.", extra={"service": question.condition.service})
            return _answer(question, None, f"could not be asked: {type(err).__name__}")
        return _answer(question, reply.holds, reply.reason or "")

    async def _post(self, session: aiohttp.ClientSession, waiting: _Waiting, span: Span) -> _Reply:
        condition = waiting.question.condition
        async with session.post(
            self._services[condition.service],
            data=waiting.body,
            headers=carrier_at(traces.point_in(span) or waiting.question.trace),
            timeout=aiohttp.ClientTimeout(total=condition.timeout.total_seconds()),
            allow_redirects=False,
        ) as response:
            span.set_attribute("http.response.status_code", response.status)
            body = await read_body(response, most_bytes=MAX_ANSWER_BYTES)
        if response.status != 200:
            raise BadReply(refusal(response.status, body))
        try:
            return _REPLY.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise BadReply(f"it answered something else than holds true or false: {err}") from err


def _request(question: Question) -> Span:
    attributes: traces.Attributes = {
        "http.request.method": "POST",
        "peer.service": question.condition.service,
        "carillon.timer.id": str(question.timer_id),
    }
    return traces.begin("POST", parent=question.trace, kind=SpanKind.CLIENT, attributes=attributes)


def _answer(question: Question, holds: bool | None, reason: str, *, was_asked: bool = True) -> Answer:
    return Answer(
        shard=question.shard,
        timer_id=question.timer_id,
        number=question.number,
        holds=holds,
        reason=one_line(reason, most=MAX_REASON),
        was_asked=was_asked,
    )
