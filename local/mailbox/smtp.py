"""The SMTP side: takes mail for anybody, from anybody, on loopback, some thousand a second."""

import asyncio
import re

from aiosmtpd.smtp import SMTP, Envelope, Session, syntax

from local.mailbox.store import Store

MAX_MAIL_BYTES = 32 << 20
MAX_LINE_BYTES = 998  # RFC 5321, 4.5.3.1.6; real servers refuse longer ones, so a sender should hear of it here.
_REFUSED = re.compile(r"refuse\.([45]\d\d)\.", re.IGNORECASE)
_END = b".\r\n"


class Handler:
    """What aiosmtpd calls; its answers are SMTP replies."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def handle_RCPT(  # noqa: N802 — aiosmtpd's name.
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Take every recipient but those whose address asks to be refused."""
        if found := _REFUSED.match(address):
            return f"{found[1]} {found[1][0]}.1.1 Refused, as the address asks"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    def keep(self, envelope: Envelope, content: bytes) -> str:
        """Keep the mail, then say so."""
        return f"250 OK, kept as {self._store.add_mail(envelope.mail_from or '', envelope.rcpt_tos, content)}"


class Connection(SMTP):
    """aiosmtpd's SMTP, but a mail is read whole and not line by line: that takes half of the time per mail."""

    line_length_limit = MAX_MAIL_BYTES  # Of the stream; commands have a limit of their own.
    event_handler: Handler

    @syntax("DATA")
    async def smtp_DATA(self, arg: str) -> None:  # noqa: N802
        """Read a mail, and keep it."""
        if await self.check_helo_needed():
            return
        if arg or self.envelope is None or not self.envelope.rcpt_tos:
            await self.push("501 Syntax: DATA" if arg else "503 Error: need RCPT command")
            return
        await self.push("354 End data with <CR><LF>.<CR><LF>")
        try:
            content = await self._read_mail()
        except asyncio.LimitOverrunError:
            await self.push("552 Error: Too much mail data")
            if self.transport is not None:
                self.transport.close()
            return
        if max(map(len, content.split(b"\r\n"))) > MAX_LINE_BYTES:
            await self.push("500 Line too long (see RFC5321 4.5.3.1.6)")
        else:
            await self.push(self.event_handler.keep(self.envelope, content))
        self._set_post_data_state()  # type: ignore[no-untyped-call]

    async def _read_mail(self) -> bytes:
        content = b""
        while content != _END and not content.endswith(b"\r\n" + _END):
            content += await self._reader.readuntil(_END)
            if len(content) > MAX_MAIL_BYTES:
                raise asyncio.LimitOverrunError("The mail is too large.", len(content))
        # Undo the doubling of dots at the start of lines, RFC 5321, 4.5.2.
        return (b"\r\n" + content[: -len(_END)]).replace(b"\r\n..", b"\r\n.")[2:]


async def serve_smtp(store: Store, host: str, port: int) -> asyncio.Server:
    """Listen until the returned server is closed."""
    loop = asyncio.get_running_loop()
    handler = Handler(store)

    def connected() -> SMTP:
        return Connection(
            handler, hostname="mailbox.local", enable_SMTPUTF8=True, data_size_limit=MAX_MAIL_BYTES, loop=loop
        )

    return await loop.create_server(connected, host, port)
