"""libs.telemetry.traces: which spans are made, in which traces, and what they show."""

import prometheus_client
import pytest
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, StatusCode
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from libs.errors import NotFound
from libs.telemetry import traces
from libs.telemetry.exemplars import Histogram, exemplar_at
from libs.trace_points import Point, carrier_at
from tests.support.spans import links_of, parent_of, point_of_span, recorded


def cause(number: int) -> Point:
    """Some point, a trace of its own for each number from 1."""
    return number.to_bytes(16) + b"caller.."


CAUSE = cause(1)


class TestWhatIsTraced:
    """What a sampled trace has caused, and nothing else."""

    def test_what_nobody_asked_for_makes_no_span(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Loops would fill a collector otherwise."""
        with recorded(monkeypatch) as spans, traces.doing(traces.begin("loop")) as span:
            assert span is INVALID_SPAN
        with recorded(monkeypatch) as spans, traces.working("loop", [b"", b""]):
            assert not trace.get_current_span().get_span_context().is_valid
        assert spans.get_finished_spans() == ()

    def test_where_no_spans_are_made_a_cause_makes_none(self) -> None:
        """The default."""
        assert traces.begin("fire", causes=[CAUSE]) is INVALID_SPAN
        assert traces.begin("send", parent=CAUSE) is INVALID_SPAN

    def test_what_was_caused_is_sampled_whatever_the_ratio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The decision was made when the first call came: stories are whole or absent."""
        with recorded(monkeypatch, ratio=0) as spans:
            traces.begin("fire", causes=[CAUSE]).end()
            traces.begin("send", parent=CAUSE).end()
            with traces.span("a call without a trace"):
                pass
        assert [span.name for span in spans.get_finished_spans()] == ["fire", "send"]

    @pytest.mark.parametrize(("flags", "is_carried"), [("00", False), ("01", True)])
    def test_frames_carry_what_is_sampled(self, flags: str, is_carried: bool) -> None:
        """A frame is shared by all calls that carry nothing; other headers pass the decision on."""
        carrier = {"traceparent": carrier_at(CAUSE)["traceparent"][:-2] + flags}
        with traces.span("call", carrier=carrier):
            assert bool(traces.carried()) is is_carried
            assert bool(traces.here()) is is_carried
            assert traces.inject() == carrier


class TestLinks:
    """They lead from what has waited to what caused it."""

    def test_what_has_waited_begins_a_trace_that_links_to_its_causes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each once, in their order; what is not traced has none."""
        with recorded(monkeypatch) as spans:
            traces.begin("digest", causes=[cause(2), b"", CAUSE, cause(2)]).end()
        (span,) = spans.get_finished_spans()
        assert parent_of(span) == b""
        assert links_of(span) == [cause(2), CAUSE]
        assert traces.LEFT_OUT not in (span.attributes or {})

    def test_there_are_so_many_at_most_and_the_rest_is_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A digest of 500 items from 500 traces."""
        with recorded(monkeypatch) as spans:
            traces.begin("digest", causes=map(cause, range(1, 501))).end()
        (span,) = spans.get_finished_spans()
        assert links_of(span) == [cause(number) for number in range(1, 33)]
        assert dict(span.attributes or {}) == {traces.LEFT_OUT: 468}


class TestWork:
    """One block of work is done for many traces."""

    def test_each_trace_sees_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And goes on in its own span of it, which no log line may claim as the only one."""
        points = [CAUSE, b"", cause(2), CAUSE]
        with recorded(monkeypatch) as spans, traces.working("apply", points, attributes={"frames": 4}) as work:
            assert not trace.get_current_span().get_span_context().is_valid
        found = {parent_of(span): span for span in spans.get_finished_spans()}
        assert found.keys() == {CAUSE, cause(2)}
        assert work.points == {parent: point_of_span(span) for parent, span in found.items()}
        assert all(dict(span.attributes or {}) == {"frames": 4} for span in found.values())

    def test_of_one_trace_it_is_the_current_span(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that log lines lead to it."""
        with recorded(monkeypatch) as spans, traces.working("apply", [CAUSE, CAUSE]) as work:
            assert traces.here() == work.points[CAUSE]
        assert len(spans.get_finished_spans()) == 1

    def test_so_many_traces_see_it_at_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The others go on from where they were."""
        with recorded(monkeypatch) as spans, traces.working("apply", map(cause, range(1, 101))) as work:
            assert len(work.points) == 32
        assert {(span.attributes or {})[traces.LEFT_OUT] for span in spans.get_finished_spans()} == {68}

    def test_where_no_spans_are_made_the_callers_context_goes_on(self) -> None:
        """Through a transaction that is one trace's alone."""
        with traces.working("apply", [CAUSE]) as work:
            assert traces.inject() == carrier_at(CAUSE)
            assert work.points == {}
        with traces.working("apply", [CAUSE, b""]):
            assert traces.inject() == {}


class TestFailures:
    """A span says that, and of what kind."""

    @pytest.mark.parametrize(
        ("error", "kind"), [(ValueError("to ann@example.com"), "ValueError"), (NotFound(), NotFound().reason)]
    )
    def test_an_error_shows_its_kind_and_never_its_words(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
    ) -> None:
        """They may quote what callers sent."""
        with recorded(monkeypatch) as spans, pytest.raises(type(error)):  # noqa: SIM117 - what raises is the inner one.
            with traces.doing(traces.begin("send", parent=CAUSE)):
                raise error
        (span,) = spans.get_finished_spans()
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, kind)
        assert (dict(span.attributes or {}), span.events) == ({"error.type": kind}, ())

    def test_work_that_failed_has_failed_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each trace shows it."""
        with recorded(monkeypatch) as spans, traces.working("apply", [CAUSE, cause(2)]) as work:
            work.fail(ValueError())
        assert [span.status.status_code for span in spans.get_finished_spans()] == [StatusCode.ERROR] * 2


class TestServerSpans:
    """Of incoming calls."""

    def test_probes_make_no_spans(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Kubernetes asks every few seconds."""
        probe = ("grpc.health.v1.Health", "Check")
        with recorded(monkeypatch) as spans, traces.server_span(*probe, {}, is_traced=True):
            pass
        with traces.server_span(*probe, carrier_at(CAUSE), is_traced=False):
            assert traces.here() == b""
        assert spans.get_finished_spans() == ()


class TestExemplars:
    """They lead from a bucket to a trace."""

    def test_an_observation_shows_the_current_span_if_it_is_sampled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its labels, and by itself; `time` observes as well."""
        registry = CollectorRegistry()
        histogram = Histogram("bells_seconds", "Bells.", ["tower"], buckets=(1, 2, 3, 4, 5), registry=registry)
        with recorded(monkeypatch), traces.doing(traces.begin("ring", parent=CAUSE)):
            histogram.labels("north").observe(0.5)
            with histogram.labels("south").time():
                pass
        histogram.labels("north").observe(1.5)
        with traces.span("ring", carrier={"traceparent": carrier_at(CAUSE)["traceparent"][:-2] + "00"}):
            histogram.labels("north").observe(2.5)
        histogram.labels("north").observe(3.5, exemplar_at(cause(7)))
        shown = {
            line.split("}")[0]: line.split('trace_id="')[1][:32]
            for line in _openmetrics(registry).splitlines()
            if "# {" in line
        }
        assert shown == {
            'bells_seconds_bucket{le="1.0",tower="north"': CAUSE[:16].hex(),
            'bells_seconds_bucket{le="1.0",tower="south"': CAUSE[:16].hex(),
            'bells_seconds_bucket{le="4.0",tower="north"': cause(7)[:16].hex(),
        }
        assert "# {" not in prometheus_client.generate_latest(registry).decode().replace("# HELP", "")

    def test_nowhere_is_no_exemplar(self) -> None:
        """Most timers are not traced."""
        assert exemplar_at(b"") is None


def _openmetrics(registry: CollectorRegistry) -> str:
    shown: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return shown.decode()
