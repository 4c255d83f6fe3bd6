"""The spans of timers whose time has come: each in a trace of its own, which links to what set the timer.

A timer that nobody traces costs one comparison here. Where no spans are made, what set the timer is passed on instead.
"""

import logging
from collections.abc import Iterable, Mapping
from uuid import UUID

from msgspec.structs import replace
from opentelemetry.trace import INVALID_SPAN, use_span

from libs.telemetry import traces
from libs.trace_points import Point
from services.scheduler.commands import Changes
from services.scheduler.conditions import Question
from services.scheduler.timer import Timer

log = logging.getLogger(__name__)


class Firing(traces.Spans):
    """Those of one turn: begun before it decides, and ended with its transaction, that is with the block."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[UUID, Point] = {}
        """Of each traced timer: what caused whatever it sends."""

    def begin(self, timers: Iterable[Timer]) -> Mapping[UUID, Point]:
        """The time of these has come; returns `points`."""
        for timer in timers:
            if timer.trace:
                self._begin(timer)
        return self.points

    def _begin(self, timer: Timer) -> None:
        span = traces.begin("fire timer", causes=[timer.trace], attributes=_attributes_of(timer))
        if span is INVALID_SPAN:
            self.points[timer.id] = timer.trace
            return
        self.points[timer.id] = traces.point_in(span)
        self._spans[timer.id] = span
        if log.isEnabledFor(logging.DEBUG):
            with use_span(span, end_on_exit=False):
                log.debug("The time of a timer has come.", extra={"timer_id": str(timer.id)})

    def asking(self, question: Question) -> Question:
        """A question with what caused it."""
        point = self.points.get(question.timer_id)
        return question if point is None else replace(question, trace=point)

    def note(self, changes: Iterable[Changes]) -> None:
        """Say what the turn has decided."""
        for one in changes if self._spans else ():
            after = {timer.id: "fired" for timer in one.fired}
            after |= {timer.id: timer.state.name.lower() for timer in one.updates.values()}
            for timer_id in after.keys() & self._spans.keys():
                self._spans[timer_id].set_attribute("carillon.timer.state", after[timer_id])


def _attributes_of(timer: Timer) -> traces.Attributes:
    return {
        "carillon.tenant": timer.tenant,
        "carillon.timer.id": str(timer.id),
        "carillon.timer.target": timer.target_kind.name.lower(),
        "carillon.timer.attempt": timer.attempts + 1,
    }
