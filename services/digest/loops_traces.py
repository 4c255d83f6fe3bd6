"""The spans of digests in the making.

What is sent alone and has not waited goes on in the trace of its notification. A digest begins a trace of its own,
which links to what closed its window (a timer's firing, a batch's trigger) and to what caused its items: in the order
in which they happened, at most traces.MOST_LINKS, the rest being counted.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from uuid import UUID

from opentelemetry.trace import INVALID_SPAN, use_span

from libs.telemetry import traces
from libs.telemetry.exemplars import Exemplar, exemplar_of
from libs.trace_points import Point
from services.digest.windows import Closed, ClosingWindow


class Making(traces.Spans):
    """Those of one batch: begun when its windows are claimed, ended with the transaction, that is with the block."""

    def __init__(self) -> None:
        super().__init__()
        self._windows = 0

    def begin(
        self, windows: Sequence[ClosingWindow], causes: Mapping[UUID, Sequence[Point]]
    ) -> Sequence[ClosingWindow]:
        """The windows, in whose traces what follows from them goes on."""
        self._windows = len(windows)
        if not traces.is_on():
            return windows
        return [self._begin(one, causes.get(one.id, ())) for one in windows]

    def _begin(self, window: ClosingWindow, causes: Sequence[Point]) -> ClosingWindow:
        parent, *others = [window.trace, *causes] if window.is_alone and window.trace else [b"", window.trace, *causes]
        span = traces.begin(
            "make digest",
            parent=parent,
            causes=[cause for cause in others if cause != parent],
            attributes={
                "carillon.tenant": window.tenant,
                "carillon.digest.id": str(window.id),
                "carillon.cadence": window.cadence,
                "carillon.channel": window.channel.value,
                "carillon.items": len(window.lines),
            },
        )
        if span is INVALID_SPAN:
            return window
        self._spans[window.id] = span
        return replace(window, trace=traces.point_in(span))

    def current(self) -> AbstractContextManager[object]:
        """Have its span be the current one where there is one window; of several none is."""
        spans = [*self._spans.values()]
        return use_span(spans[0], end_on_exit=False) if spans and self._windows == 1 else nullcontext()

    def note(self, closed: Sequence[Closed]) -> None:
        """Say what became of them; what quiet hours hold, or is left for the next batch, is not among these."""
        for one in closed if self._spans else ():
            if (span := self._spans.get(one.window.id)) is not None:
                span.set_attribute("carillon.digest.result", one.result)
                span.set_attribute("carillon.digest.parts", len(one.messages))

    @property
    def exemplar(self) -> Exemplar | None:
        """Leads to one of them."""
        return next(map(exemplar_of, self._spans.values()), None)
