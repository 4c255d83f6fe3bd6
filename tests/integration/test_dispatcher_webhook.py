"""The webhook channel against a real HTTP receiver that refuses, redirects, drops and stalls on command; and SSRF."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from libs.errors import SettingsError
from services.dispatcher.delivery import Delivery, Letter, Permanent, Reason, Result, Retryable, Sent
from services.dispatcher.settings import WebhookSettings
from services.dispatcher.webhook import WebhookChannel
from tests.support.dispatcher_world import DIGEST, NOON, TENANT, id_of

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NEW_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
OTHERS_SECRET = "whsec_bm90IG11Y2ggb2YgYSBzZWNyZXQgaXMgaXQ="
BODY = '{"subject": "Grüße", "items": [1, 2]}'

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpReceiver:
    """Keeps requests; answers as scripted, in the end always 200."""

    def __init__(self, *answers: Answer | web.Response) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[dict[str, str], str]] = []
        self.connections: set[object] = set()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.connections.add(request.transport)
        self.requests.append((dict(request.headers), await request.text()))
        answer = self.answers.pop(0) if self.answers else web.Response(text="thanks")
        return answer if isinstance(answer, web.Response) else await answer(request)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Listen, and yield the URL that leads here."""
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        finally:
            await runner.cleanup()


async def drop(request: web.Request) -> web.StreamResponse:
    """Cut the connection instead of answering."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def stall(_request: web.Request) -> web.StreamResponse:
    """Answer long after everybody has given up."""
    await asyncio.sleep(30)
    return web.Response()


async def endless(request: web.Request) -> web.StreamResponse:
    """An answer that never ends."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"x" * 65536)


@asynccontextmanager
async def open_channel(**overrides: Any) -> AsyncIterator[WebhookChannel]:
    """A channel, closed at the end; loopback is allowed unless overridden."""
    given: dict[str, Any] = {"allow_private": True, "timeout": timedelta(seconds=5)}
    channel = WebhookChannel(WebhookSettings(**(given | overrides)), connections=10)
    try:
        yield channel
    finally:
        await channel.close()


def letter(url: str, name: str = "one", *, body: str = BODY, tenant: str = TENANT) -> Letter:
    """A delivery to a webhook, signed now: receivers check that against their own clock."""
    delivery = Delivery(
        tenant=tenant,
        id=id_of(name),
        digest_id=DIGEST,
        subscriber="ann",
        channel="webhook",
        address=url,
        subject="",
        json=body,
    )
    return Letter(delivery=delivery, created_at=NOON, signed_at=datetime.now(UTC))


async def result_of(*answers: Answer | web.Response, **overrides: Any) -> Result:
    """What one answer leads to."""
    async with HttpReceiver(*answers).listening() as url, open_channel(**overrides) as channel:
        return await channel.send(letter(url))


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    """A file with one secret."""
    file = tmp_path / "secrets"
    file.write_text(f"{SECRET}\n")
    return file


async def test_the_reference_library_accepts_our_signature(secret_file: Path) -> None:
    """Standard Webhooks' own library verifies body, id and time; with another secret or body it does not."""
    receiver = HttpReceiver()
    async with receiver.listening() as url, open_channel(secret_file=secret_file) as channel:
        assert await channel.send(letter(url)) == Sent("200 thanks")
    ((headers, body),) = receiver.requests
    assert Webhook(SECRET).verify(body, headers) == {"subject": "Grüße", "items": [1, 2]}
    assert body == BODY
    with pytest.raises(WebhookVerificationError):
        Webhook(NEW_SECRET).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body + " ", headers)
    assert headers["webhook-id"] == headers["X-Carillon-Delivery"] == str(id_of("one"))
    assert headers["X-Carillon-Digest"] == str(DIGEST)
    assert headers["Content-Type"] == "application/json"


async def test_secrets_can_be_rotated_without_a_restart(secret_file: Path) -> None:
    """While two secrets are in the file both sign, so receivers may change theirs at any time between."""
    receiver = HttpReceiver()
    async with receiver.listening() as url, open_channel(secret_file=secret_file) as channel:
        await channel.send(letter(url))
        secret_file.write_text(f"# the new one first\n{NEW_SECRET}\n{SECRET}\n")
        await channel.send(letter(url, "two"))
        secret_file.unlink()  # Somebody's mistake must not stop deliveries.
        await channel.send(letter(url, "three"))
    (headers, body) = receiver.requests[0]
    with pytest.raises(WebhookVerificationError):
        Webhook(NEW_SECRET).verify(body, headers)
    for headers, body in receiver.requests[1:]:
        Webhook(SECRET).verify(body, headers)
        Webhook(NEW_SECRET).verify(body, headers)


async def test_no_tenant_s_secret_signs_for_another(tmp_path: Path) -> None:
    """Each tenant's receivers verify with that tenant's secret, and another's is worth nothing there."""
    file = tmp_path / "secrets"
    file.write_text(f"shop: [{SECRET}]\nbank: [{NEW_SECRET}]\n")
    receiver = HttpReceiver()
    async with receiver.listening() as url, open_channel(secret_file=file) as channel:
        for tenant in ("shop", "bank", "unheard-of"):
            await channel.send(letter(url, tenant=tenant))
    of_shop, of_bank, of_nobody = receiver.requests
    Webhook(SECRET).verify(of_shop[1], of_shop[0])
    Webhook(NEW_SECRET).verify(of_bank[1], of_bank[0])
    for (headers, body), secret in ((of_shop, NEW_SECRET), (of_bank, SECRET)):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, headers)
    assert "webhook-signature" not in of_nobody[0]


async def test_a_file_with_tenants_can_be_rotated_and_has_a_place_for_the_others(tmp_path: Path) -> None:
    """Two secrets of one tenant both sign; a file that goes wrong changes nothing; `*` is for nobody who is named."""
    file = tmp_path / "secrets"
    file.write_text(f'{{"shop": ["{SECRET}"], "*": ["{OTHERS_SECRET}"]}}')
    receiver = HttpReceiver()
    async with receiver.listening() as url, open_channel(secret_file=file) as channel:
        await channel.send(letter(url, tenant="unheard-of"))
        file.write_text(f"shop:\n- {NEW_SECRET}\n- {SECRET}\n'*': [{OTHERS_SECRET}]\n")
        await channel.send(letter(url, tenant="shop"))
        file.write_text("shop: []\n")  # Somebody's mistake must not stop deliveries, nor send them unsigned.
        await channel.send(letter(url, tenant="shop"))
    (headers, body), *of_shop = receiver.requests
    Webhook(OTHERS_SECRET).verify(body, headers)
    for headers, body in of_shop:
        Webhook(SECRET).verify(body, headers)
        Webhook(NEW_SECRET).verify(body, headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(OTHERS_SECRET).verify(body, headers)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "\n",
        "# only a comment\n",
        "whsec_ä\n",
        "whsec_dG9vIHNob3J0\n",
        "shop: []\n",
        "shop: [nothing]\n",
        "Not a tenant: []\n",
        f"shop: {{secret: {SECRET}}}\n",
        f"{SECRET}: [shop]\n",
        f"shop: [{SECRET}\n",
        f"shop: [{SECRET}]\nbank: [{SECRET}]\n",
        f"shop: [{SECRET}]\nbank: [{SECRET.removeprefix('whsec_')}]\n",
        f"shop: [{SECRET}]\n'*': [{SECRET}]\n",
    ],
)
def test_a_secret_file_that_cannot_be_used_is_a_configuration_error(tmp_path: Path, content: str | None) -> None:
    """None, nothing, something else, and secrets that two tenants share stop the start; no secret is told."""
    file = tmp_path / "secrets"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match="CARILLON_DISPATCHER_WEBHOOK_SECRET_FILE") as caught:
        WebhookChannel(WebhookSettings(secret_file=file), connections=1)
    assert SECRET.removeprefix("whsec_") not in str(caught.value)


async def test_webhooks_share_connections() -> None:
    """One connection carries one webhook after the other."""
    receiver = HttpReceiver()
    async with receiver.listening() as url, open_channel() as channel:
        for n in range(5):
            await channel.send(letter(url, str(n)))
    assert len(receiver.connections) == 1


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (web.Response(status=202, text="queued"), Sent("202 queued")),
        (web.Response(status=400, text="bad\r\nbody\x00"), Permanent(Reason.REJECTED, "400 bad body")),
        (web.Response(status=410), Permanent(Reason.GONE, "410")),
        (web.Response(status=302, headers={"Location": "http://127.0.0.1/"}), Permanent(Reason.REDIRECTED, "302")),
        (web.Response(status=403), Retryable(Reason.AUTH_FAILED, "403")),
        (web.Response(status=404), Retryable(Reason.DEFERRED, "404")),
        (web.Response(status=500, text="oops"), Retryable(Reason.SERVER_ERROR, "500 oops")),
        (
            web.Response(status=429, headers={"Retry-After": "120"}),
            Retryable(Reason.RATE_LIMITED, "429", timedelta(minutes=2)),
        ),
        (
            web.Response(
                status=503,
                headers={"Date": "Thu, 04 Jul 2013 12:00:00 GMT", "Retry-After": "Thu, 04 Jul 2013 12:00:30 GMT"},
            ),
            Retryable(Reason.SERVER_ERROR, "503", timedelta(seconds=30)),
        ),
        (web.Response(status=503, headers={"Retry-After": "soon"}), Retryable(Reason.SERVER_ERROR, "503")),
    ],
)
async def test_what_the_receiver_answers_decides(answer: web.Response, result: Result) -> None:
    """2xx is sent, a redirect is not followed, what cannot get better is permanent, and Retry-After is understood."""
    assert await result_of(answer) == result


async def test_a_lost_answer_is_in_doubt() -> None:
    """The receiver had the request and hung up: it may have acted on it."""
    result = await result_of(drop)
    assert isinstance(result, Retryable)
    assert (result.reason, result.is_in_doubt) == (Reason.DISCONNECTED, True)


async def test_a_receiver_that_stalls_costs_the_timeout_and_is_in_doubt() -> None:
    """The attempt ends in time; nobody knows what the receiver did."""
    result = await result_of(stall, timeout=timedelta(milliseconds=300))
    assert isinstance(result, Retryable)
    assert (result.reason, result.is_in_doubt) == (Reason.TIMEOUT, True)


async def test_an_endless_answer_is_cut_off() -> None:
    """The status is known, and nobody reads the rest."""
    result = await asyncio.wait_for(result_of(endless), 3)
    assert isinstance(result, Sent)
    assert result.reply.startswith("200 xxx")


async def test_nobody_listening_is_worth_another_try() -> None:
    """A refused connection carried nothing."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with open_channel() as channel:
            result = await channel.send(letter(f"http://127.0.0.1:{port}/"))
    assert isinstance(result, Retryable)
    assert (result.reason, result.is_in_doubt) == (Reason.REFUSED, False)


async def test_a_delivery_without_json_is_not_posted() -> None:
    """There is nothing to send, and there never will be."""
    async with open_channel() as channel:
        result = await channel.send(letter("http://127.0.0.1:9/", body=""))
    assert isinstance(result, Permanent)
    assert result.reason is Reason.CONTENT_EMPTY


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "127.0.0.1", "localhost", "10.0.0.7", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]"],
)
async def test_private_networks_are_out_of_bounds(host: str) -> None:
    """No connection is made to an address inside, and no second attempt either."""
    receiver = HttpReceiver()
    async with receiver.listening() as url, open_channel(allow_private=False) as channel:
        result = await channel.send(letter(url.replace("127.0.0.1", host)))
    assert result == Permanent(Reason.DESTINATION_FORBIDDEN, "it leads to a private or reserved address")
    assert receiver.requests == []


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.0.0.1", "0x7f000001", "0", "hook.localhost"])
async def test_addresses_in_disguise_reach_nothing(host: str) -> None:
    """Whether it is refused as no address, as an unknown name or as a private one: nothing is connected to."""
    receiver = HttpReceiver()
    async with receiver.listening() as url, open_channel(allow_private=False) as channel:
        result = await channel.send(letter(url.replace("127.0.0.1", host)))
    assert not isinstance(result, Sent)
    assert result.reason in (Reason.DESTINATION_FORBIDDEN, Reason.ADDRESS_INVALID, Reason.UNREACHABLE)
    assert receiver.requests == []
