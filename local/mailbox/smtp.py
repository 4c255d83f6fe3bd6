"""The SMTP side: takes mail for anybody, from anybody, on loopback."""

import asyncio
import re

from aiosmtpd.smtp import SMTP, Envelope, Session

from local.mailbox.store import Store

MAX_MAIL_BYTES = 32 << 20
_REFUSED = re.compile(r"refuse\.([45]\d\d)\.", re.IGNORECASE)


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

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Keep the mail, then say so."""
        content = envelope.content
        mail_id = self._store.add_mail(
            envelope.mail_from or "",
            envelope.rcpt_tos,
            content.encode() if isinstance(content, str) else content or b"",
        )
        return f"250 OK, kept as {mail_id}"


async def serve_smtp(store: Store, host: str, port: int) -> asyncio.Server:
    """Listen until the returned server is closed."""
    loop = asyncio.get_running_loop()
    handler = Handler(store)

    def connected() -> SMTP:
        return SMTP(handler, hostname="mailbox.local", enable_SMTPUTF8=True, data_size_limit=MAX_MAIL_BYTES, loop=loop)

    return await loop.create_server(connected, host, port)
