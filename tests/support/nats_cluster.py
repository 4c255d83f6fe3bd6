"""Three NATS servers on loopback that are one cluster, each with a JetStream store of its own, to be killed one by one.

    with NatsCluster(directory) as cluster:
        settings = NatsSettings(url=cluster.urls, stream_replicas=3)
        cluster.servers[cluster.leader_of("CARILLON_DIGEST")].kill()

All methods block.
"""

import asyncio
import json
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

from local.processes import free_port
from local.servers import HOST, NatsServer

_NAMES = ("n0", "n1", "n2")
_READY_TIMEOUT_S = 30


class NatsCluster:
    """Servers 0 to 2; `sync` is JetStream's sync_interval."""

    def __init__(self, directory: Path, *, sync: str = "always") -> None:
        routes = [free_port() for _ in _NAMES]
        self._monitors = [free_port() for _ in _NAMES]
        others = ", ".join(f"nats-route://{HOST}:{port}" for port in routes)
        self.servers = [
            NatsServer(
                directory / name,
                sync=sync,
                config=f"server_name: {name}\nhttp: {HOST}:{monitor}\n"
                f"cluster {{ name: c, listen: {HOST}:{route}, routes: [{others}] }}\n",
            )
            for name, route, monitor in zip(_NAMES, routes, self._monitors, strict=True)
        ]
        self._directories = [directory / name for name in _NAMES]
        self._exits = ExitStack()

    @property
    def urls(self) -> tuple[str, ...]:
        """All three, for the setting CARILLON_NATS_URL."""
        return tuple(server.url for server in self.servers)

    def __enter__(self) -> Self:
        try:
            for directory, server in zip(self._directories, self.servers, strict=True):
                directory.mkdir(parents=True, exist_ok=True)
                self._exits.enter_context(server)
            self.wait_until_whole()
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def wait_until_whole(self) -> None:
        """Wait until every server that runs says it is healthy: its streams are there and up to date."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        waiting = {n for n, server in enumerate(self.servers) if server.pid is not None}
        while waiting:
            if time.monotonic() > deadline:
                raise TimeoutError(f"servers {waiting} are not healthy after {_READY_TIMEOUT_S} s")
            waiting = {n for n in waiting if not self._is_healthy(n)}
            time.sleep(0.05)

    def _is_healthy(self, number: int) -> bool:
        with suppress(OSError):
            return bool(self._ask(number, "healthz")["status"] == "ok")
        return False

    def leader_of(self, stream: str) -> int:
        """The number of the server that leads a stream."""
        number = next(n for n, server in enumerate(self.servers) if server.pid is not None)
        found = self._streams(number)[stream]
        return _NAMES.index(found["cluster"]["leader"])

    def replicas_of(self, stream: str) -> int:
        """How many servers have a stream."""
        number = next(n for n, server in enumerate(self.servers) if server.pid is not None)
        return 1 + len(self._streams(number)[stream]["cluster"].get("replicas", ()))

    def _streams(self, number: int) -> dict[str, dict[str, Any]]:
        found = self._ask(number, "jsz?streams=true")
        return {stream["name"]: stream for account in found["account_details"] for stream in account["stream_detail"]}

    def _ask(self, number: int, path: str) -> dict[str, Any]:
        with urlopen(f"http://{HOST}:{self._monitors[number]}/{path}", timeout=2) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found


async def until_leader(cluster: NatsCluster, stream: str) -> int:
    """Wait until the stream has a leader that runs; its number."""
    async with asyncio.timeout(_READY_TIMEOUT_S):
        while True:
            with suppress(OSError, KeyError, ValueError):
                number = await asyncio.to_thread(cluster.leader_of, stream)
                if cluster.servers[number].pid is not None:
                    return number
            await asyncio.sleep(0.05)
