"""The HTTP port of a service: /metrics for Prometheus, /livez and /readyz for Kubernetes.

/livez only says that the event loop turns: restarting a process does not mend the database it waits for. /readyz asks
the service's own checks, and answers 503 with each one's reason while any fails. None of them has authentication.
"""

import asyncio
import platform
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder

from libs.settings import HttpSettings
from libs.telemetry.logs import get_logger

_log = get_logger(__name__)

Readiness = Callable[[], Awaitable[Mapping[str, str | None]]]
"""Names what the service needs: None when it is there, otherwise a sentence that says what is wrong."""


class TelemetryHttp:
    """The HTTP server, listening for as long as the `async with` block lasts."""

    def __init__(self, settings: HttpSettings, *, registry: CollectorRegistry, readiness: Readiness) -> None:
        self._settings = settings
        self._registry = registry
        self._readiness = readiness
        self._runner: web.AppRunner | None = None
        self.port = settings.port

    async def __aenter__(self) -> Self:
        self._runner = web.AppRunner(self._app(), access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._settings.host, self._settings.port).start()
        self.port = self._runner.addresses[0][1]
        _log.info("Listening for HTTP.", host=self._settings.host, port=self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def address(self) -> str:
        """`host:port` with the port that was chosen."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"{host}:{self.port}"

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1024)
        app.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
            ]
        )
        return app

    async def _metrics(self, request: web.Request) -> web.Response:
        """OpenMetrics where the Accept header asks for it, otherwise Prometheus text."""
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _livez(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_alive": True})

    async def _readyz(self, _request: web.Request) -> web.Response:
        checks = await self._checked()
        is_ready = all(reason is None for reason in checks.values())
        body = {"is_ready": is_ready, "checks": {name: reason or "ok" for name, reason in checks.items()}}
        return web.json_response(body, status=200 if is_ready else 503)

    async def _checked(self) -> Mapping[str, str | None]:
        try:
            async with asyncio.timeout(self._settings.readiness_timeout.total_seconds()):
                return await self._readiness()
        except TimeoutError:
            return {"readiness": "the checks did not answer in time"}
        except Exception:  # noqa: BLE001 - the outermost frame of a probe: a broken check means not ready.
            _log.exception("A readiness check failed unexpectedly.")
            return {"readiness": "a check failed unexpectedly; the log has it"}


def add_build_info(registry: CollectorRegistry, *, service: str, version: str) -> None:
    """The metric `carillon_build_info`, always 1, whose labels say what runs.

    Not `service`: Prometheus gives its targets a label of that name where it finds them through the operator.
    """
    info = Gauge("carillon_build_info", "What runs; always 1.", ("component", "version", "python"), registry=registry)
    info.labels(service, version, platform.python_version()).set(1)
