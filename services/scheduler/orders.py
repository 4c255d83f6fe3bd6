"""Orders: what callers may have done to timers that have not fired yet. Pure.

An order is obeyed by the timers that wait when it arrives, and by those that were accepted before it and arrive later:
a tombstone keeps it for them. A timer obeys the orders that were accepted after it in the order of their sequences,
whatever the order of arrival, so the result is the same.
"""

from datetime import datetime
from enum import IntEnum
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from services.scheduler.timer import Mark, State, Timer, fire_time


class Action(IntEnum):
    """What an order is about; stored."""

    CANCEL = 1
    PAUSE = 2
    RESUME = 3
    RESCHEDULE = 4


class Selection(Struct, frozen=True, kw_only=True):
    """Which timers of an entity; empty parts select all."""

    type: str = ""
    ids: frozenset[UUID] = frozenset()
    timeline: str = ""

    def selects(self, timer: Timer) -> bool:
        """Whether this timer, of the entity in question, is selected."""
        return (
            (not self.type or self.type == timer.type)
            and (not self.timeline or (timer.step_of is not None and self.timeline == timer.step_of.timeline))
            and (not self.ids or timer.id in self.ids or timer.schedule_id in self.ids)
        )


class Order(Struct, frozen=True, kw_only=True):
    """`cause` goes on record with a cancel; `due_at` is the new due time of a reschedule."""

    action: Action
    selection: Selection
    cause: str = ""
    due_at: datetime | None = None


def obey(timer: Timer, order: Order, *, watermark: Mark, now: datetime) -> Timer:
    """The timer as the order leaves it; the same one where it changes nothing.

    What is under way (its event is out, its condition is being asked, it is buffered) can only be cancelled. A timer
    that waits for its next attempt counts as waiting.
    """
    is_waiting = timer.state is not State.RETRYING or timer.attempts > 0  # Otherwise it fires within this turn.
    match order.action, timer.state:
        case Action.CANCEL, _:
            return replace(timer, state=State.CANCELLED, decided_at=now, note=order.cause or None)
        case Action.PAUSE, State.SCHEDULED | State.RETRYING if is_waiting:
            return replace(timer, state=State.PAUSED)
        case Action.RESUME, State.PAUSED:
            state = State.RETRYING if timer.attempts else State.SCHEDULED
            return replace(timer, state=state, fire_at=fire_time(timer.fire_at, watermark))
        case Action.RESCHEDULE, State.SCHEDULED | State.RETRYING | State.PAUSED if is_waiting:
            assert order.due_at is not None
            return replace(timer, due_at=order.due_at, fire_at=fire_time(order.due_at, watermark))
    return timer
