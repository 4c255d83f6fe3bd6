"""The SMTP channel against a real server (aiosmtpd) that refuses, drops, stalls and asks for TLS on command."""

import asyncio
import email
import email.policy
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from services.dispatcher.delivery import Delivery, Letter, Permanent, Reason, Result, Retryable, Sent
from services.dispatcher.settings import SmtpSettings, SmtpTls
from services.dispatcher.smtp import SmtpChannel
from tests.integration.test_rpc_tls import Authority
from tests.support.dispatcher_world import DIGEST, NOON, TENANT, id_of

Answer = str | Callable[[SMTP], Awaitable[str]]


async def drop(server: SMTP) -> str:
    """Cut the connection instead of answering."""
    assert isinstance(server.transport, asyncio.Transport)
    server.transport.abort()
    return "250 never seen"


async def stall(_server: SMTP) -> str:
    """Answer long after everybody has given up."""
    await asyncio.sleep(30)
    return "250 at last"


class MailServer:
    """Keeps mails; each hook answers with the next scripted answer, or 250."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.answers: defaultdict[str, list[Answer]] = defaultdict(list)
        self.connections = 0
        self.senders: list[str] = []

    async def handle_EHLO(
        self, server: SMTP, session: Session, envelope: Envelope, hostname: str, answers: list[str]
    ) -> list[str]:
        session.host_name = hostname
        await self._answer("EHLO", server, "")
        return answers

    async def handle_MAIL(self, server: SMTP, session: Any, envelope: Envelope, address: str, options: Any) -> str:
        self.senders.append(address)
        envelope.mail_from = address
        return await self._answer("MAIL", server, "250 OK")

    async def handle_RCPT(self, server: SMTP, session: Any, envelope: Envelope, address: str, options: Any) -> str:
        answer = await self._answer("RCPT", server, "250 OK")
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: SMTP, session: Any, envelope: Envelope) -> str:
        content = envelope.original_content or b""
        mail = email.message_from_bytes(content, policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return await self._answer("DATA", server, "250 kept")

    async def _answer(self, command: str, server: SMTP, usual: str) -> str:
        answer = self.answers[command].pop(0) if self.answers[command] else usual
        return answer if isinstance(answer, str) else await answer(server)

    @asynccontextmanager
    async def listening(
        self, port: int = 0, tls: ssl.SSLContext | None = None, **options: Any
    ) -> AsyncIterator[SmtpSettings]:
        """Listen, and yield the settings that lead here."""

        def connected() -> SMTP:
            self.connections += 1
            loop = asyncio.get_running_loop()
            return SMTP(self, hostname="mail.example", enable_SMTPUTF8=True, loop=loop, **options)

        server = await asyncio.get_running_loop().create_server(connected, "127.0.0.1", port, ssl=tls)
        try:
            yield SmtpSettings(
                host="127.0.0.1",
                port=server.sockets[0].getsockname()[1],
                tls=SmtpTls.NONE,
                from_address="bells@carillon.example",
                from_name="Carillon",
                timeout=timedelta(seconds=5),
            )
        finally:
            server.close()


@asynccontextmanager
async def channel_to(settings: SmtpSettings, **overrides: Any) -> AsyncIterator[SmtpChannel]:
    """A channel, closed at the end."""
    channel = SmtpChannel(SmtpSettings(**(settings.model_dump() | overrides)))
    try:
        yield channel
    finally:
        await channel.close()


def letter(name: str = "one", **fields: Any) -> Letter:
    """A mail to Ann."""
    given: dict[str, Any] = {
        "tenant": TENANT,
        "id": id_of(name),
        "digest_id": DIGEST,
        "subscriber": "ann",
        "channel": "email",
        "address": "ann@example.com",
        "subject": "Three flights are delayed",
        "html": "<p>Hello, Ann: grüße</p>",
        "text": "Hello, Ann: grüße\n.\nleading dot",
    }
    return Letter(delivery=Delivery(**(given | fields)), created_at=NOON, signed_at=NOON)


async def sent_to(server: MailServer, *letters: Letter, **overrides: Any) -> list[Result]:
    """What became of letters sent one after the other."""
    async with server.listening() as settings, channel_to(settings, **overrides) as channel:
        return [await channel.send(one) for one in letters or (letter(),)]


async def test_a_mail_arrives_with_both_bodies_and_our_headers() -> None:
    """HTML and its plain-text twin, ids in the headers, and nothing that could not be traced back to the delivery."""
    server = MailServer()
    assert await sent_to(server) == [Sent("250 kept")]
    (mail,) = server.mails
    assert mail["Message-ID"] == f"<{id_of('one')}@carillon.example>"
    assert mail["X-Carillon-Delivery"] == str(id_of("one"))
    assert mail["X-Carillon-Digest"] == str(DIGEST)
    assert mail["From"] == "Carillon <bells@carillon.example>"
    assert (mail["To"], mail["Subject"]) == ("ann@example.com", "Three flights are delayed")
    assert mail["Date"].datetime == NOON
    assert mail.get_content_type() == "multipart/alternative"
    html, text = mail.get_body(("html",)), mail.get_body(("plain",))
    assert html is not None
    assert text is not None
    assert html.get_content().splitlines() == ["<p>Hello, Ann: grüße</p>"]
    assert text.get_content().splitlines() == ["Hello, Ann: grüße", ".", "leading dot"]


async def test_mails_share_a_connection() -> None:
    """One connection carries one mail after the other, refused ones too, until it has carried its share."""
    server = MailServer()
    server.answers["RCPT"] = ["550 5.1.1 no such user"]
    letters = [letter(str(n)) for n in range(5)]
    results = await sent_to(server, *letters, connection_mails=3)
    assert [type(result) for result in results] == [Permanent, Sent, Sent, Sent, Sent]
    assert server.connections == 2


@pytest.mark.parametrize(
    ("command", "answer", "result"),
    [
        ("MAIL", "451 4.3.0 later", Retryable(Reason.DEFERRED, "451 4.3.0 later")),
        ("MAIL", "550 5.7.1 not from you", Permanent(Reason.SENDER_REJECTED, "550 5.7.1 not from you")),
        ("MAIL", "530 5.7.0 log in first", Retryable(Reason.AUTH_FAILED, "530 5.7.0 log in first")),
        ("RCPT", "450 4.2.1 mailbox busy", Retryable(Reason.DEFERRED, "450 4.2.1 mailbox busy")),
        ("RCPT", "450 4.7.1 slow down", Retryable(Reason.RATE_LIMITED, "450 4.7.1 slow down")),
        ("RCPT", "421 too many", Retryable(Reason.RATE_LIMITED, "421 too many")),
        ("RCPT", "550 5.1.1 who?", Permanent(Reason.ADDRESS_REJECTED, "550 5.1.1 who?", is_bounce=True)),
        ("DATA", "452 4.3.1 disk full", Retryable(Reason.DEFERRED, "452 4.3.1 disk full")),
        ("DATA", "554 5.6.0 spam", Permanent(Reason.REJECTED, "554 5.6.0 spam")),
        (
            "DATA",
            "550 5.1.0 gone after all",
            Permanent(Reason.ADDRESS_REJECTED, "550 5.1.0 gone after all", is_bounce=True),
        ),
    ],
)
async def test_what_the_server_answers_decides(command: str, answer: str, result: Result) -> None:
    """4xx is for later, 5xx for ever, what is about us is never the mail's fault; and the next mail goes through."""
    server = MailServer()
    server.answers[command] = [answer]
    assert await sent_to(server, letter(), letter("two")) == [result, Sent("250 kept")]


@pytest.mark.parametrize(
    ("command", "is_in_doubt"), [("EHLO", False), ("MAIL", False), ("RCPT", False), ("DATA", True)]
)
async def test_a_lost_connection_is_in_doubt_once_the_mail_was_handed_over(command: str, is_in_doubt: bool) -> None:
    """Before DATA nothing can have arrived; after it nobody knows."""
    server = MailServer()
    server.answers[command] = [drop]
    (first, second) = await sent_to(server, letter(), letter("two"))
    assert isinstance(first, Retryable)
    assert (first.reason, first.is_in_doubt) == (Reason.DISCONNECTED, is_in_doubt)
    assert second == Sent("250 kept")


@pytest.mark.parametrize(("command", "is_in_doubt"), [("MAIL", False), ("DATA", True)])
async def test_a_server_that_stalls_costs_the_timeout_and_no_more(command: str, is_in_doubt: bool) -> None:
    """The attempt ends in time, and the connection is not used again."""
    server = MailServer()
    server.answers[command] = [stall]
    (first, second) = await sent_to(server, letter(), letter("two"), timeout=timedelta(milliseconds=300))
    assert isinstance(first, Retryable)
    assert (first.reason, first.is_in_doubt) == (Reason.TIMEOUT, is_in_doubt)
    assert second == Sent("250 kept")
    assert server.connections == 2


async def test_a_kept_connection_that_died_is_replaced_within_the_attempt() -> None:
    """A server that closed an idle connection costs no attempt."""
    server = MailServer()
    async with server.listening() as settings, channel_to(settings) as channel:
        assert await channel.send(letter()) == Sent("250 kept")
        server.answers["MAIL"] = [drop]
        assert await channel.send(letter("two")) == Sent("250 kept")
    assert server.connections == 2
    assert [mail["X-Carillon-Delivery"] for mail in server.mails] == [str(id_of("one")), str(id_of("two"))]


async def test_nobody_listening_is_worth_another_try() -> None:
    """A server that is down is never the mail's fault."""
    server = MailServer()
    async with server.listening() as settings:
        pass
    async with channel_to(settings) as channel:
        result = await channel.send(letter())
    assert isinstance(result, Retryable)
    assert (result.reason, result.is_in_doubt) == (Reason.UNREACHABLE, False)


async def test_starttls_is_used_and_the_password_sent(tmp_path: Path) -> None:
    """With starttls the certificate is checked, and only then does the server learn who we are."""
    authority = Authority(tmp_path, "ca")
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(*authority.issue("mail"))
    (tmp_path / "password").write_text("s3cret\n")

    def check(_server: Any, _session: Any, _envelope: Any, mechanism: str, data: Any) -> AuthResult:
        is_right = isinstance(data, LoginPassword) and (data.login, data.password) == (b"bells", b"s3cret")
        return AuthResult(success=is_right, handled=False)

    server = MailServer()
    options: dict[str, Any] = {
        "tls_context": server_context,
        "authenticator": check,
        "auth_required": True,
        "require_starttls": True,
    }
    async with server.listening(**options) as settings:
        login = {"tls": "starttls", "username": "bells", "password_file": tmp_path / "password"}
        async with channel_to(settings, ca_file=authority.cert, **login) as channel:
            assert await channel.send(letter()) == Sent("250 kept")
        async with channel_to(settings, **login) as distrusting:
            result = await distrusting.send(letter("two"))
            assert isinstance(result, Retryable)
            assert result.reason is Reason.TLS_FAILED
        (tmp_path / "password").write_text("wrong")
        async with channel_to(settings, ca_file=authority.cert, **login) as channel:
            result = await channel.send(letter("three"))
            assert isinstance(result, Retryable)
            assert result.reason is Reason.AUTH_FAILED
    assert len(server.mails) == 1


async def test_starttls_is_never_given_up_silently() -> None:
    """A server, or somebody in between, that does not offer STARTTLS gets no mail."""
    server = MailServer()
    (result,) = await sent_to(server, tls="starttls")
    assert isinstance(result, Retryable)
    assert result.reason is Reason.TLS_FAILED
    assert server.mails == []


async def test_tls_from_the_first_byte(tmp_path: Path) -> None:
    """A TLS-only server is spoken to in TLS."""
    authority = Authority(tmp_path, "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("mail"))
    server = MailServer()
    async with (
        server.listening(tls=context) as settings,
        channel_to(settings, tls="tls", ca_file=authority.cert) as channel,
    ):
        assert await channel.send(letter()) == Sent("250 kept")


async def test_an_address_beyond_ascii_needs_a_server_that_takes_it() -> None:
    """SMTPUTF8 is asked for exactly where it is needed."""
    server = MailServer()
    assert await sent_to(server, letter(address="änn@example.com")) == [Sent("250 kept")]
    assert server.mails[0]["To"] == "änn@example.com"
