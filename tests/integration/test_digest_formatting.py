"""Digests that business services format, over real HTTP and a real Postgres: well, badly, slowly or not at all."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from carillon.digest.v1 import digest_pb2 as pb

from libs.errors import InvalidArgument
from services.digest import metrics, store_rendering
from services.digest.rendering_jobs import Job, Rendered
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.condition_service import Behaviour, ConditionService, hangs_up, responds, waits_for
from tests.support.fixtures import OpenDatabase
from tests.support.formatting_service import writes

WAITING = """
    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"""

# Closing


@pytest.fixture
async def crm() -> AsyncIterator[ConditionService]:
    """A business service that formats well, until told otherwise."""
    async with ConditionService(writes).listening() as service:
        yield service


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase, crm: ConditionService) -> AsyncIterator[Rig]:
    """A replica with two subscribers, a type that crm formats and one that templates do."""
    migrate(postgres_url)
    settings = settings_for(crm)
    async with replica(postgres_url, open_database, **settings) as rig:
        await furnish(rig)
        yield rig


def settings_for(crm: ConditionService) -> dict[str, Any]:
    """Of a replica that asks it."""
    return {"formatting_services": {"crm": crm.url}, "formatting_timeout": "5s"}


async def furnish(rig: Rig) -> None:
    """The catalog."""
    await rig.put_type("order.placed", formatting_service="crm")
    await rig.put_type()
    await rig.put_subscriber("ann")
    await rig.put_subscriber("bob")


async def closed(rig: Rig, count: int) -> None:
    """Close what is closing, answers awaited, until `count` messages have been handed over."""
    async with asyncio.timeout(20):
        while True:
            rig.rung.clear()
            await rig.close()
            if len(await rig.deliveries()) >= count:
                return
            await rig.rung.wait()


async def fetched(rig: Rig, query: str, *arguments: object) -> Sequence[Any]:
    """Rows."""
    async with rig.db.transaction() as tx:
        cursor = await tx.raw.execute(query, arguments)
        return await cursor.fetchall() if cursor.description else []


async def test_a_message_is_written_by_the_service_and_addressed_by_us(rig: Rig, crm: ConditionService) -> None:
    """HTML and its text twin, in full when it is sent alone; the subject is ours."""
    await rig.apply(rig.notification("ann", type="order.placed", entity="order:1", payload={"title": "Order 1"}))
    await closed(rig, 1)
    (delivery,) = await rig.deliveries()
    assert "<b>crm</b> html full en order:1" in delivery.html
    assert "<b>crm</b> text full en order:1" in delivery.text
    assert delivery.subject == "Order 1"
    assert sorted(request.headers["Accept"] for request in crm.requests) == [
        "NotificationFormat/html; style=full",
        "NotificationFormat/text; style=full",
    ]
    assert await rig.ledger() == {("sent_alone", ""): 1}


async def test_a_digest_mixes_what_services_and_templates_write(rig: Rig) -> None:
    """In its order and its summary style; each item once."""
    await rig.put_daily()
    await rig.subscribe("ann", "daily", type="*", channel=pb.CHANNEL_EMAIL, format=pb.FORMAT_TEXT)
    await rig.apply(
        rig.notification("ann", type="order.placed", entity="order:1"),
        rig.notification("ann", type="order.placed", entity="order:2"),
        rig.notification("ann", entity="UA 1"),
    )
    rig.clock.at = rig.clock.at.replace(day=3, hour=8)
    await rig.due()
    await closed(rig, 1)
    (delivery,) = await rig.deliveries()
    for words in ("- UA 1", "<b>crm</b> text summary en order:1", "<b>crm</b> text summary en order:2"):
        assert delivery.text.count(words) == 1


async def test_what_was_answered_and_there_was_no_time_to_render_is_next(rig: Rig, crm: ConditionService) -> None:
    """Without waiting for its lease to end, and without asking again."""
    press = rig.closing._press

    class SlowPress:
        async def render(self, jobs: Sequence[Job]) -> list[Rendered]:
            return await press.render(jobs[:1])

    await rig.apply(*(rig.notification("ann", type="order.placed", entity=f"order:{one}") for one in range(3)))
    rig.closing._press = SlowPress()
    await closed(rig, 3)
    assert ["<b>crm</b>" in one.text for one in await rig.deliveries()] == [True] * 3
    assert len(crm.questions) == 2  # HTML and text.


async def test_scripts_of_a_service_reach_nobody(rig: Rig, crm: ConditionService) -> None:
    """What is left of them is harmless."""
    crm.behaviour = responds(body={"items": ["<script>alert(1)</script><b onclick=alert(1)>Hi</b></table>"]})
    await rig.apply(rig.notification("ann", type="order.placed"))
    await closed(rig, 1)
    (delivery,) = await rig.deliveries()
    assert "<b>Hi</b></div></td></tr>" in delivery.html
    assert "alert" not in delivery.html


@pytest.mark.parametrize("behaviour", [responds(500), responds(text="no"), hangs_up])
async def test_where_the_service_fails_templates_write_and_the_digest_says_why(
    rig: Rig, crm: ConditionService, behaviour: Behaviour
) -> None:
    """The tenant's own template before the built-in one; Explain tells."""
    crm.behaviour = behaviour
    template = pb.Template(id="order.placed", format=pb.FORMAT_TEXT, style=pb.STYLE_FULL, body="By our template.\n")
    await rig.call("PutTemplate", template=template)
    before = metrics.FORMATTED_ITEMS.labels("fallback")._value.get()
    await rig.apply(rig.notification("ann", type="order.placed", entity="order:1"))
    await closed(rig, 1)
    (delivery,) = await rig.deliveries()
    assert "By our template." in delivery.text
    assert "order:1" in delivery.html
    assert metrics.FORMATTED_ITEMS.labels("fallback")._value.get() == before + 2
    ((error,),) = await fetched(rig, "SELECT template_error FROM digest")
    assert error.startswith("crm formatted 0 of 2, templates the rest: it answered") or "disconnected" in error
    (digest,) = (await rig.call("ListDigests")).digests
    told = await rig.call("Explain", id=digest.id)
    assert error in [one.details.get("template_error") for one in told.entries]


async def test_a_slow_service_keeps_only_its_own_waiting(rig: Rig, crm: ConditionService) -> None:
    """What templates write goes out meanwhile; nothing is locked while the service thinks."""
    gate = asyncio.Event()
    crm.behaviour = waits_for(gate, writes)
    await rig.apply(*(rig.notification("ann", type="order.placed", entity=f"order:{one}") for one in range(3)))
    await rig.apply(rig.notification("bob"))
    await rig.close()
    await crm.asked(1)
    assert [one.subscriber for one in await rig.deliveries()] == ["bob"]
    (told,) = (await rig.call("Explain", id="ann")).entries[-1:]
    assert "waits for business services to format its items" in told.sentence
    async with rig.db.transaction() as tx:  # Nothing is locked.
        cursor = await tx.raw.execute("SELECT id FROM digest_window WHERE state = 2 FOR UPDATE NOWAIT")
        assert len(await cursor.fetchall()) == 3
    gate.set()
    await closed(rig, 4)
    assert await rig.ledger() == {("sent_alone", ""): 4}


async def test_what_is_cancelled_while_the_service_thinks_is_not_told(rig: Rig, crm: ConditionService) -> None:
    """Its fragment comes too late."""
    gate = asyncio.Event()
    crm.behaviour = waits_for(gate, writes)
    await rig.apply(rig.notification("ann", type="order.placed", entity="order:1"))
    await rig.apply(rig.notification("bob", type="order.placed", entity="order:2"))
    await rig.close()
    await crm.asked(1)
    await rig.apply(rig.cancel("order:1"))
    gate.set()
    await closed(rig, 1)
    assert [one.subscriber for one in await rig.deliveries()] == ["bob"]
    assert await rig.ledger() == {("sent_alone", ""): 1, ("cancelled", ""): 1}


async def test_an_item_that_goes_to_many_is_asked_about_once(rig: Rig, crm: ConditionService) -> None:
    """Whoever shares language and zone shares the answer; later ones are closed without asking."""
    await rig.apply(rig.notification("ann", "bob", type="order.placed", entity="order:1", one_id=None))
    await closed(rig, 2)
    assert len(crm.questions) == 2  # HTML and text.
    assert len(await rig.deliveries()) == 2


async def test_tenants_do_not_share_answers(rig: Rig, crm: ConditionService) -> None:
    """Even of the same notification; a type of the same name that names no service is not formatted."""

    async def names_tenant(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        return web.json_response({"items": [f"for {asked['tenant']}" for _ in asked["items"]]})

    crm.behaviour = names_tenant
    first = rig.notification("ann", type="order.placed", entity="order:1")
    await rig.apply(first)
    await closed(rig, 1)
    for number, (tenant, service) in enumerate({"globex": "crm", "initech": ""}.items(), start=2):
        rig.tenant = tenant
        await rig.put_type("order.placed", formatting_service=service)
        await rig.put_subscriber("ann")
        entry = rig.notification("ann", type="order.placed", entity="order:1")
        entry.notification.id = first.notification.id
        await rig.apply(entry)
        await closed(rig, number)
    found = {one.text.split("\n")[0] for one in await rig.deliveries()}
    assert found == {"for acme", "for globex", "order:1"}


async def test_what_one_replica_asks_about_another_leaves_alone_until_the_lease_ends(
    rig: Rig, crm: ConditionService, postgres_url: str, open_database: OpenDatabase
) -> None:
    """Then it asks itself, so that a dead process holds nothing up; both answers make one message."""
    gate = asyncio.Event()
    crm.behaviour = waits_for(gate, writes)
    await rig.apply(rig.notification("ann", type="order.placed", entity="order:1"))
    await rig.close()
    await crm.asked(2)
    settings = settings_for(crm)
    async with replica(postgres_url, open_database, **settings) as other:
        await other.close()
        assert len(crm.questions) == 2
        await fetched(rig, "UPDATE digest_window SET asked_until = clock_timestamp() - interval '1 s'")
        await other.close()
        await crm.asked(4)
        gate.set()
        await closed(other, 1)
        async with asyncio.timeout(10):
            await rig.rung.wait()
        assert await rig.close() == 0
    assert len(await rig.deliveries()) == 1


async def test_a_process_that_ends_gives_back_what_it_has_set_aside(
    rig: Rig, crm: ConditionService, postgres_url: str, open_database: OpenDatabase
) -> None:
    """Nobody waits for its lease."""
    crm.behaviour = waits_for(asyncio.Event(), writes)
    await rig.apply(rig.notification("ann", type="order.placed", entity="order:1"))
    settings = settings_for(crm)
    async with replica(postgres_url, open_database, **settings) as other:
        await other.close()
        await crm.asked(2)
        assert await fetched(rig, "SELECT 1 FROM digest_window WHERE asked_until IS NOT NULL")
    assert not await fetched(rig, "SELECT 1 FROM digest_window WHERE asked_until IS NOT NULL")
    crm.behaviour = writes
    await closed(rig, 1)


async def test_windows_beyond_what_may_be_asked_wait_their_turn(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of few items, of which one fits at a time: all leave, none twice."""
    monkeypatch.setattr("services.digest.loops_aside._GROUP_ITEMS", 3)
    monkeypatch.setattr("services.digest.loops_aside.MOST_ITEMS", 3)
    await rig.apply(*(rig.notification("ann", type="order.placed", entity=f"order:{one}") for one in range(20)))
    await closed(rig, 20)
    assert await rig.ledger() == {("sent_alone", ""): 20}
    assert metrics.FORMATTING_WINDOWS._value.get() == 0


async def test_who_waits_for_windows_takes_them_in_the_order_of_all_others(
    rig: Rig, postgres_url: str, open_database: OpenDatabase
) -> None:
    """Rolling ones last, however old: a cancel that holds the other one may come for the rolling one."""
    await rig.put_rolling(duration=timedelta(hours=1), maximum_items=1)
    await rig.put_external()
    await rig.subscribe("ann", "rolling", "rebooking", type="order.placed")
    await rig.apply(rig.notification("ann", type="order.placed"))
    await rig.apply(rig.trigger("rebooking", rig.clock.at))
    await fetched(rig, "UPDATE digest_window SET id = uuidv7(), state = 2 WHERE kind = 3")
    rows = await fetched(rig, "SELECT id, kind FROM digest_window ORDER BY id")
    assert [kind for _, kind in rows] == [4, 3]
    (first, last), db = [one_id for one_id, _ in rows], await open_database("digest")

    async def claim() -> None:
        async with rig.db.transaction() as tx:
            await store_rendering.claim_these(tx, {"acme"}, [first, last], now=rig.clock.at)

    async with asyncio.TaskGroup() as tasks, db.transaction() as tx:
        await tx.raw.execute("SELECT FROM digest_window WHERE id = %s FOR NO KEY UPDATE", (last,))
        tasks.create_task(claim())
        async with asyncio.timeout(10):
            while not await fetched(rig, WAITING):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await tx.raw.execute("SELECT FROM digest_window WHERE id = %s FOR NO KEY UPDATE NOWAIT", (first,))


# Previews and the catalog


async def test_previews_show_what_services_write(rig: Rig, crm: ConditionService) -> None:
    """An open window's; with a word when they did not."""
    await rig.put_daily()
    await rig.subscribe("ann", "daily", type="*")
    await rig.apply(rig.notification("ann", type="order.placed", entity="order:1"))
    (window,) = await rig.windows()
    preview = await rig.call("PreviewDigest", window_id=window.id)
    assert "<b>crm</b> html summary en order:1" in preview.html
    assert preview.template_error == ""
    crm.behaviour = responds(400)
    await rig.apply(rig.notification("ann", type="order.placed", entity="order:2"))
    preview = await rig.call("PreviewDigest", window_id=window.id)
    assert "order:2" in preview.html
    assert preview.template_error.startswith("crm formatted 2 of 4, templates the rest: it answered 400")


async def test_a_layout_is_tried_with_items_that_services_write(rig: Rig, crm: ConditionService) -> None:
    """A type's own template is tried as it is: it is what stands in."""
    layout = pb.Template(
        id="digest", format=pb.FORMAT_TEXT, body="{% for item in items %}* {{ item.body }}{% endfor %}"
    )
    samples = [
        pb.SampleItem(type="order.placed", entity="order:1"),
        pb.SampleItem(type="flight.delayed", entity="UA 1"),
    ]
    answer = await rig.call("PreviewTemplate", template=layout, items=samples)
    assert "* <b>crm</b> text full en order:1" in answer.text
    assert "* UA 1" in answer.text
    own = pb.Template(id="order.placed", format=pb.FORMAT_TEXT, body="mine: {{ item.entity }}")
    answer = await rig.call("PreviewTemplate", template=own, items=samples[:1])
    assert "mine: order:1" in answer.text
    crm.behaviour = responds(400)
    layout.body = "changed {{ items[0].body }}"
    answer = await rig.call("PreviewTemplate", template=layout, items=[pb.SampleItem(type="order.placed")])
    assert "it answered 400" in answer.template_error


async def test_a_type_keeps_its_service(rig: Rig) -> None:
    """It comes back; one that is not registered is refused, and the answer names those that are."""
    found = (await rig.call("GetNotificationType", id="order.placed")).notification_type
    assert found.formatting_service == "crm"
    with pytest.raises(InvalidArgument, match="'crn' is not registered with digest \\(crm\\)"):
        await rig.put_type("x", formatting_service="crn")
