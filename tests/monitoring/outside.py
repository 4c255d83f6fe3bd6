"""What is outside of Carillon, for the load: receivers of webhooks, a service that decides and formats."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

from aiohttp import web

from local.processes import free_port


class Outside:
    """Answers at `url`: /ok takes everything, /gone nothing any more, /flaky every third, /slow after a while."""

    def __init__(self) -> None:
        self.url = ""
        self.nowhere = f"http://127.0.0.1:{free_port()}/"
        """Where nobody listens."""
        self._calls = count()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Outside"]:
        """Until the block ends."""
        app = web.Application()
        app.add_routes(
            [web.post(f"/{name}", getattr(self, name)) for name in ("ok", "gone", "flaky", "slow", "decide", "write")]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def ok(self, _request: web.Request) -> web.Response:
        """It takes it."""
        return web.Response(text="thanks")

    async def gone(self, _request: web.Request) -> web.Response:
        """It will never take any."""
        return web.Response(status=410, text="moved away")

    async def flaky(self, _request: web.Request) -> web.Response:
        """It takes every third."""
        return web.Response(status=503 if next(self._calls) % 3 else 200)

    async def slow(self, _request: web.Request) -> web.Response:
        """It takes its time."""
        await asyncio.sleep(0.3)
        return web.Response(text="thanks")

    async def decide(self, request: web.Request) -> web.Response:
        """Conditions of timers: no for every second entity."""
        asked = await request.json()
        return web.json_response({"holds": int(asked["entity"].rpartition("-")[2]) % 2 == 0})

    async def write(self, request: web.Request) -> web.Response:
        """Items of types that it formats."""
        asked = await request.json()
        return web.json_response({"items": [f"about {one['entity']}" for one in asked["items"]]})
