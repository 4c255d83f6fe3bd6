"""Channels to the four services."""

from contextlib import AsyncExitStack
from typing import Self

import grpc

from libs.rpc_client import connect
from local.demo.stage import Stage
from local.stack import SERVICES

_MAX_ANSWER_BYTES = 64 << 20  # A thousand digests with their delivery ids come in one page.


class Connections:
    """One channel each, by the service's name. Use as a context."""

    def __init__(self, stage: Stage) -> None:
        self._channels = {
            name: connect(stage.grpc(name), token=stage.token, max_message_bytes=_MAX_ANSWER_BYTES) for name in SERVICES
        }
        self._exits = AsyncExitStack()

    @property
    def intake(self) -> grpc.aio.Channel:
        """Where commands go."""
        return self._channels["intake"]

    @property
    def scheduler(self) -> grpc.aio.Channel:
        """Where timers are."""
        return self._channels["scheduler"]

    @property
    def digest(self) -> grpc.aio.Channel:
        """Where windows and digests are."""
        return self._channels["digest"]

    @property
    def dispatcher(self) -> grpc.aio.Channel:
        """Where deliveries are."""
        return self._channels["dispatcher"]

    async def __aenter__(self) -> Self:
        for channel in self._channels.values():
            await self._exits.enter_async_context(channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()
