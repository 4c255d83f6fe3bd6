"""The spans of attempts: the first goes on in the trace that made the delivery, every later one has waited.

A retry goes on in the trace of the timer that brought it back; what is sent again for another reason (redriven, or in
doubt) begins a trace of its own. Both link to what made the delivery. Neither addresses nor what the other side said
are shown.
"""

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from libs.telemetry import traces
from libs.trace_points import NOWHERE
from services.dispatcher.delivery import Result, Sent
from services.dispatcher.pipeline import Candidate


def attempt_span(candidate: Candidate) -> Span:
    """The span of the attempt that is about to be made."""
    delivery = candidate.delivery
    parent = candidate.trace or (NOWHERE if candidate.attempts else delivery.trace)
    return traces.begin(
        f"send {delivery.channel}",
        parent=parent,
        causes=[delivery.trace] if delivery.trace != parent else [],
        kind=SpanKind.CLIENT,
        attributes={
            "carillon.tenant": delivery.tenant,
            "carillon.delivery.id": str(delivery.id),
            "carillon.digest.id": str(delivery.digest_id),
            "carillon.channel": delivery.channel,
            "carillon.attempt": candidate.number,
        },
    )


def note_result(span: Span, result: Result) -> None:
    """What came of it: a reason, which is one of a few words."""
    if not isinstance(result, Sent):
        span.set_attribute("error.type", result.reason.value)
        span.set_status(Status(StatusCode.ERROR, result.reason.value))
