"""DigestService's own RPCs: what is stored comes back, what is wrong is named, what is in use stays."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from carillon.digest.v1 import digest_pb2 as pb
from carillon.digest.v1 import digest_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from libs.errors import FailedPrecondition, InvalidArgument, NotFound
from libs.rpc import build_server
from libs.settings import AuthSettings, GrpcSettings
from services.digest.rpc import servicer
from tests.integration.digest_rig import START, Rig, migrate, replica
from tests.support.fixtures import OpenDatabase


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """An empty replica."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        yield rig


async def test_what_is_put_comes_back(rig: Rig) -> None:
    """Types, subscribers, cadences, subscriptions and templates, with their defaults filled in."""
    await rig.put_daily(zone="Europe/Berlin")
    await rig.put_external()
    await rig.put_type("a/b", default_cadence="daily", default_channel=pb.CHANNEL_WEBHOOK, description="d")
    found = (await rig.call("GetNotificationType", id="a/b")).notification_type
    assert (found.default_cadence, found.default_channel, found.description) == ("daily", pb.CHANNEL_WEBHOOK, "d")
    await rig.put_subscriber("ann", "")
    assert (await rig.call("GetSubscriber", id="ann")).subscriber == pb.Subscriber(
        id="ann", zone="UTC", locale="en", email="ann@example.com"
    )
    await rig.subscribe("ann", "daily", "off", type="a/*", topic="x", channel=pb.CHANNEL_LOG)
    subscription = (await rig.call("GetSubscription", id="ann/a/*/x")).subscription
    assert [(one.cadence, one.channel) for one in subscription.choices] == [("daily", 4), ("off", 4)]
    cadence = (await rig.call("GetCadence", id="daily")).cadence
    assert (cadence.aligned.cron, cadence.aligned.zone) == ("0 8 * * *", "Europe/Berlin")
    external = (await rig.call("GetCadence", id="rebooking")).cadence.external
    assert (external.batch, external.fallback_after) == ("rebooking", Duration(seconds=2 * 86400))
    template = pb.Template(id="a/b", format=pb.FORMAT_TEXT, style=pb.STYLE_FULL, subject="s", body="{{ item.title }}")
    await rig.call("PutTemplate", template=template)
    answer = await rig.call("GetTemplate", id="a/b", format=pb.FORMAT_TEXT, style=pb.STYLE_FULL)
    assert answer.template == template


async def test_putting_again_replaces_and_deleting_twice_is_fine(rig: Rig) -> None:
    """Idempotent by nature; a subscription's choices are replaced whole."""
    await rig.put_subscriber("ann")
    for cadences in (("immediate", "off"), ("immediate",)):
        await rig.subscribe("ann", *cadences)
    (one,) = (await rig.call("ListSubscriptions", subscriber="ann")).subscriptions
    assert [choice.cadence for choice in one.choices] == ["immediate"]
    for _ in range(2):
        await rig.call("DeleteSubscription", id=one.id)
    with pytest.raises(NotFound):
        await rig.call("GetSubscription", id=one.id)


async def test_lists_come_in_pages(rig: Rig) -> None:
    """Ordered by id, each once; a token is good for its own filters only."""
    for number in range(5):
        await rig.put_subscriber(f"s{number}")
        await rig.subscribe(f"s{number}", "immediate")
    seen: list[str] = []
    token = ""
    while True:
        page = await rig.call("ListSubscribers", page_size=2, page_token=token)
        seen += [one.id for one in page.subscribers]
        if not (token := page.next_page_token):
            break
    assert seen == ["s0", "s1", "s2", "s3", "s4"]
    page = await rig.call("ListSubscriptions", page_size=2)
    with pytest.raises(InvalidArgument, match="page_token"):
        await rig.call("ListSubscriptions", page_size=2, page_token=page.next_page_token, subscriber="s1")


async def test_templates_and_digests_come_in_pages_too(rig: Rig) -> None:
    """Cursors of several columns."""
    await rig.put_type()
    await rig.put_subscriber("ann")
    for locale in ("", "de", "en"):
        await rig.call("PutTemplate", template=pb.Template(id="t", format=pb.FORMAT_TEXT, locale=locale, body="x"))
        await rig.apply(rig.notification("ann"))
        await rig.close()
    first = await rig.call("ListTemplates", page_size=2)
    rest = await rig.call("ListTemplates", page_size=2, page_token=first.next_page_token)
    assert [one.locale for one in [*first.templates, *rest.templates]] == ["", "de", "en"]
    newest = await rig.call("ListDigests", page_size=2)
    oldest = await rig.call("ListDigests", page_size=2, page_token=newest.next_page_token)
    assert len({one.id for one in [*newest.digests, *oldest.digests]}) == 3


async def test_what_does_not_exist_cannot_be_named(rig: Rig) -> None:
    """FAILED_PRECONDITION says what must be put first."""
    await rig.put_subscriber("ann")
    with pytest.raises(FailedPrecondition, match="no cadence daily"):
        await rig.subscribe("ann", "daily")
    with pytest.raises(FailedPrecondition, match="no subscriber bob"):
        await rig.subscribe("bob", "immediate")
    with pytest.raises(FailedPrecondition, match="no cadence daily"):
        await rig.put_type(default_cadence="daily")


async def test_what_is_in_use_cannot_be_deleted(rig: Rig) -> None:
    """A cadence of a subscription or type, a type whose items wait; once free, both go."""
    await rig.put_daily()
    await rig.put_type(default_cadence="daily")
    await rig.put_subscriber("ann")
    await rig.apply(rig.notification("ann"))
    with pytest.raises(FailedPrecondition, match=r"type flight\.delayed uses"):
        await rig.call("DeleteCadence", id="daily")
    with pytest.raises(FailedPrecondition, match="wait in open windows"):
        await rig.call("DeleteNotificationType", id="flight.delayed")
    rig.clock.at = START + timedelta(days=1)
    await rig.due()
    await rig.close()
    await rig.call("DeleteNotificationType", id="flight.delayed")
    await rig.call("DeleteCadence", id="daily")


@pytest.mark.parametrize(
    ("method", "fields", "field"),
    [
        ("PutCadence", {"cadence": pb.Cadence(id="c", rolling=pb.RollingCadence())}, "cadence.rolling.duration"),
        ("PutCadence", {"cadence": pb.Cadence(id="c")}, "cadence"),
        ("PutCadence", {"cadence": pb.Cadence(id="off", aligned=pb.AlignedCadence(cron="0 8 * * *"))}, "cadence.id"),
        (
            "PutCadence",
            {"cadence": pb.Cadence(id="c", aligned=pb.AlignedCadence(cron="0 8 * *"))},
            "cadence.aligned.cron",
        ),
        (
            "PutCadence",
            {"cadence": pb.Cadence(id="c", aligned=pb.AlignedCadence(cron="0 8 31 2 *"))},
            "cadence.aligned.cron",
        ),
        (
            "PutCadence",
            {"cadence": pb.Cadence(id="c", aligned=pb.AlignedCadence(rrule="FREQ=DAILY;COUNT=3"))},
            "cadence.aligned.rrule",
        ),
        (
            "PutCadence",
            {"cadence": pb.Cadence(id="c", aligned=pb.AlignedCadence(cron="0 8 * * *", zone="Mars/Base"))},
            "cadence.aligned.zone",
        ),
        ("PutCadence", {"cadence": pb.Cadence(id="c", external=pb.ExternalCadence())}, "cadence.external.batch"),
        ("PutNotificationType", {"notification_type": {"id": "A B", "name": "n"}}, "notification_type.id"),
        (
            "PutNotificationType",
            {"notification_type": {"id": "a", "name": "n", "payload_schema": "{"}},
            "notification_type.payload_schema",
        ),
        (
            "PutNotificationType",
            {"notification_type": {"id": "a", "name": "n", "retention": Duration(seconds=86399)}},
            "notification_type.retention",
        ),
        ("PutSubscribers", {"subscribers": []}, "subscribers"),
        ("PutSubscribers", {"subscribers": [{"id": "a", "zone": "Nowhere"}]}, "subscribers[0].zone"),
        ("PutSubscribers", {"subscribers": [{"id": "a", "email": "a@b\r\nBcc: c"}]}, "subscribers[0].email"),
        ("PutSubscribers", {"subscribers": [{"id": "a"}, {"id": "a"}]}, "subscribers[1].id"),
        ("PutSubscribers", {"subscribers": [{"id": "a", "email": "a" * 250 + "@b.example"}]}, "subscribers[0].email"),
        ("PutSubscribers", {"subscribers": [{"id": "a", "apprise_url": "slack"}]}, "subscribers[0].apprise_url"),
        ("PutCadence", {"cadence": pb.Cadence(id="c", aligned=pb.AlignedCadence(cron=""))}, "cadence.aligned.cron"),
        (
            "PutSubscribers",
            {"subscribers": [{"id": "a", "quiet_hours": [pb.QuietHours()]}]},
            "subscribers[0].quiet_hours[0].from_time_of_day",
        ),
        ("PutSubscribers", {"subscribers": [{"id": str(number)} for number in range(1001)]}, "subscribers"),
        (
            "PutSubscriptions",
            {"subscriptions": [{"id": "s", "subscriber": "a", "type": "a*b", "choices": [{"cadence": "off"}]}]},
            "subscriptions[0].type",
        ),
        (
            "PutSubscriptions",
            {"subscriptions": [{"id": "s", "subscriber": "a", "type": "*", "choices": []}]},
            "subscriptions[0].choices",
        ),
        (
            "PutSubscriptions",
            {
                "subscriptions": [
                    {"id": "s", "subscriber": "a", "type": "*", "filter": "nope", "choices": [{"cadence": "off"}]}
                ]
            },
            "subscriptions[0].filter",
        ),
        ("PutTemplate", {"template": {"id": "t", "body": "a\n{% for %}"}}, "template.body"),
        ("PutTemplate", {"template": {"id": "t", "subject": "a\nb", "body": "a"}}, "template.subject"),
        ("PutTemplate", {"template": {"id": "t", "format": pb.FORMAT_JSON, "body": "{% if %}"}}, "template.body"),
        ("PreviewTemplate", {"template": {"id": "t", "body": "{% if %}"}}, "template.body"),
        ("PreviewTemplate", {"template": {"id": "t"}, "zone": "Mars/Olympus"}, "zone"),
        ("PreviewTemplate", {"template": {"id": "t", "body": "a"}, "items": [{"payload": "[1]"}]}, "items[0].payload"),
        ("GetDigest", {"id": "no-uuid"}, "id"),
        ("ListWindows", {"page_size": 1001}, "page_size"),
        ("ListWindows", {"states": [9]}, "states"),
    ],
)
async def test_what_is_wrong_is_refused_and_named(rig: Rig, method: str, fields: dict[str, Any], field: str) -> None:
    """INVALID_ARGUMENT with the field's path."""
    with pytest.raises(InvalidArgument) as caught:
        await rig.call(method, **fields)
    assert field in [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ({"channel": pb.CHANNEL_APPRISE, "format": pb.FORMAT_HTML}, "format"),
        ({"channel": pb.CHANNEL_WEBHOOK, "format": pb.FORMAT_HTML}, "format"),
        ({"channel": pb.CHANNEL_EMAIL, "format": pb.FORMAT_JSON}, "format"),
        ({"format": pb.FORMAT_TEXT}, "channel"),
        ({"channel": 9}, "channel"),
        ({"style": 9}, "style"),
    ],
)
async def test_a_choice_that_could_not_be_sent_is_refused(rig: Rig, choice: dict[str, Any], field: str) -> None:
    """A webhook takes JSON only, an email none, Apprise text."""
    await rig.put_subscriber("ann")
    with pytest.raises(InvalidArgument) as caught:
        await rig.subscribe("ann", "immediate", **choice)
    assert [violation.field for violation in caught.value.violations] == [f"subscriptions[0].choices[0].{field}"]


async def test_what_leaves_through_apprise_is_text_to_the_subscribers_url(rig: Rig) -> None:
    """Alone, by the type's channel, and in a digest, by a choice's."""
    await rig.put_type("room.alarm", default_channel=pb.CHANNEL_APPRISE)
    await rig.put_type()
    await rig.put_external()
    await rig.put_subscriber("ann", apprise_url="tgram://123/456")
    await rig.subscribe("ann", "rebooking", channel=pb.CHANNEL_APPRISE)
    await rig.apply(rig.notification("ann", type="room.alarm", entity="room:1"), rig.notification("ann", entity="UA 1"))
    await rig.apply(rig.trigger("rebooking", rig.clock.at))
    await rig.close()
    found = await rig.deliveries()
    assert [(one.channel, one.address, one.html, one.json) for one in found] == [
        ("apprise", "tgram://123/456", "", "")
    ] * 2
    assert sorted(text for text in ("room:1", "UA 1") for one in found if text in one.text) == ["UA 1", "room:1"]


async def test_an_answer_stays_below_what_clients_take(rig: Rig) -> None:
    """4 MiB: a digest's later items come without their payloads, and of large templates a page has fewer."""
    await rig.put_daily()
    await rig.put_type(default_cadence="daily")
    await rig.put_subscriber("ann")
    for number in range(60):
        await rig.apply(rig.notification("ann", payload={"n": number, "text": "x" * 60_000}))
    rig.clock.at = START + timedelta(days=1)
    await rig.due()
    await rig.close()
    (digest,) = (await rig.call("ListDigests")).digests
    answer = await rig.call("GetDigest", id=digest.id)
    assert (len(answer.items), len([one for one in answer.items if one.payload])) == (60, 52)
    assert answer.ByteSize() < 4 << 20
    for number in range(13):
        one = pb.Template(id=f"t{number:02}", format=pb.FORMAT_TEXT, body="x" * (256 << 10))
        await rig.call("PutTemplate", template=one)
    page = await rig.call("ListTemplates", page_size=1_000)
    assert page.ByteSize() < 4 << 20
    rest = await rig.call("ListTemplates", page_token=page.next_page_token)
    assert [one.id for one in [*page.templates, *rest.templates]] == [f"t{number:02}" for number in range(13)]


async def test_a_template_error_says_where(rig: Rig) -> None:
    """Line and reason, as the contract promises."""
    with pytest.raises(InvalidArgument, match="line 2"):
        await rig.call("PutTemplate", template=pb.Template(id="t", body="a\n{% for %}"))


async def test_a_tenants_template_is_used_and_a_failing_one_blocks_nobody(rig: Rig) -> None:
    """Ann's mail has the template's words; a template that fails later falls back, and the digest says so."""
    await rig.put_type()
    await rig.put_subscriber("ann")

    async def put_template(body: str) -> None:
        one = pb.Template(id="flight.delayed", format=pb.FORMAT_TEXT, style=pb.STYLE_FULL, body=body)
        await rig.call("PutTemplate", template=one)

    await put_template("Mind {{ item.entity }}!")
    await rig.apply(rig.notification("ann", entity="UA1"))
    await rig.close()
    await put_template("{{ 1 / item.payload.n }}")
    await rig.apply(rig.notification("ann", entity="UA2", payload={"n": 0}))
    await rig.close()
    first, second = await rig.deliveries()
    assert "Mind UA1!" in first.text
    assert "UA2" in second.text
    told = [
        entry
        for digest in (await rig.call("ListDigests")).digests  # Closed at one instant, so in any order.
        for entry in (await rig.call("Explain", id=digest.id)).entries
    ]
    assert "division by zero" in "".join(entry.details.get("template_error", "") for entry in told)


async def test_windows_are_listed_by_subscriber_cadence_and_state(rig: Rig) -> None:
    """What is waiting, page by page."""
    await rig.put_daily()
    await rig.put_type(default_cadence="daily")
    names = ["ann", "bob", "cid"]
    for name in names:
        await rig.put_subscriber(name)
    await rig.apply(rig.notification(*names))
    first = await rig.call("ListWindows", page_size=2, cadence="daily")
    rest = await rig.call("ListWindows", page_size=2, cadence="daily", page_token=first.next_page_token)
    assert sorted(window.subscriber for window in [*first.windows, *rest.windows]) == names
    assert [window.subscriber for window in (await rig.call("ListWindows", subscriber="bob")).windows] == ["bob"]
    assert (await rig.call("ListWindows", states=[pb.WINDOW_STATE_CLOSED])).windows == []


async def test_over_grpc_an_error_arrives_with_its_field(rig: Rig) -> None:
    """The whole way: server, interceptor, status details; and Explain of what nobody knows is empty."""
    server = build_server(
        GrpcSettings(), auth=AuthSettings(), servicers=[servicer(rig.rpc)], registry=CollectorRegistry()
    )
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        stub = digest_pb2_grpc.DigestServiceStub(channel)
        await stub.PutNotificationType(
            pb.PutNotificationTypeRequest(notification_type=pb.NotificationType(id="a", name="A"))
        )
        assert (await stub.Explain(pb.ExplainRequest(id="flight-7"))).entries == []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PutNotificationType(pb.PutNotificationTypeRequest())
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert "notification_type.id" in [violation.field for violation in bad.field_violations]
