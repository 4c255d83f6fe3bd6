"""Conditions that a business service decides: what it is asked, how often, and what its silence means. Pure.

Nobody waits for the answer. A timer that is due becomes ASKING and its shard goes on; the answer comes back as a
command. While it is ASKING its `fire_at` is when to ask again, so that an owner's death costs one more question, never
the timer.
"""

from datetime import datetime, timedelta
from enum import IntEnum
from uuid import UUID

from msgspec import Struct

from libs.backoff import Backoff
from libs.trace_points import NOWHERE, Point

MAX_ASKS = 3
_BACKOFF = Backoff(first=timedelta(seconds=1), longest=timedelta(minutes=1))


class NoAnswer(IntEnum):
    """What it comes to when there is no answer; numbers as in scheduler.v1.NoAnswerPolicy."""

    FAIL = 1
    FIRE = 2
    SKIP = 3


class ServiceCondition(Struct, frozen=True, kw_only=True):
    """A condition that `service` decides, each time within `timeout`."""

    service: str
    timeout: timedelta
    no_answer: NoAnswer

    def ask_again_at(self, asks: int, now: datetime) -> datetime:
        """When to ask once more, after so many questions."""
        return now + self.timeout + _BACKOFF.bound(asks)


class Question(Struct, frozen=True, kw_only=True):
    """What a service is asked about a timer. `number` is one more than the questions that came to no answer;
    one that is put again, because nobody knows what became of it, has the same."""

    shard: int
    timer_id: UUID
    number: int
    condition: ServiceCondition
    about: dict[str, object]
    trace: Point = NOWHERE


class Answer(Struct, frozen=True, kw_only=True):
    """What came back: `holds`, with a reason if it likes; or None, with the error.

    `was_asked`: whether the question left at all. One that did not says nothing about the service.
    """

    shard: int
    timer_id: UUID
    number: int
    holds: bool | None
    reason: str
    was_asked: bool = True
