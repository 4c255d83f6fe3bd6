"""Bounces: addresses that a mail server says do not exist get nothing more, by policy, and nothing else does that."""

from collections.abc import AsyncIterator
from datetime import timedelta

import aiosmtplib
import pytest

from services.dispatcher.delivery import Permanent, Reason, Result, Sent
from services.dispatcher.records import story
from services.dispatcher.smtp import refusal
from services.dispatcher.store_suppressions import BounceStore, SuppressionStore
from services.dispatcher.suppressions import Source
from tests.support.dispatcher_world import NOON, TENANT, Rig, ScriptedChannel, delivery, id_of, migrated_database
from tests.support.fixtures import OpenDatabase

WHO = Permanent(Reason.ADDRESS_REJECTED, "550 5.1.1 who?", is_bounce=True)
POLICY = Permanent(Reason.ADDRESS_REJECTED, "550 5.7.1 not from you")
OK = Sent("250 kept")


@pytest.fixture
async def rig(open_database: OpenDatabase, postgres_server_url: str) -> AsyncIterator[Rig]:
    """A dispatcher on a database of its own."""
    with migrated_database(postgres_server_url) as url:
        yield Rig(await open_database("dispatcher", url))


async def reasons_of(rig: Rig, *results: Result, times: int = 1, list_id: str = "") -> list[str]:
    """Mails to one address, one after the other, answered like this: why each was not sent."""
    channel, reasons = ScriptedChannel(*results), []
    done = rig.outcomes()
    async with rig.sending(done, email=channel, email_bounces=times):
        for n in range(len(results)):
            address = "Gone@example.com" if n % 2 else "gone@Example.com"
            await rig.accept(delivery(f"{n}", channel="email", address=address, list_id=list_id))
            reasons.append((await done.until(n + 1))[n].reason.value)
    return reasons


@pytest.mark.parametrize(
    ("times", "results", "reasons"),
    [
        (1, [WHO, OK], ["address_rejected", "bounced"]),
        (2, [WHO, WHO, OK], ["address_rejected", "address_rejected", "bounced"]),
        (2, [WHO, OK, WHO, OK], ["address_rejected", "", "address_rejected", ""]),
        (0, [WHO, WHO, OK], ["address_rejected", "address_rejected", ""]),
        (1, [POLICY, OK], ["address_rejected", ""]),
    ],
    ids=["at once", "twice in a row", "a mail that is taken counts anew", "never", "policy is no bounce"],
)
async def test_bounces_in_a_row_suppress_the_address(
    rig: Rig, times: int, results: list[Result], reasons: list[str]
) -> None:
    """As often as the policy says, whatever the case of the letters; mandatory mails too."""
    assert await reasons_of(rig, *results, times=times) == reasons


async def test_a_bounce_is_on_record_with_what_the_server_said(rig: Rig) -> None:
    """Source, words and time; the suppressed delivery's story tells it."""
    await reasons_of(rig, WHO, OK)
    async with rig.db.read() as tx:
        (kept,) = await SuppressionStore().page(tx, TENANT, after=None, limit=10)
    assert (kept.address, kept.source, kept.reason, kept.created_at) == (
        "gone@example.com",
        Source.BOUNCE,
        "bounced: 550 5.1.1 who?",
        NOON,
    )
    last = list(story(await rig.record(id_of("1")), []))[-1]
    assert last.sentence.endswith("because a mail server has said that the address does not exist.")


async def test_a_lifted_bounce_starts_anew(rig: Rig) -> None:
    """Whoever lifts it has reasons: the next mail goes out, and one bounce is one again."""
    await reasons_of(rig, WHO, WHO, times=2)
    async with rig.db.transaction() as tx:
        await SuppressionStore().delete(tx, TENANT, channel="email", address="gone@example.com")
    done = rig.outcomes()
    async with rig.sending(done, email=ScriptedChannel(WHO, OK), email_bounces=2):
        for n, name in enumerate(("again", "and again")):
            await rig.accept(delivery(name, channel="email", address="gone@example.com"))
            await done.until(n + 1)
    assert [one.reason.value for one in done.settled] == ["address_rejected", ""]


async def test_old_bounces_are_forgotten(rig: Rig) -> None:
    """So that the count stays small (INV-9): what is young stays."""
    async with rig.db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO bounce (tenant, channel, address, times, stored_at)"
            " SELECT 'shop', 'email', age, 1, now() - age::interval FROM unnest(ARRAY['31 days', '29 days']) AS age"
        )
        assert await BounceStore(times=2).forget(tx, older_than=timedelta(days=30), limit=10) == 1
        cursor = await tx.raw.execute("SELECT address FROM bounce")
        assert await cursor.fetchall() == [("29 days",)]


@pytest.mark.parametrize(
    ("code", "message", "is_bounce"),
    [
        (550, "5.1.1 no such user", True),
        (550, "5.1.2 no such host", True),
        (556, "5.1.10 takes no mail", True),
        (550, "5.2.1 disabled", True),
        (552, "5.2.2 mailbox full", False),
        (550, "5.7.1 you are on a list", False),
        (550, "5.7.1 5.1.1 both", False),
        (554, "5.6.0 looks like spam", False),
        (550, "no such user", False),
        (550, "relaying denied", False),
        (550, "5.1.8 who are you?", False),
        (550, "5.1.¹ odd", False),
        (450, "4.1.1 ask again", False),
        (450, "5.1.1 of two minds", False),
        (421, "4.3.2 shutting down", False),
    ],
)
def test_only_a_plain_word_about_the_address_is_a_bounce(code: int, message: str, is_bounce: bool) -> None:
    """Never 4xx, policy, content, a full mailbox, or a refusal that may mean us."""
    result = refusal(aiosmtplib.SMTPRecipientRefused(code, message, "gone@example.com"))
    assert (isinstance(result, Permanent) and result.is_bounce) == is_bounce


def test_what_is_said_of_the_sender_is_no_bounce() -> None:
    """The same code at MAIL is about us."""
    result = refusal(aiosmtplib.SMTPSenderRefused(550, "5.1.1 who?", "bells@carillon.example"))
    assert isinstance(result, Permanent)
    assert not result.is_bounce
