"""The channel `email`: SMTP over connections that stay open, and what a mail server's answers mean.

One mail is MAIL, RCPT, DATA on a connection of the pool. What the server says about this mail (4xx: later, 5xx: never)
is kept apart from what it says about us (greeting, TLS, password), which is nobody's mail's fault and is always tried
again. A connection that is lost before DATA has carried nothing; lost after it, the mail may have arrived: the attempt
is in doubt (RFC 1047). A kept connection that turns out to be dead is replaced once, without failing the attempt.
"""

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass

import aiosmtplib
from aiosmtplib import SMTP

from services.dispatcher.delivery import Letter, Permanent, Reason, Result, Retryable, Sent, clean_reply
from services.dispatcher.mail import Envelope, ListHeaders, compose, no_headers
from services.dispatcher.settings import SmtpSettings, SmtpTls

_START_TLS = {SmtpTls.NONE: False, SmtpTls.TLS: False, SmtpTls.STARTTLS: True, SmtpTls.OPPORTUNISTIC: None}
OUTAGES = frozenset(
    {
        *(Reason.REFUSED, Reason.UNREACHABLE, Reason.DISCONNECTED, Reason.TIMEOUT),
        *(Reason.TLS_FAILED, Reason.AUTH_FAILED),
    }
)
"""What is not about one mail. A 421 or a 4.7.x may be about its recipient, so that these are not among them."""

# RFC 3463 and its registry: no such mailbox, host, or syntax; moved without a trace; a domain that takes no mail; a
# mailbox that is disabled. Not 5.1.7 and 5.1.8, which are about the sender, and not 5.2.2, which is full and may empty.
_NO_SUCH_ADDRESS = frozenset({*(("5", "1", detail) for detail in ("0", "1", "2", "3", "6", "10")), ("5", "2", "1")})
_LOST = (aiosmtplib.SMTPServerDisconnected, aiosmtplib.SMTPTimeoutError, OSError)


@dataclass(slots=True)
class Connection:
    """A connection to the server; `mails` were sent over it, `idle_since_s` is on the event loop's clock."""

    client: SMTP
    mails: int = 0
    idle_since_s: float = 0.0


class SmtpChannel:
    """Mails through one SMTP server. How many connections there are follows from how many mails are under way."""

    outages = OUTAGES

    def __init__(self, settings: SmtpSettings, *, list_headers: ListHeaders = no_headers) -> None:
        self._settings = settings
        self._list_headers = list_headers
        self._sender = Envelope(address=settings.from_address, name=settings.from_name)
        self._context = _context(settings)
        self._idle: deque[Connection] = deque()

    async def send(self, letter: Letter) -> Result:
        """See Channel."""
        mail = compose(letter, self._sender, self._list_headers)
        transfer = Transfer(sender=self._sender.address, recipient=letter.delivery.address, mail=mail)
        try:
            async with asyncio.timeout(self._settings.timeout.total_seconds()):
                return await self._send(transfer)
        except TimeoutError:
            return Retryable(Reason.TIMEOUT, "the mail took too long", is_in_doubt=transfer.is_handed_over)

    async def close(self) -> None:
        """See Channel."""
        while self._idle:
            client = self._idle.pop().client
            try:
                await client.quit(timeout=1)
            except (aiosmtplib.SMTPException, OSError):
                client.close()

    async def _send(self, transfer: "Transfer") -> Result:
        if (kept := self._kept()) is not None:
            result = await self._send_over(kept, transfer)
            if transfer.is_handed_over or not _is_lost(result):
                return result
        try:
            connection = Connection(await self._connect())
        except (aiosmtplib.SMTPException, OSError, ssl.SSLError, ValueError) as error:
            return connect_failure(error)
        return await self._send_over(connection, transfer)

    async def _send_over(self, connection: Connection, transfer: "Transfer") -> Result:
        is_reusable = False
        try:
            result = await transfer.run(connection.client)
            connection.mails += 1
            is_reusable = connection.client.is_connected and connection.mails < self._settings.connection_mails
        finally:  # Also when cancelled: a dialogue that was cut short cannot be taken up again.
            if is_reusable:
                connection.idle_since_s = asyncio.get_running_loop().time()
                self._idle.append(connection)
            else:
                connection.client.close()
        return result

    def _kept(self) -> Connection | None:
        """The connection used last, which is the likeliest to be alive; those idle for too long are closed."""
        oldest_s = asyncio.get_running_loop().time() - self._settings.connection_idle.total_seconds()
        while self._idle and (self._idle[0].idle_since_s < oldest_s or not self._idle[0].client.is_connected):
            self._idle.popleft().client.close()
        return self._idle.pop() if self._idle else None

    async def _connect(self) -> SMTP:
        settings = self._settings
        password = None
        if settings.password_file is not None:
            password = (await asyncio.to_thread(settings.password_file.read_text)).strip()
        client = SMTP(
            hostname=settings.host,
            port=settings.port,
            use_tls=settings.tls is SmtpTls.TLS,
            start_tls=_START_TLS[settings.tls],
            tls_context=self._context,
            username=settings.username,
            password=password,
            local_hostname=self._sender.domain if self._sender.domain.isascii() else "localhost",
            timeout=None,  # `send` bounds the whole mail; one for each command would cost a task and a timer each.
        )
        await client.connect()
        return client


class Transfer:
    """One mail on its way; `is_handed_over` once the server may have it."""

    def __init__(self, *, sender: str, recipient: str, mail: bytes) -> None:
        self.is_handed_over = False
        self._sender = sender
        self._recipient = recipient
        self._mail = mail

    async def run(self, client: SMTP) -> Result:
        """Send it over a connection, which is fit for the next mail afterwards if it is still connected."""
        needs_utf8 = not (self._sender + self._recipient).isascii()
        try:
            if client.is_ehlo_or_helo_needed:
                await client.ehlo()
            if needs_utf8 and not client.supports_extension("smtputf8"):
                return Permanent(Reason.ADDRESS_INVALID, "the mail server does not take addresses beyond ASCII")
            encoding, options = ("utf-8", ["SMTPUTF8"]) if needs_utf8 else ("ascii", [])
            await client.mail(self._sender, options=options, encoding=encoding)
            await client.rcpt(self._recipient, encoding=encoding)
            self.is_handed_over = True
            reply = await client.data(self._mail)
        except aiosmtplib.SMTPResponseException as error:
            self.is_handed_over = False  # The server answered, and did not take it.
            await _reset(client)
            return refusal(error)
        except _LOST as error:
            return self._lost(error)
        return Sent(clean_reply(f"{reply.code} {reply.message}"))

    def _lost(self, error: Exception) -> Retryable:
        reason = Reason.TIMEOUT if isinstance(error, TimeoutError) else Reason.DISCONNECTED
        return Retryable(reason, clean_reply(str(error)), is_in_doubt=self.is_handed_over)


def refusal(error: aiosmtplib.SMTPResponseException) -> Result:
    """What a negative answer to one of our commands means for this mail."""
    reply = clean_reply(f"{error.code} {error.message}")
    match error:
        case aiosmtplib.SMTPHeloError():
            return Retryable(Reason.REFUSED, reply)
        case _ if error.code in (530, 534, 535, 538):  # It wants a password, a better one, or TLS (RFC 4954).
            return Retryable(Reason.AUTH_FAILED, reply)
        case _ if 500 <= error.code < 600:
            return Permanent(_permanent_reason(error), reply, is_bounce=_is_bounce(error))
        case _ if error.code == 421 or _enhanced_subject(error.message) == "7":
            return Retryable(Reason.RATE_LIMITED, reply)
        case _:
            return Retryable(Reason.DEFERRED, reply)


def connect_failure(error: Exception) -> Retryable:
    """Why there is no connection: never the mail's fault, so always worth another try."""
    reply = clean_reply(str(error))
    match error:
        case aiosmtplib.SMTPAuthenticationError():
            return Retryable(Reason.AUTH_FAILED, reply)
        case aiosmtplib.SMTPResponseException(code=code):
            return Retryable(Reason.REFUSED, clean_reply(f"{code} {error}"))
        case TimeoutError():
            return Retryable(Reason.TIMEOUT, reply)
        case aiosmtplib.SMTPConnectError(__cause__=ssl.SSLError()) | ssl.SSLError():
            return Retryable(Reason.TLS_FAILED, reply)
        case aiosmtplib.SMTPConnectError() | aiosmtplib.SMTPServerDisconnected() | OSError():
            return Retryable(Reason.UNREACHABLE, reply)
        case _:  # No STARTTLS where it is asked for, no way to log in that both sides know.
            return Retryable(Reason.TLS_FAILED, reply)


def _permanent_reason(error: aiosmtplib.SMTPResponseException) -> Reason:
    if isinstance(error, aiosmtplib.SMTPSenderRefused):
        return Reason.SENDER_REJECTED
    is_about_address = isinstance(error, aiosmtplib.SMTPRecipientRefused) or _enhanced_subject(error.message) == "1"
    return Reason.ADDRESS_REJECTED if is_about_address else Reason.REJECTED


def _is_bounce(error: aiosmtplib.SMTPResponseException) -> bool:
    """Whether it says that the recipient does not exist, for which only an enhanced status code is trusted.

    A bare 550 may as well mean a relay that is set up wrongly, which would cost every address its mail.
    """
    is_about_sender = isinstance(error, aiosmtplib.SMTPSenderRefused)
    return not is_about_sender and _enhanced_code(error.message) in _NO_SUCH_ADDRESS


def _enhanced_subject(message: str) -> str:
    """The subject of an enhanced status code (RFC 3463): 1 is addressing, 7 is policy; empty without one."""
    return _enhanced_code(message)[1]


def _enhanced_code(message: str) -> tuple[str, str, str]:
    """Class, subject and detail; empty without them."""
    parts = message.partition(" ")[0].split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        return "", "", ""
    return parts[0], parts[1], parts[2]


def _is_lost(result: Result) -> bool:
    return isinstance(result, Retryable) and result.reason in (Reason.DISCONNECTED, Reason.TIMEOUT)


async def _reset(client: SMTP) -> None:
    """Have the server forget this mail, so that the connection can carry the next."""
    try:
        if client.is_connected:
            await client.rset()
    except (aiosmtplib.SMTPException, OSError):
        client.close()


def _context(settings: SmtpSettings) -> ssl.SSLContext | None:
    if settings.tls is SmtpTls.NONE:
        return None
    return ssl.create_default_context(cafile=settings.ca_file)
