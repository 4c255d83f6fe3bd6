"""The channel `webhook`: an HTTP POST, signed as Standard Webhooks asks (https://www.standardwebhooks.com).

Whoever subscribes a webhook chooses where this process connects to. So the address is judged at the last possible
moment, when the socket is made: whatever the name resolved to, however the number was written, and again for each
connection, so that a name that changes its mind between looking and leaping gains nothing. Redirects are not followed
and proxies are not used, because both would connect past that check.

Names are looked up by c-ares, without threads: getaddrinfo takes a thread of the few that a process has for as long as
a dead zone's servers say nothing, and two such names would hold up all others. It knows /etc/hosts and search domains.

An answer that was lost on the way leaves the attempt in doubt; receivers recognise the second copy by its webhook-id.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from standardwebhooks.webhooks import Webhook

from libs.auth_tokens import FileVersion
from libs.errors import SettingsError
from libs.telemetry.logs import get_logger
from services.dispatcher.addresses import is_public
from services.dispatcher.delivery import Letter, Permanent, Reason, Result, Retryable, Sent, clean_reply
from services.dispatcher.settings import WebhookSettings
from services.dispatcher.signing import Keys, keys_of, parse_keys

log = get_logger(__name__)

USER_AGENT = "Carillon-Webhook/1"
MAX_BODY_READ = 4_096
MAX_SECRETS_BYTES = 1 << 20

# What a receiver will not take back by itself. Other 4xx come from receivers that are being deployed, behind a gateway
# that is being set up, or before a secret has been exchanged, and are tried again.
_NEVER = frozenset({400, 405, 406, 411, 413, 414, 415, 422, 431, 451, 501, 505})
OUTAGES = frozenset(
    {
        *(Reason.REFUSED, Reason.UNREACHABLE, Reason.DISCONNECTED, Reason.TIMEOUT, Reason.TLS_FAILED),
        *(Reason.SERVER_ERROR, Reason.RATE_LIMITED),
    }
)
"""What speaks of the host as a whole. 4xx may be about one path or one secret of it."""


class ForbiddenAddress(OSError):
    """The name leads into a network that webhooks may not reach."""


class WebhookChannel:
    """Webhooks over a pool of connections."""

    outages = OUTAGES

    def __init__(
        self,
        settings: WebhookSettings,
        *,
        connections: int,
        resolver: Callable[[], AbstractResolver] = aiohttp.AsyncResolver,
    ) -> None:
        """`connections` bounds the pool; SettingsError when a file cannot be used."""
        self._settings = settings
        self._new_resolver = resolver
        self._resolver: AbstractResolver | None = None
        self._keys = SigningKeys(settings.secret_file)
        self._connections = connections
        self._context = ssl.create_default_context(cafile=settings.ca_file)
        self._session: aiohttp.ClientSession | None = None

    @property
    def is_signing(self) -> bool:
        """Whether anybody's webhooks are signed."""
        return not self._keys.is_empty

    async def send(self, letter: Letter) -> Result:
        """See Channel."""
        delivery = letter.delivery
        if not delivery.json:
            return Permanent(Reason.CONTENT_EMPTY, "there is no JSON to post")
        session = self._session or self._open()
        try:
            async with session.post(
                delivery.address,
                data=delivery.json.encode(),
                headers=headers_of(letter, self._keys.of(delivery.tenant)),
                allow_redirects=False,
            ) as response:
                return await _read(response, letter.signed_at)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return failure(error)

    async def close(self) -> None:
        """See Channel."""
        if self._session is not None:
            await self._session.close()
        if self._resolver is not None:
            await self._resolver.close()

    def _open(self) -> aiohttp.ClientSession:
        settings = self._settings
        self._resolver = self._new_resolver()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver,
                limit=self._connections,
                ssl=self._context,
                keepalive_timeout=settings.connection_idle.total_seconds(),
                socket_factory=None if settings.allow_private else public_socket,
            ),
            timeout=aiohttp.ClientTimeout(
                total=settings.timeout.total_seconds(), connect=settings.connect_timeout.total_seconds()
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # A short answer must not unfold into a long one.
            headers={"User-Agent": USER_AGENT, "Content-Type": "application/json", "Accept-Encoding": "identity"},
        )
        return self._session


class SigningKeys:
    """The secrets in a file, by tenant. Read again when the file changes."""

    def __init__(self, path: Path | None) -> None:
        """SettingsError when the file cannot be used. None: nothing is signed."""
        self._path = path
        self._version = None if path is None else _version_of(path)
        self._keys: Keys = {} if path is None else _read_keys(path)

    @property
    def is_empty(self) -> bool:
        """Whether nobody's webhooks are signed."""
        return not self._keys

    def of(self, tenant: str) -> tuple[Webhook, ...]:
        """What signs for the tenant now; a file that has become unusable leaves the secrets before in use."""
        if self._path is not None:
            self._reload_if_changed(self._path)
        return keys_of(self._keys, tenant)

    def _reload_if_changed(self, path: Path) -> None:
        version = _version_of(path)  # Two microseconds; webhooks cost a hundred times that.
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = _read_keys(path)
        except SettingsError as error:
            log.error("The webhook secrets have changed and cannot be used; they stay as they were.", error=str(error))
        else:
            log.info("Read the webhook secrets again, because they have changed.", tenants=len(self._keys))


def _read_keys(path: Path) -> Keys:
    """SettingsError, which shows no secret, when the file cannot be used."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRETS_BYTES + 1)
        if len(content) > MAX_SECRETS_BYTES:
            raise ValueError(f"it is longer than {MAX_SECRETS_BYTES} bytes")
        return parse_keys(content)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        variable = WebhookSettings.variable_of("secret_file")
        raise SettingsError(f"{variable}: {path} cannot be used: {why}.") from error


def _version_of(path: Path) -> FileVersion | None:
    try:
        return FileVersion.of(path)
    except OSError:
        return None


def headers_of(letter: Letter, keys: tuple[Webhook, ...]) -> dict[str, str]:
    """What goes with the body: the delivery's id, the same in every copy, and one signature per key."""
    delivery = letter.delivery
    webhook_id = str(delivery.id)
    headers = {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(letter.signed_at.timestamp())),
        "X-Carillon-Delivery": str(delivery.id),
        "X-Carillon-Digest": str(delivery.digest_id),
    }
    if keys:
        headers["webhook-signature"] = " ".join(key.sign(webhook_id, letter.signed_at, delivery.json) for key in keys)
    return headers


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an address of getaddrinfo's form; raises ForbiddenAddress unless it is on the public internet."""
    family, kind, protocol, _, where = address
    if not is_public(where[0]):
        # The same words for every address of a name: then this error survives when all of them failed.
        raise ForbiddenAddress(errno.EACCES, "it leads to a private or reserved address")
    return socket.socket(family=family, type=kind, proto=protocol)


def outcome(status: int, headers: Mapping[str, str], body: str, *, now: datetime) -> Result:
    """What an answer means; `now` is the instant that a Retry-After date is compared with where there is no Date."""
    reply = clean_reply(f"{status} {body}")
    if 200 <= status < 300:
        return Sent(reply)
    if 300 <= status < 400:
        return Permanent(Reason.REDIRECTED, reply)
    if status == 410:
        return Permanent(Reason.GONE, reply)
    if status in _NEVER:
        return Permanent(Reason.REJECTED, reply)
    retry_after = parse_retry_after(headers, now=now)
    if status == 429:
        return Retryable(Reason.RATE_LIMITED, reply, retry_after)
    if status in (401, 403):
        return Retryable(Reason.AUTH_FAILED, reply, retry_after)
    return Retryable(Reason.SERVER_ERROR if status >= 500 else Reason.DEFERRED, reply, retry_after)


def parse_retry_after(headers: Mapping[str, str], *, now: datetime) -> timedelta | None:
    """Retry-After as a wait (RFC 9110 §10.2.3), never negative; None when absent or not to be understood."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return timedelta(seconds=min(int(value[:10]), 10**9))
    try:
        until = parsedate_to_datetime(value)
        # The receiver's own clock, where it tells: ours may differ, and under the test clock it does by years.
        since = parsedate_to_datetime(headers["Date"]) if "Date" in headers else now
        return max(until - since, timedelta(0))
    except (ValueError, TypeError):
        return None


def failure(error: Exception) -> Result:
    """Why there is no answer. In doubt once the request may have been read: neither refused nor never connected."""
    reply = clean_reply(str(error) or type(error).__name__)
    match error:
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ForbiddenAddress):
            return Permanent(Reason.DESTINATION_FORBIDDEN, "it leads to a private or reserved address")
        case aiohttp.ClientSSLError():
            return Retryable(Reason.TLS_FAILED, reply)
        case aiohttp.ClientConnectorError(os_error=ConnectionRefusedError()):
            return Retryable(Reason.REFUSED, reply)
        case aiohttp.ClientConnectorError():
            return Retryable(Reason.UNREACHABLE, reply)
        case aiohttp.ConnectionTimeoutError():
            return Retryable(Reason.TIMEOUT, reply)
        case aiohttp.InvalidURL() | ValueError():
            return Permanent(Reason.ADDRESS_INVALID, reply)
        case TimeoutError():
            return Retryable(Reason.TIMEOUT, "no answer in time", is_in_doubt=True)
        case _:
            return Retryable(Reason.DISCONNECTED, reply, is_in_doubt=True)


async def _read(response: aiohttp.ClientResponse, now: datetime) -> Result:
    """The status decides; as much of the body as is worth keeping is read, and an error there changes nothing."""
    body = b""
    try:
        body = await response.content.read(MAX_BODY_READ)
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError):
        response.close()
    if not response.content.at_eof():
        response.close()  # Reading on would cost more than a new connection.
    return outcome(response.status, response.headers, body.decode("utf-8", "replace"), now=now)
