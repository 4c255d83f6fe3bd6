"""What business services are asked to format, over real HTTP, and what comes of it: well, badly, slowly, not at all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr

from services.digest import loops_formatting
from services.digest.formatting import Formatted, Order
from services.digest.loops_formatting import MOST_ANSWER_BYTES, Formatter
from services.digest.rendering_jobs import Line
from services.digest.settings import DigestSettings
from tests.support.condition_service import Behaviour, ConditionService, drips, hangs_up, responds, waits_for
from tests.support.formatting_service import writes


def line(number: int = 1, kind: str = "order.placed") -> Line:
    """An item."""
    return Line(f"id-{number}", kind, "Order", f"order:{number}", "", "2026-07-09T12:15:00+00:00", '{"total": 1}')


def order(*lines: Line, service: str = "crm", **fields: Any) -> Order:
    """A plain-text digest, whose orders `service` formats."""
    given = Order("acme", "text", "summary", False, "UTC", "en", lines or (line(),), {"order.placed": service})
    return given._replace(**fields)


@asynccontextmanager
async def formatting(**settings: Any) -> AsyncIterator[Formatter]:
    """A formatter that does not wait long."""
    async with Formatter(settings=DigestSettings(**settings)) as one:
        yield one


async def formatted_by(
    behaviour: Behaviour, *orders: Order, **settings: Any
) -> tuple[list[Formatted], ConditionService]:
    """What one behaviour of the service comes to."""
    service = ConditionService(behaviour)
    async with service.listening(), formatting(formatting_services={"crm": service.url}, **settings) as it:
        return await it.format(orders or [order()]), service


def texts(formatted: Formatted) -> list[str | None]:
    """What the service wrote."""
    return [one.formatted["text"] if one.formatted else None for one in formatted.lines]


async def test_the_service_is_asked_as_the_contract_says() -> None:
    """POST, the format and style in Accept, JSON in and out, our name and the operator's token."""
    (came,), service = await formatted_by(writes, formatting_token=SecretStr("hunter2"))
    (request,) = service.requests
    assert request.method == "POST"
    assert request.headers["Accept"] == "NotificationFormat/text; style=summary"
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["User-Agent"] == "carillon"
    assert request.headers["Authorization"] == "Bearer hunter2"
    assert service.questions[0]["items"][0]["payload"] == {"total": 1}
    assert texts(came) == ["<b>crm</b> text summary en order:1\n"]
    assert came.error == ""


async def test_many_items_take_few_requests() -> None:
    """Fifty in each; what two readers share is asked about once."""
    lines = [line(number) for number in range(120)]
    came, service = await formatted_by(writes, order(*lines), order(*lines[:7]))
    assert sorted(len(asked["items"]) for asked in service.questions) == [20, 50, 50]
    assert [one.error for one in came] == ["", ""]
    assert texts(came[1]) == [f"<b>crm</b> text summary en order:{number}\n" for number in range(7)]


async def test_what_is_remembered_is_not_asked_again() -> None:
    """By everything that it depends on: another item, language or tenant is another question."""
    service = ConditionService(writes)
    async with service.listening(), formatting(formatting_services={"crm": service.url}) as it:
        (first,) = await it.format([order()])
        assert it.known(order()) == first
        assert await it.format([order()]) == [first]
        assert len(service.questions) == 1
        for other in (order(line(2)), order(locale="de"), order(tenant="globex"), order(style="full")):
            assert it.known(other) is None
            await it.format([other])
        assert len(service.questions) == 5
        assert [asked["tenant"] for asked in service.questions].count("globex") == 1


async def test_what_is_remembered_has_its_bounds() -> None:
    """Without room nothing is, and everything works."""
    service = ConditionService(writes)
    async with (
        service.listening(),
        formatting(formatting_services={"crm": service.url}, formatting_cache_bytes=0) as it,
    ):
        for _ in range(2):
            (came,) = await it.format([order()])
            assert came.error == ""
    assert len(service.questions) == 2


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (responds(404, text="no such page"), "it answered 404 no such page"),
        (responds(500, text="oops"), "it answered 500 oops"),
        (responds(204), "it answered 204"),
        (responds(302, Location="http://169.254.169.254/"), "it answered 302"),
        (responds(text="<html>"), "something else than items"),
        (responds(body={"items": []}), "it answered 0 items to 1"),
        (responds(body={"items": [None]}), "it left that to the template"),
        (responds(body={"items": ["x" * 70_000]}), "it wrote more than 64 KiB for an item"),
        (responds(text=" " * (MOST_ANSWER_BYTES + 1)), "it answered 200 with more than 4096 KiB"),
        (hangs_up, "Server disconnected"),
        (drips, "no answer within 0.5 s"),
    ],
)
async def test_what_cannot_be_used_is_left_to_templates(behaviour: Behaviour, words: str) -> None:
    """With the reason; nothing is raised, and redirects lead nowhere."""
    (came,), _ = await formatted_by(behaviour, formatting_timeout="500ms")
    assert texts(came) == [None]
    assert came.error.startswith("crm formatted 0 of 1, templates the rest: ")
    assert words in came.error


async def test_a_service_that_stumbles_is_asked_once_more() -> None:
    """To format twice does no harm; a plain refusal is final."""
    behaviours = iter([responds(503), writes])

    async def stumbles(request: web.Request) -> web.StreamResponse:
        return await next(behaviours)(request)

    (came,), service = await formatted_by(stumbles)
    assert came.error == ""
    assert len(service.questions) == 2
    _, service = await formatted_by(responds(400))
    assert len(service.questions) == 1


async def test_nobody_waits_for_a_service_that_fails_again_and_again() -> None:
    """After five failures it is not asked for a while; others are."""
    bad, good = ConditionService(responds(503)), ConditionService(writes)
    async with bad.listening(), good.listening():
        services = {"crm": bad.url, "ops": good.url}
        async with formatting(formatting_services=services) as it:
            for number in range(5):
                await it.format([order(line(number))])
            asked = len(bad.questions)
            (left,) = await it.format([order()])
            assert "it failed 5 times and is left alone for a while" in left.error
            assert len(bad.questions) == asked
            (came,) = await it.format([order(service="ops")])
            assert came.error == ""


async def test_a_service_that_keeps_us_waiting_is_left_alone_however_few_may_ask_it() -> None:
    """What is broken off because its message is out of time says nothing of the service, and no good either."""
    service = ConditionService(waits_for(asyncio.Event(), writes))
    settings: dict[str, Any] = {"formatting_timeout": "100ms", "formatting_concurrency": 1}
    async with service.listening(), formatting(formatting_services={"crm": service.url}, **settings) as it:
        many = order(*(line(number) for number in range(400)))
        for _ in range(4):
            await it.format([many])
        (came,) = await it.format([many])
    assert "it failed 5 times and is left alone for a while" in came.error


async def test_wrong_answers_do_not_turn_a_service_off() -> None:
    """They cost no time, and one tenant's odd payloads must not take it from the others."""
    service = ConditionService(responds(400))
    async with service.listening(), formatting(formatting_services={"crm": service.url}) as it:
        for number in range(7):
            await it.format([order(line(number))])
        service.behaviour = writes
        (came,) = await it.format([order()])
    assert came.error == ""


async def test_a_broken_service_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """One good answer, and it is asked as before."""
    monkeypatch.setattr(loops_formatting, "_BROKEN_SECONDS", 1e-6)
    service = ConditionService(responds(503))
    async with service.listening(), formatting(formatting_services={"crm": service.url}) as it:
        for number in range(6):
            await it.format([order(line(number))])
        service.behaviour = writes
        (came,) = await it.format([order()])
    assert came.error == ""


async def test_a_service_that_is_not_registered_is_said_so() -> None:
    """As after the operator has taken it away."""
    async with formatting() as it:
        (came,) = await it.format([order()])
    assert "it is not registered in CARILLON_DIGEST_FORMATTING_SERVICES" in came.error


async def test_what_is_answered_in_time_is_used_when_the_rest_is_not() -> None:
    """One deadline for all requests of a message; it names how much is missing."""
    gate = asyncio.Event()

    async def slow_for_some(request: web.Request) -> web.StreamResponse:
        if (await request.json())["items"][0]["entity"] != "order:0":
            await gate.wait()
        return await writes(request)

    lines = [line(number) for number in range(60)]
    (came,), _ = await formatted_by(slow_for_some, order(*lines), formatting_timeout="500ms")
    assert [text is not None for text in texts(came)] == [True] * 50 + [False] * 10
    assert came.error == "crm formatted 50 of 60, templates the rest: no answer within 0.5 s"


async def test_only_so_many_requests_are_under_way() -> None:
    """The others wait their turn, and another service's do not."""
    gate = asyncio.Event()
    crm, ops = ConditionService(waits_for(gate, writes)), ConditionService(writes)
    async with crm.listening(), ops.listening():
        services = {"crm": crm.url, "ops": ops.url}
        async with formatting(formatting_services=services, formatting_concurrency=2) as it:
            many = asyncio.create_task(it.format([order(*(line(number) for number in range(400)))]))
            await crm.asked(2)
            await it.format([order(*(line(number) for number in range(400)), service="ops")])
            assert (len(crm.questions), len(ops.questions)) == (2, 8)
            gate.set()
            assert [one.error for one in await many] == [""]
    assert len(crm.questions) == 8
