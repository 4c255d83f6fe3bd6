"""Business services that are asked by HTTP: how a process names itself to them, and how much it listens to.

Their names are registered by the operator (settings_services.py), never chosen by callers. So addresses are not judged
as a webhook's are; but redirects are not followed and proxies not used, because the token must not go anywhere else.
"""

import aiohttp
from pydantic import SecretStr

USER_AGENT = "carillon"

_KEEPALIVE_S = 4.0
"""Below the five seconds after which many servers hang up: a question that crosses with that is lost."""

_SHOWN_CHARACTERS = 200


class BadReply(Exception):
    """The service said something that is no answer; the message is what."""


def open_session(token: SecretStr | None) -> aiohttp.ClientSession:
    """Connections without a limit of their own, cookies and decompression; whoever asks bounds how many there are."""
    headers = {"User-Agent": USER_AGENT, "Content-Type": "application/json", "Accept-Encoding": "identity"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token.get_secret_value()}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # A short answer must not unfold into a long one.
        headers=headers,
    )


async def read_body(response: aiohttp.ClientResponse, *, most_bytes: int) -> bytes:
    """What was answered; raises BadReply when that is more than `most_bytes`."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > most_bytes:
            response.close()  # Reading on would cost more than a new connection.
            raise BadReply(f"it answered {response.status} with more than {most_bytes // 1024} KiB")
    return bytes(body)


def refusal(status: int, body: bytes) -> str:
    """What a status other than 200 comes to, with the beginning of what was said."""
    return f"it answered {status} {body[:_SHOWN_CHARACTERS].decode('utf-8', 'replace')}".strip()


def one_line(text: str, *, most: int) -> str:
    """Fit for a column and a log line: no control characters, at most `most` characters."""
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * most])
    return " ".join(printable.split())[:most]
