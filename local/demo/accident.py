"""Accidents on request: kill -9 a service in the middle of the replay, and start it again."""

import asyncio
from dataclasses import dataclass
from typing import Self

from local.demo.stage import Stage
from local.stack import SERVICES

_INTO_THE_SHIFT_S = 0.1  # Calls, frames and mails are under way by then.


@dataclass(frozen=True, kw_only=True, slots=True)
class Accident:
    """What is killed, and when: a fraction of the replay, 0 to 1."""

    service: str
    fraction: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `scheduler@0.5`. Raises ValueError."""
        service, _, fraction = text.partition("@")
        if service not in SERVICES or not 0 <= float(fraction or "0.5") < 1:
            raise ValueError(f"expected one of {', '.join(SERVICES)}, @, and a fraction below 1, got {text!r}")
        return cls(service=service, fraction=float(fraction or "0.5"))


class Accidents:
    """Makes them happen. Use as a context: on leaving, all that was killed runs again."""

    def __init__(self, stage: Stage, accidents: list[Accident]) -> None:
        self._stage = stage
        self._accidents = accidents
        self._tasks: list[asyncio.Task[None]] = []
        self.happened: list[str] = []

    def shift(self, number: int, shifts: int) -> None:
        """A shift begins, of so many: whatever is due in it happens soon."""
        for accident in self._accidents:
            if int(accident.fraction * shifts) == number:
                self._tasks.append(asyncio.create_task(self._happen(accident)))

    async def _happen(self, accident: Accident) -> None:
        await asyncio.sleep(_INTO_THE_SHIFT_S)
        await asyncio.to_thread(self._stage.kill, accident.service)
        await asyncio.to_thread(self._stage.restart, accident.service)
        self.happened.append(accident.service)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._tasks)
