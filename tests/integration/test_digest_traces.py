"""Traces through digest over a real Postgres: what each window's timer, and each message, has been caused by."""

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs.links.frames import decoded
from libs.trace_points import Point, point_of
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase
from tests.support.spans import links_of, parent_of, point_of_span, recorded

HOUR = timedelta(hours=1)
ONE, OTHER, FIRING = (bytes([number] * 24) for number in (1, 2, 3))


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with a type and three subscribers."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type()
        for name in ("ann", "bob", "cem"):
            await rig.put_subscriber(name)
        yield rig


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans made in this test."""
    with recorded(monkeypatch) as exporter:
        yield exporter


def traced(entry: link_pb2.Entry, trace: Point) -> link_pb2.Entry:
    """An entry that this has caused."""
    entry.trace = trace
    return entry


async def sent(rig: Rig, receiver: str) -> dict[str, Point]:
    """What caused what lies in the outbox: by the subscriber of a delivery, or the window of a timer."""
    async with rig.db.read() as tx:
        rows = await (
            await tx.raw.execute("SELECT payload, headers FROM outbox WHERE receiver = %s", (receiver,))
        ).fetchall()
    return {
        entry.delivery.subscriber or entry.schedule_timer.target.close_window.window_id.hex(): entry.trace
        or point_of(headers)
        for payload, headers in rows
        for entry in decoded(payload).entries
    }


def made(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    """The spans of digests in the making."""
    return [span for span in spans.get_finished_spans() if span.name == "make digest"]


async def test_each_windows_timer_is_asked_for_by_what_opened_it(rig: Rig) -> None:
    """Although one transaction opens windows for many; what nobody traces asks for its timer untraced."""
    await rig.put_daily()
    for name in ("ann", "bob", "cem"):
        await rig.subscribe(name, "daily")
    entries = [rig.notification("ann"), rig.notification("bob"), rig.notification("cem")]
    await rig.apply(traced(entries[0], ONE), traced(entries[1], OTHER), entries[2])
    windows = {one.subscriber: one.id for one in await rig.windows(pb.WINDOW_STATE_OPEN)}
    asked = await sent(rig, "scheduler")
    assert {name: asked[one_id.replace("-", "")] for name, one_id in windows.items()} == {
        "ann": ONE,
        "bob": OTHER,
        "cem": b"",
    }


async def test_what_is_sent_alone_goes_on_in_its_own_trace(rig: Rig, spans: InMemorySpanExporter) -> None:
    """Although one transaction makes several; the message leads on from its span."""
    entries = [rig.notification("ann"), rig.notification("bob"), rig.notification("cem")]
    await rig.apply(traced(entries[0], ONE), traced(entries[1], OTHER), entries[2])
    await rig.close()
    found = {parent_of(span): point_of_span(span) for span in made(spans)}
    assert found.keys() == {ONE, OTHER}
    assert await sent(rig, "dispatcher") == {"ann": found[ONE], "bob": found[OTHER], "cem": b""}
    assert all(links_of(span) == [] for span in made(spans))


async def test_what_is_sent_alone_and_has_waited_links_to_what_caused_it(rig: Rig, spans: InMemorySpanExporter) -> None:
    """Quiet hours hold it: it goes on in the trace of the timer that ends them."""
    hours = pb.QuietHours(from_time_of_day="12:00", until_time_of_day="13:00")
    await rig.put_subscriber("ann", quiet_hours=[hours])
    await rig.apply(traced(rig.notification("ann"), ONE))
    await rig.close()
    (held,) = made(spans)
    assert parent_of(held) == ONE
    (window,) = await rig.windows(pb.WINDOW_STATE_CLOSING)
    assert await sent(rig, "scheduler") == {window.id.replace("-", ""): point_of_span(held)}
    rig.clock.at += HOUR
    (due,) = [one for one in await rig.outgoing("scheduler") if one.HasField("schedule_timer")]
    close = link_pb2.Entry(tenant=due.tenant, close_window=due.schedule_timer.target.close_window)
    await rig.apply(traced(close, FIRING))
    await rig.close()
    sent_span = made(spans)[-1]
    assert (parent_of(sent_span), links_of(sent_span)) == (FIRING, [ONE])


async def test_a_digest_nobody_traces_makes_no_span(rig: Rig, spans: InMemorySpanExporter) -> None:
    """Most of them, where few calls are sampled."""
    await rig.apply(rig.notification("ann"))
    await rig.close()
    assert made(spans) == []
    assert await sent(rig, "dispatcher") == {"ann": b""}
