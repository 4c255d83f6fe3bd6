"""The Apprise channel: what is handed to the library, what is kept from it, and what its answers mean."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import apprise
import pytest
from apprise.manager_plugins import NotificationManager

from services.dispatcher.apprise import AppriseChannel
from services.dispatcher.delivery import Delivery, Letter, Permanent, Reason, Result, Retryable, Sent
from services.dispatcher.settings import AppriseSettings
from tests.integration.test_dispatcher_webhook import HttpReceiver
from tests.support.dispatcher_world import DIGEST, NOON, TENANT, id_of

SLACK = "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#general"


@asynccontextmanager
async def open_channel(**settings: Any) -> AsyncIterator[AppriseChannel]:
    """A channel, closed at the end."""
    channel = AppriseChannel(AppriseSettings(**settings))
    try:
        yield channel
    finally:
        await channel.close()


def letter(url: str, **fields: Any) -> Letter:
    """Something to say to whoever is behind a URL."""
    given: dict[str, Any] = {"subject": "Three flights are delayed", "text": "LH1, LH2 and LH3."}
    delivery = Delivery(
        tenant=TENANT,
        id=id_of("one"),
        digest_id=DIGEST,
        subscriber="ann",
        channel="apprise",
        address=url,
        **(given | fields),
    )
    return Letter(delivery=delivery, created_at=NOON, signed_at=NOON)


async def result_of(url: str, **settings: Any) -> Result:
    """What becomes of one notification."""
    async with open_channel(**settings) as channel:
        return await channel.send(letter(url))


async def test_a_notification_goes_through_a_service_of_the_library() -> None:
    """Subject and text arrive, where the settings allow the service."""
    receiver = HttpReceiver()
    async with receiver.listening() as url:
        result = await result_of(url.replace("http://", "json://"), schemas=("json",))
    assert isinstance(result, Sent)
    ((_, body),) = receiver.requests
    assert '"title": "Three flights are delayed"' in body
    assert '"message": "LH1, LH2 and LH3."' in body


async def test_what_the_service_refuses_is_tried_again_with_what_the_library_said() -> None:
    """Apprise knows only yes and no; its log is the reply."""
    from aiohttp import web

    receiver = HttpReceiver(web.Response(status=500))
    async with receiver.listening() as url:
        result = await result_of(url.replace("http://", "json://"), schemas=("json",))
    assert isinstance(result, Retryable)
    assert result.reason is Reason.DEFERRED
    assert "500" in result.reply
    assert not result.is_in_doubt


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("json://127.0.0.1:1/", Reason.DESTINATION_FORBIDDEN),
        ("https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ", Reason.DESTINATION_FORBIDDEN),
        ("syslog://", Reason.ADDRESS_INVALID),
        ("syslog://local", Reason.DESTINATION_FORBIDDEN),
        ("file:///etc/passwd", Reason.DESTINATION_FORBIDDEN),
        (f"{SLACK}?template=/etc/passwd", Reason.DESTINATION_FORBIDDEN),
        (f"{SLACK.replace('#', '')}?format=text&template=/etc/passwd", Reason.DESTINATION_FORBIDDEN),
        (f"{SLACK}?format=text&%74emplate=/etc/passwd", Reason.DESTINATION_FORBIDDEN),
        (f"{SLACK}?redirect=yes", Reason.DESTINATION_FORBIDDEN),
        (f"{SLACK}?verify=no", Reason.DESTINATION_FORBIDDEN),
        (f"{SLACK},json://10.0.0.1/", Reason.ADDRESS_INVALID),
        (f"{SLACK} json://10.0.0.1/", Reason.ADDRESS_INVALID),
        (f"{SLACK}\njson://10.0.0.1/", Reason.ADDRESS_INVALID),
        ("slack://short", Reason.ADDRESS_INVALID),
    ],
)
async def test_what_could_reach_a_file_or_a_private_host_never_gets_to_the_library(
    url: str, reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Services that are not allowed, parameters beyond the message's shape, several URLs in one."""

    def forbidden(*_: object, **__: object) -> bool:
        raise AssertionError

    monkeypatch.setattr(apprise.NotifyBase, "notify", forbidden)
    result = await result_of(url)
    assert isinstance(result, Permanent)
    assert result.reason is reason


def test_the_services_allowed_by_default_have_no_host_in_their_urls() -> None:
    """Whoever chooses such an address chooses an account, never where this process connects to."""
    manager = NotificationManager()  # type: ignore[no-untyped-call]
    for schema in AppriseSettings().schemas:
        plugin = manager[schema]
        assert not any("{host" in template for template in plugin.templates), schema
        assert "host" not in plugin.template_tokens, schema


async def test_a_notification_that_takes_too_long_is_in_doubt_and_one_that_waits_for_a_thread_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread cannot be stopped; but what has not begun is known not to have gone out."""
    is_open = threading.Event()
    slow = SimpleNamespace(notify=lambda **_: is_open.wait(30))
    monkeypatch.setattr(apprise.Apprise, "instantiate", lambda *_, **__: slow)
    async with open_channel(timeout=timedelta(milliseconds=200), concurrency=1) as channel:
        first, second = await asyncio.gather(channel.send(letter(SLACK)), channel.send(letter(SLACK)))
        is_open.set()
    assert first == Retryable(Reason.TIMEOUT, "no answer in time", is_in_doubt=True)
    assert second == Retryable(Reason.TIMEOUT, "no answer in time", is_in_doubt=False)


async def test_what_the_library_says_of_one_notification_is_not_told_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its log is shared by all threads; a reply has only what was said in its own."""
    both = threading.Barrier(2)

    def instantiate(url: str, **_: object) -> Any:
        def notify(**_: object) -> bool:
            both.wait(10)
            logging.getLogger("apprise").warning("no to %s", url[-1])
            both.wait(10)
            return False

        return SimpleNamespace(notify=notify)

    monkeypatch.setattr(apprise.Apprise, "instantiate", instantiate)
    async with open_channel() as channel:
        results = await asyncio.gather(*(channel.send(letter(f"slack://a/{name}")) for name in "xy"))
    assert [result.reply for result in results] == ["no to x", "no to y"]


async def test_a_delivery_without_words_is_not_sent() -> None:
    """Chats have nothing to show for it."""
    async with open_channel() as channel:
        result = await channel.send(letter(SLACK, subject="", text=""))
    assert result == Permanent(Reason.CONTENT_EMPTY, "there is nothing to say")
