"""Bad input to digest: a clear answer, nothing lost, and Bob, who has nothing to do with it, is told as ever."""

from collections.abc import AsyncIterator
from datetime import timedelta
from email.message import EmailMessage
from uuid import UUID

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2

from libs.errors import InvalidArgument
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

DAY = timedelta(days=1)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GIGABYTE = "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica that gives templates 300 ms; Ann and Bob, both told daily at 08:00."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database, render_timeout=timedelta(milliseconds=300)) as rig:
        await rig.put_type()
        await rig.put_type("bob.only")
        await rig.put_daily()
        for name in ("ann", "bob"):
            await rig.put_subscriber(name)
            await rig.subscribe(name, "daily", type="*")
        yield rig


async def day_passes(rig: Rig) -> dict[str, link_pb2.Delivery]:
    """Close what is due at the next 08:00; returns who was told what. Bob must have been, and by his own type."""
    rig.clock.at += DAY
    await rig.due()
    await rig.close()
    told = {delivery.subscriber: delivery for delivery in await rig.deliveries()}
    assert len(told) == len(await rig.deliveries())
    assert "untouched" in told["bob"].text
    assert await template_error(rig, told["bob"]) == ""
    return told


def for_bob(rig: Rig) -> link_pb2.Entry:
    """What Bob must be told whatever happens."""
    return rig.notification("bob", type="bob.only", entity="untouched")


async def template_error(rig: Rig, delivery: link_pb2.Delivery) -> str:
    """Why its template was not used, as Explain says it; empty if it was."""
    told = await rig.call("Explain", id=str(UUID(bytes=delivery.digest_id)))
    return " ".join(entry.details.get("template_error", "") for entry in told.entries).strip()


async def put_template(rig: Rig, body: str, subject: str = "") -> None:
    """How a delayed flight is written in HTML summaries."""
    one = pb.Template(id="flight.delayed", format=pb.FORMAT_HTML, style=pb.STYLE_SUMMARY, subject=subject, body=body)
    await rig.call("PutTemplate", template=one)


@pytest.mark.parametrize(
    ("body", "why"),
    [(ENDLESS, "took longer than"), (GIGABYTE, "larger than"), ("{{ 'x' * item.payload.n }}", "")],
    ids=["endless", "a gigabyte in pieces", "a gigabyte at once"],
)
async def test_a_template_that_never_ends_or_fills_the_memory_is_replaced(rig: Rig, body: str, why: str) -> None:
    """Ann's digest is written by the built-in template and says why; Bob's leaves in the same batch."""
    await put_template(rig, body)
    await rig.apply(rig.notification("ann", entity="UA1", payload={"n": 10**9}), for_bob(rig))
    told = await day_passes(rig)
    assert "UA1" in told["ann"].html
    error = await template_error(rig, told["ann"])
    assert error
    assert why in error
    assert await rig.ledger() == {("digested", ""): 2}


async def test_a_template_that_fills_the_memory_when_it_is_compiled_is_refused(rig: Rig) -> None:
    """What stands in it is computed at Put: refused there, and Bob is told as ever."""
    with pytest.raises(InvalidArgument) as caught:
        await put_template(rig, "{{ 'x' * 10 ** 9 }}")
    assert [one.field for one in caught.value.violations] == ["template.body"]
    await rig.apply(rig.notification("ann", entity="UA1"), for_bob(rig))
    told = await day_passes(rig)
    assert await template_error(rig, told["ann"]) == ""


async def test_a_subject_cannot_add_headers(rig: Rig) -> None:
    """Neither by a payload's line ends in a template's subject nor by an entity; a template's own are refused."""
    with pytest.raises(InvalidArgument) as caught:
        await put_template(rig, "a", subject="Hello\r\nBcc: everybody@example.com")
    assert [one.field for one in caught.value.violations] == ["template.subject"]
    layout = pb.Template(
        id="digest/daily",
        format=pb.FORMAT_HTML,
        style=pb.STYLE_SUMMARY,
        subject="{{ items[0].payload.title }}",
        body="{% for one in items %}{{ one.body }}{% endfor %}",
    )
    await rig.call("PutTemplate", template=layout)
    title = "Hello\r\nBcc: everybody@example.com\n\n<b>body</b>"
    await rig.apply(rig.notification("ann", payload={"title": title}), for_bob(rig))
    subject = (await day_passes(rig))["ann"].subject
    assert subject.splitlines() == [subject]
    assert subject.startswith("Hello")
    EmailMessage()["Subject"] = subject
    assert await rig.ledger() == {("digested", ""): 2}


@pytest.mark.parametrize("body", ["", "<p>{{ item.payload.note }} {{ item.entity }}</p>"], ids=["built-in", "tenant's"])
async def test_a_script_in_a_payload_is_shown_and_does_not_run(rig: Rig, body: str) -> None:
    """Escaped in HTML by the built-in template and by a tenant's, wherever the payload stands."""
    if body:
        await put_template(rig, body)
    payload = {"title": SCRIPT, "note": SCRIPT, SCRIPT: 1}
    await rig.apply(rig.notification("ann", entity=SCRIPT, payload=payload), for_bob(rig))
    html = (await day_passes(rig))["ann"].html
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<img" not in html
    assert await rig.ledger() == {("digested", ""): 2}


async def test_a_payload_that_violates_its_schema_is_answered_with_the_path(rig: Rig) -> None:
    """PAYLOAD_INVALID for its entry alone, suppressed on record; the others of the frame are told."""
    await rig.put_type(payload_schema='{"properties": {"delay": {"type": "integer"}}}')
    bad = rig.notification("ann", "bob", payload={"delay": "long"})
    good = rig.notification("ann", entity="UA2", payload={"delay": 5})
    applied = await rig.apply(bad, good, for_bob(rig))
    ((result,),) = applied.results.values()
    assert (result.index, result.error_reason) == (0, "PAYLOAD_INVALID")
    assert "delay" in result.error_message
    assert "UA2" in (await day_passes(rig))["ann"].text
    assert await rig.ledger() == {("suppressed", "payload_invalid"): 2, ("digested", ""): 2}


async def test_an_unknown_type_is_on_record_with_the_reason(rig: Rig) -> None:
    """Suppressed for each it names; the others of the frame are told."""
    await rig.apply(rig.notification("ann", "bob", type="unheard.of"), for_bob(rig))
    assert "ann" not in await day_passes(rig)
    assert await rig.ledger() == {("suppressed", "unknown_type"): 2, ("digested", ""): 1}


async def test_a_subscriber_without_an_address_is_on_record_with_the_reason(rig: Rig) -> None:
    """Gone before it came, or while it waited: suppressed; whoever else the same notification names is told."""
    await rig.apply(rig.notification("ann", "bob", entity="before"))
    await rig.put_subscriber("ann", email="")
    await rig.apply(rig.notification("ann", "bob", entity="after"), for_bob(rig))
    told = await day_passes(rig)
    assert "ann" not in told
    assert [word for word in ("before", "after") if word in told["bob"].text] == ["before", "after"]
    assert await rig.ledger() == {("suppressed", "no_address"): 2, ("digested", ""): 3}


async def test_a_zone_that_does_not_exist_is_refused_and_changes_nobody(rig: Rig) -> None:
    """The call names the field and stores none of its subscribers; their windows stay where they were."""
    await rig.apply(rig.notification("ann", entity="UA1"), for_bob(rig))
    before = await rig.windows()
    with pytest.raises(InvalidArgument) as caught:
        await rig.call("PutSubscribers", subscribers=[{"id": "bob"}, {"id": "ann", "zone": "Mars/Olympus_Mons"}])
    assert [one.field for one in caught.value.violations] == ["subscribers[1].zone"]
    assert await rig.windows() == before
    assert "UA1" in (await day_passes(rig))["ann"].text
    assert await rig.ledger() == {("digested", ""): 2}


@pytest.mark.parametrize("rule", [{"cron": "0 8 30 2 *"}, {"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"}])
async def test_a_cadence_that_never_occurs_is_refused_and_the_one_before_it_stays(
    rig: Rig, rule: dict[str, str]
) -> None:
    """30 February: the field is named, and what was put before goes on."""
    with pytest.raises(InvalidArgument) as caught:
        await rig.call("PutCadence", cadence=pb.Cadence(id="daily", aligned=pb.AlignedCadence(**rule)))
    assert [one.field for one in caught.value.violations] == [f"cadence.aligned.{next(iter(rule))}"]
    await rig.apply(rig.notification("ann", entity="UA1"), for_bob(rig))
    assert rig.clock.at == START
    assert "UA1" in (await day_passes(rig))["ann"].text
    assert await rig.ledger() == {("digested", ""): 2}
