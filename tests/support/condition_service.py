"""A business service that decides conditions, well or badly, as a test tells it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ConditionService:
    """Keeps what it is asked; behaves as set, per entity or for all."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.of_entity: dict[str, Behaviour] = {}
        self.questions: list[dict[str, Any]] = []
        self.requests: list[web.Request] = []
        self.connections: set[object] = set()
        self.url = ""
        self._has_news = asyncio.Condition()

    async def asked(self, count: int) -> list[dict[str, Any]]:
        """Wait until `count` questions have come."""
        async with asyncio.timeout(10), self._has_news:
            await self._has_news.wait_for(lambda: len(self.questions) >= count)
        return self.questions

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["ConditionService"]:
        """Answer at `url`, until the block ends."""
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/condition"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        question = await request.json() if request.can_read_body else {}
        self.requests.append(request)
        self.connections.add(request.transport)
        async with self._has_news:
            self.questions.append(question)
            self._has_news.notify_all()
        return await self.of_entity.get(question.get("entity", ""), self.behaviour)(request)


def says(holds: object, **more: object) -> Behaviour:
    """It answers 200 with a verdict."""
    return responds(body={"holds": holds, **more})


def responds(status: int = 200, body: object = None, text: str | None = None, **headers: str) -> Behaviour:
    """It answers with anything."""

    async def respond(_request: web.Request) -> web.StreamResponse:
        if text is not None:
            return web.Response(status=status, text=text, headers=headers)
        return web.json_response(body, status=status, headers=headers)

    return respond


def waits_for(gate: asyncio.Event, then: Behaviour) -> Behaviour:
    """It takes its time."""

    async def wait(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return await then(request)

    return wait


async def hangs_up(request: web.Request) -> web.StreamResponse:
    """It cuts the connection instead of answering."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def drips(request: web.Request) -> web.StreamResponse:
    """It answers one byte at a time, for ever."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)
