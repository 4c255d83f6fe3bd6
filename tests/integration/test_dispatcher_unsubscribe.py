"""Unsubscribing over a real Postgres and real HTTP: what a click does and leaves, and what nobody learns from it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from libs.errors import SettingsError
from services.dispatcher import metrics
from services.dispatcher.app import list_headers_of, signing_of
from services.dispatcher.records import story
from services.dispatcher.settings import UnsubscribeSettings
from services.dispatcher.store_suppressions import SuppressionStore
from services.dispatcher.suppressions import Source, Suppression
from services.dispatcher.unsubscribe import Key, Wish, sign
from services.dispatcher.unsubscribe_http import KeyFile, UnsubscribeHttp
from tests.integration.test_dispatcher_smtp import letter
from tests.support.dispatcher_world import (
    NOON,
    SECOND,
    TENANT,
    Rig,
    ScriptedChannel,
    delivery,
    id_of,
    migrated_database,
)
from tests.support.fixtures import OpenDatabase

SECRET = b"a secret of thirty-two bytes, or so"
ONE_CLICK = {"List-Unsubscribe": "One-Click"}
DAILY, WEEKLY = "cadence:daily", "cadence:weekly"


class Page:
    """The page over a rig, and a client in front of it."""

    def __init__(self, rig: Rig, session: aiohttp.ClientSession, url: str) -> None:
        self.rig, self._session, self.base = rig, session, url

    def link(self, *, list_id: str = DAILY, address: str = "Ann@example.com", tenant: str = TENANT) -> str:
        """What stands in a mail."""
        wish = Wish(tenant=tenant, list_id=list_id, address=address, subscriber="ann")
        return f"{self.base}/unsubscribe/{sign(wish, Key(SECRET))}"

    async def post(self, link: str, data: Any = None) -> tuple[int, str]:
        """Status and text of the answer."""
        async with self._session.post(link, data=ONE_CLICK if data is None else data, allow_redirects=False) as answer:
            return answer.status, await answer.text()

    async def get(self, link: str) -> tuple[int, str]:
        """Status and text of the answer."""
        async with self._session.get(link, allow_redirects=False) as answer:
            return answer.status, await answer.text()

    async def kept(self, tenant: str = TENANT) -> list[Suppression]:
        """Every suppression of a tenant."""
        async with self.rig.db.read() as tx:
            return await SuppressionStore().page(tx, tenant, after=None, limit=100)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Closed at the end of the test."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


async def opened(stack: AsyncExitStack, rig: Rig, **overrides: Any) -> Page:
    """The page, listening on a free port."""
    settings = UnsubscribeSettings(port=0, **overrides)
    page = UnsubscribeHttp(
        settings, keys=lambda: [Key(SECRET)], db=rig.db, clock=rig.clock, suppressions=SuppressionStore()
    )
    await stack.enter_async_context(page)
    session = await stack.enter_async_context(aiohttp.ClientSession())
    return Page(rig, session, f"http://127.0.0.1:{page.port}")


@pytest.fixture
async def page(stack: AsyncExitStack, rig: Rig) -> Page:
    """A page with the usual settings."""
    return await opened(stack, rig)


def mail(name: str, list_id: str = DAILY, **fields: Any) -> Any:
    """A mail to Ann."""
    return delivery(name, **({"channel": "email", "address": "ann@example.com", "list_id": list_id} | fields))


async def outcomes_of(rig: Rig, *mails: Any) -> dict[str, str]:
    """What becomes of mails of these names: sent, or why not."""
    done = rig.outcomes()
    async with rig.sending(done, email=ScriptedChannel(), webhook=ScriptedChannel()):
        await rig.accept(*mails)
        await done.until(len(mails))
    return {one.delivery_id.hex: one.reason.value or one.state.name.lower() for one in done.settled}


def _of(**expected: str) -> dict[str, str]:
    return {id_of(name).hex: what for name, what in expected.items()}


async def test_one_click_ends_the_list_and_nothing_else(page: Page) -> None:
    """The next digest of this list is not sent; other lists, mandatory mails and other addresses are."""
    status, text = await page.post(page.link())
    assert (status, "no more of the digest <b>daily</b>" in text) == (200, True)
    assert await outcomes_of(
        page.rig,
        mail("daily"),
        mail("weekly", WEEKLY),
        mail("alone", "type:daily"),
        mail("mandatory", ""),
        mail("bob", address="bob@example.com"),
        mail("hook", channel="webhook", address="https://example.com/ann@example.com"),
    ) == _of(daily="unsubscribed", weekly="sent", alone="sent", mandatory="sent", bob="sent", hook="sent")
    assert await page.rig.attempts(id_of("daily")) == []
    assert ("suppressed", "unsubscribed") in await page.rig.outcomes_told()


async def test_what_was_asked_for_is_on_record(page: Page) -> None:
    """Who, what, when and why; a second click changes nothing, and is answered the same."""
    first = await page.post(page.link())
    page.rig.clock.at += SECOND
    assert await page.post(page.link()) == first
    assert await page.kept() == [
        Suppression(
            channel="email",
            address="ann@example.com",
            reason="unsubscribed",
            created_at=NOON,
            list_id=DAILY,
            source=Source.UNSUBSCRIBE,
            subscriber="ann",
        )
    ]


async def test_unsubscribing_from_everything_leaves_what_is_mandatory(page: Page) -> None:
    """The page's second button covers all lists there are or will be."""
    status, _ = await page.post(page.link(), {"scope": "all"})
    assert status == 200
    assert await outcomes_of(page.rig, mail("daily"), mail("weekly", WEEKLY), mail("mandatory", "")) == _of(
        daily="unsubscribed", weekly="unsubscribed", mandatory="sent"
    )


async def test_following_the_link_changes_nothing(page: Page) -> None:
    """Scanners follow every link of a mail; the page they get has buttons, and its form goes back to the link."""
    status, text = await page.get(page.link())
    assert status == 200
    assert '<form method="post"><button name="scope" value="list">' in text
    assert await page.kept() == []
    assert (await page.post(page.link(), {"scope": "list"}))[0] == 200
    assert [one.list_id for one in await page.kept()] == [DAILY]


async def test_a_form_may_come_in_parts(page: Page) -> None:
    """RFC 8058 lets mail clients send multipart/form-data as well."""
    with aiohttp.MultipartWriter("form-data") as parts:
        parts.append("One-Click").set_content_disposition("form-data", name="List-Unsubscribe")
    assert (await page.post(page.link(), parts))[0] == 200
    assert len(await page.kept()) == 1


async def test_bad_tokens_are_all_answered_the_same(page: Page) -> None:
    """Made by somebody else, cut, changed or missing: one answer to all, which tells nothing, and nothing kept."""
    good = page.link()
    strange = sign(Wish(tenant=TENANT, list_id=DAILY, address="ann@example.com", subscriber=""), Key(b"s" * 32))
    bad = [good[:-2], f"{good}x", good.rsplit("/", 1)[0] + f"/{strange}", good.rsplit("/", 1)[0] + "/", good[:40]]
    answers = {await page.post(link) for link in bad} | {await page.get(link) for link in bad}
    assert len(answers) == 1
    ((status, _),) = answers
    assert status == 404
    assert await page.kept() == []


@pytest.mark.parametrize("body", [b"", b"List-Unsubscribe=Two-Clicks", b"\xff\xfe=\x00", b"scope=everybody"])
async def test_a_body_that_asks_for_nothing_does_nothing(page: Page, body: bytes) -> None:
    """A POST without the words of the RFC, or of our own page, is no unsubscribe."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with aiohttp.ClientSession() as session, session.post(page.link(), data=body, headers=headers) as answer:
        assert answer.status == 400
    assert await page.kept() == []


async def test_a_large_body_is_not_read(page: Page) -> None:
    """A few kilobytes are more than any client needs."""
    status, _ = await page.post(page.link(), {"List-Unsubscribe": "One-Click", "more": "x" * 100_000})
    assert status == 413
    assert await page.kept() == []


async def test_a_body_that_never_ends_costs_the_timeout(stack: AsyncExitStack, rig: Rig) -> None:
    """Whoever sends a byte now and then gets his answer in time, and keeps nobody busy."""
    page = await opened(stack, rig, timeout=timedelta(milliseconds=100))
    never = asyncio.Event()

    async def drips() -> AsyncIterator[bytes]:
        yield b"List-Unsubscribe="
        await never.wait()

    async with asyncio.timeout(10), aiohttp.ClientSession() as session:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        async with session.post(page.link(), data=drips(), headers=headers) as answer:
            assert answer.status == 503
    assert await page.kept() == []


async def test_requests_above_the_rate_are_put_off(stack: AsyncExitStack, rig: Rig) -> None:
    """429 with a time, whatever they are; those below it are taken."""
    page = await opened(stack, rig, rate="1/h burst 2")
    before = metrics.UNSUBSCRIBES.labels(metrics.LIMITED)._value.get()
    statuses = [(await page.post(page.link(list_id=list_id)))[0] for list_id in (DAILY, WEEKLY, "type:a", "type:b")]
    assert statuses.count(429) == len(statuses) - statuses.count(200) > 0
    assert len(await page.kept()) == statuses.count(200) > 0
    assert metrics.UNSUBSCRIBES.labels(metrics.LIMITED)._value.get() - before == statuses.count(429)


async def test_inv8_a_token_reaches_its_own_tenant_only(page: Page) -> None:
    """The same address elsewhere goes on getting mails."""
    await page.post(page.link(tenant="rival"))
    assert await page.kept() == []
    assert len(await page.kept("rival")) == 1
    assert await outcomes_of(page.rig, mail("daily")) == _of(daily="sent")


async def test_what_a_reader_asked_for_outlives_what_others_lift(page: Page) -> None:
    """A caller's suppression of the same address is a row of its own, and the stronger reason while it is there."""
    store = SuppressionStore()
    given: dict[str, Any] = {"channel": "email", "address": "ann@example.com"}
    await page.post(page.link(), {"scope": "all"})
    async with page.rig.db.transaction() as tx:
        await store.put(tx, TENANT, Suppression(**given, reason="asked by phone", created_at=NOON))
    assert await outcomes_of(page.rig, mail("one"), mail("two", "")) == _of(one="suppressed", two="suppressed")
    async with page.rig.db.transaction() as tx:
        await store.delete(tx, TENANT, **given, source=Source.CALLER)
    assert await outcomes_of(page.rig, mail("three"), mail("four", "")) == _of(three="unsubscribed", four="sent")
    async with page.rig.db.transaction() as tx:
        await store.delete(tx, TENANT, **given)
    assert await outcomes_of(page.rig, mail("five")) == _of(five="sent")


async def test_the_story_says_that_the_reader_unsubscribed(page: Page) -> None:
    """In words, with the list."""
    await page.post(page.link())
    await outcomes_of(page.rig, mail("daily"))
    last = list(story(await page.rig.record(id_of("daily")), []))[-1]
    assert last.kind == "delivery_suppressed"
    assert last.sentence.endswith("was not sent, because its reader has unsubscribed from the digest daily.")


async def test_markup_in_an_address_is_shown_as_it_is(page: Page) -> None:
    """Whatever a mail system lets people be called, it is text."""
    _, text = await page.get(page.link(address="<script>alert(1)</script>@example.com"))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_key_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """New keys count at once; a file that has become unusable leaves the ones before."""
    file = tmp_path / "keys"
    file.write_text(f"# comment\n{'a' * 32}\n")
    keys = KeyFile(file)
    assert [key.secret for key in keys.current()] == [b"a" * 32]
    file.write_text(f"{'b' * 32}\n{'a' * 32}\n")
    assert [key.secret for key in keys.current()] == [b"b" * 32, b"a" * 32]
    file.write_text("")
    assert len(keys.current()) == 2


@pytest.mark.parametrize("content", [None, "", "# nothing\n", "short\n"])
def test_a_key_file_that_cannot_be_used_is_a_configuration_error(tmp_path: Path, content: str | None) -> None:
    """At the start, and without showing what is in it."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        KeyFile(file)
    assert "short\n" not in str(caught.value)


async def test_the_link_in_a_mail_leads_off_its_list(stack: AsyncExitStack, rig: Rig, tmp_path: Path) -> None:
    """As wired: what the SMTP channel writes is what the page takes, with the keys of one file."""
    file = tmp_path / "keys"
    file.write_bytes(SECRET)
    settings = UnsubscribeSettings(base_url="https://mail.example/unsubscribe/", secret_file=file, port=0)
    ((_, way), _) = list_headers_of(settings, signing_of(settings))(letter(list_id=DAILY).delivery)
    page = await opened(stack, rig)
    link = way.strip("<>").replace("https://mail.example", page.base)
    assert (await page.post(link))[0] == 200
    assert [(one.list_id, one.address) for one in await page.kept()] == [(DAILY, "ann@example.com")]


def test_without_a_base_url_mails_say_nothing() -> None:
    """Off unless somebody says where the page is reached."""
    settings = UnsubscribeSettings()
    assert signing_of(settings) is None
    assert list_headers_of(settings, None)(letter(list_id=DAILY).delivery) == ()


@pytest.mark.parametrize(
    "given",
    [
        {"base_url": "https://mail.example"},
        {"base_url": "http://mail.example", "secret_file": "keys"},
        {"base_url": "https://mail.example/>,<mailto:x@y.z", "secret_file": "keys"},
        {"mailto": "ann@example.com>"},
        {"rate": "fast"},
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(given: dict[str, Any]) -> None:
    """No key, no TLS, or what would break out of the header."""
    with pytest.raises(ValueError, match=next(iter(given))):
        UnsubscribeSettings(**given)
