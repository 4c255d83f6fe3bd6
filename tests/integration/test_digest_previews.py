"""What previews show: templates on samples, and windows as they would go out now."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from libs.errors import NotFound
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """An empty replica."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        yield rig


async def test_a_template_is_previewed_with_samples_and_nothing_is_stored(rig: Rig) -> None:
    """One that is given, with the caller's item or built-in ones; in the reader's zone and language."""
    given = pb.Template(
        id="flight.delayed", format=pb.FORMAT_TEXT, body="{{ item.payload.gate }} {{ item.time | time }}"
    )
    at = Timestamp(seconds=1_767_225_600)
    items = [pb.SampleItem(payload='{"gate": "C4", "title": "Late"}', occur_time=at)]
    answer = await rig.call("PreviewTemplate", template=given, items=items, zone="Asia/Tokyo", locale="de")
    assert answer.text.startswith("C4 09:00")
    assert (answer.subject, answer.parts, answer.template_error, answer.html) == ("Late", 1, "", "")
    with pytest.raises(NotFound):
        await rig.call("GetTemplate", id="flight.delayed", format=pb.FORMAT_TEXT)
    layout = pb.Template(
        id="digest/daily", style=pb.STYLE_SUMMARY, body="<p>{{ digest.count }} {{ items[1].title }}</p>"
    )
    answer = await rig.call("PreviewTemplate", template=layout)
    assert (answer.html, answer.template_error) == ("<p>3 Order 1008 was placed</p>", "")


async def test_a_preview_of_a_stored_template_that_fails_shows_what_would_go_out(rig: Rig) -> None:
    """JSON that is none: the built-in one's, with the reason; a template that is not there is not found."""
    one = pb.Template(id="t", format=pb.FORMAT_JSON, style=pb.STYLE_SUMMARY, body='{"a": {{ item.title }}}')
    await rig.call("PutTemplate", template=one)
    answer = await rig.call("PreviewTemplate", template=pb.Template(id="t", format=one.format, style=one.style))
    assert "malformed" in answer.template_error
    assert [item["payload"]["total"] for item in json.loads(answer.text)["items"]] == [1234.5, 99.9, 7]
    with pytest.raises(NotFound):
        await rig.call("PreviewTemplate", template=pb.Template(id="t"))


async def test_a_preview_shows_an_open_window_and_changes_nothing(rig: Rig) -> None:
    """As it would go out now; not for closed windows or other tenants."""
    await rig.put_daily()
    await rig.put_type(default_cadence="daily")
    await rig.put_subscriber("ann")
    await rig.apply(rig.notification("ann", entity="UA1"))
    (window,) = await rig.windows()
    preview = await rig.call("PreviewDigest", window_id=window.id)
    assert (preview.subject, preview.item_count) == ("Daily: 1 × Flight delayed", 1)
    assert "UA1" in preview.html
    assert "UA1" in preview.text
    assert await rig.windows() == [window]
    rig.tenant = "other"
    with pytest.raises(NotFound):
        await rig.call("PreviewDigest", window_id=window.id)


async def test_a_preview_leaves_out_what_has_expired(rig: Rig) -> None:
    """It would not go out any more; with nothing else in the window there is nothing to show."""
    await rig.put_daily()
    await rig.put_type(default_cadence="daily")
    await rig.put_subscriber("ann")
    expires = rig.clock.at + timedelta(minutes=5)
    await rig.apply(rig.notification("ann", entity="UA1", expires=expires))
    (window,) = await rig.windows()
    rig.clock.at = expires - timedelta(microseconds=1)
    assert (await rig.call("PreviewDigest", window_id=window.id)).item_count == 1
    rig.clock.at = expires
    assert await rig.call("PreviewDigest", window_id=window.id) == pb.PreviewDigestResponse()
    await rig.apply(rig.notification("ann", entity="UA2"))
    preview = await rig.call("PreviewDigest", window_id=window.id)
    assert (preview.subject, preview.item_count) == ("Daily: 1 × Flight delayed", 1)
    assert "UA1" not in preview.html
    assert "UA2" in preview.html
