"""The public page behind List-Unsubscribe: a mail client's one click, or a reader's two, take an address off a list.

    POST /<token>  List-Unsubscribe=One-Click    what RFC 8058 has mail clients send; also what the page's buttons do
    GET  /<token>                                a page with a button: scanners follow links, and must change nothing

It listens on a port of its own, in plain HTTP, behind whatever terminates TLS for the base URL; the last piece of the
path is the token, so that a prefix may be cut off on the way or not. Nobody who calls it is known. So a token that is
not believed is always answered the same, a good one always the same too, whatever was there before; nothing redirects,
sets a cookie or is cached; bodies, time and rate are bounded. An unsubscribe is on record before it is confirmed.
"""

import asyncio
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Protocol, Self

from aiohttp import web
from throttled import RateLimiterType, Throttled
from throttled.store import MemoryStore

from libs.auth_tokens import FileVersion
from libs.clock import Clock
from libs.errors import SettingsError, Unavailable
from libs.postgres import Database, Transaction
from libs.telemetry.logs import get_logger
from services.dispatcher import metrics
from services.dispatcher.settings import UnsubscribeSettings
from services.dispatcher.suppressions import Source, Suppression
from services.dispatcher.unsubscribe import LEAST_SECRET, BadToken, Key, Keys, Wish, read

MAX_BODY = 4_096
REASON = "unsubscribed"

_log = get_logger(__name__)
_EVERYTHING = "all"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Unsubscribe</title>
<style>body{{font:1rem/1.5 sans-serif;max-width:32rem;margin:4rem auto;padding:0 1rem}}
button{{font:inherit;margin:.5rem 0;padding:.5rem 1rem}}</style></head>
<body><h1>{title}</h1><p>{text}</p>{form}</body></html>
"""
_FORM = """<form method="post"><button name="scope" value="list">Unsubscribe</button><br>
<button name="scope" value="all">Unsubscribe from all that can be unsubscribed from</button></form>"""
_WORDS = {"type": "messages of the kind {}", "cadence": "the digest {}"}


class Suppressions(Protocol):
    """What the page needs of the store."""

    async def put(self, tx: Transaction, tenant: str, suppression: Suppression) -> Suppression: ...


class KeyFile:
    """The secrets in a file, one a line; the first signs. Read again when the file changes."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError when it cannot be used."""
        self._path = path
        self._version: FileVersion | None = None
        self._keys: Sequence[Key] = ()
        self.current()

    def current(self) -> Sequence[Key]:
        """The keys as they are now; a file that has become unusable leaves the ones before in use."""
        try:
            version = FileVersion.of(self._path)
            if version != self._version:
                self._keys, self._version = _keys_in(self._path.read_text()), version
        except (OSError, ValueError) as error:
            if not self._keys:
                variable = UnsubscribeSettings.variable_of("secret_file")
                raise SettingsError(f"{variable}: {self._path} cannot be used: {error}.") from error
        return self._keys


class UnsubscribeHttp:
    """The HTTP server, listening for as long as the `async with` block lasts."""

    def __init__(
        self, settings: UnsubscribeSettings, *, keys: Keys, db: Database, clock: Clock, suppressions: Suppressions
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._db = db
        self._clock = clock
        self._suppressions = suppressions
        self._rate = Throttled(using=RateLimiterType.GCRA.value, quota=settings.rate, store=MemoryStore())
        self._runner: web.AppRunner | None = None
        self.port = settings.port

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=MAX_BODY)
        app.add_routes([web.get("/{path:.*}", self._show), web.post("/{path:.*}", self._unsubscribe)])
        self._runner = web.AppRunner(app, access_log=None)  # Its lines would hold tokens, and these addresses.
        await self._runner.setup()
        await web.TCPSite(self._runner, self._settings.host, self._settings.port).start()
        self.port = self._runner.addresses[0][1]
        _log.info("Listening for unsubscribes.", host=self._settings.host, port=self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _show(self, request: web.Request) -> web.Response:
        if (refusal := self._limited()) is not None:
            return refusal
        try:
            wish = read(_token(request), self._keys())
        except BadToken:
            return _bad_token()
        return _page(200, "Unsubscribe", f"Shall {_address(wish)} get no more of {_what(wish)}?", form=_FORM)

    async def _unsubscribe(self, request: web.Request) -> web.Response:
        if (refusal := self._limited()) is not None:
            return refusal
        try:
            async with asyncio.timeout(self._settings.timeout.total_seconds()):
                return await self._taken(request)
        except BadToken:
            metrics.UNSUBSCRIBES.labels(metrics.BAD_TOKEN).inc()
            return _bad_token()
        except (Unavailable, TimeoutError) as error:
            metrics.UNSUBSCRIBES.labels(metrics.FAILED).inc()
            _log.warning("An unsubscribe could not be taken.", error=repr(error))
            return _later(503, "This did not work just now.")

    async def _taken(self, request: web.Request) -> web.Response:
        """The answer once it is on record; raises BadToken, Unavailable, TimeoutError."""
        wish = read(_token(request), self._keys())
        scope = _scope(await _form(request))
        if scope is None:
            metrics.UNSUBSCRIBES.labels(metrics.BAD_REQUEST).inc()
            return _page(400, "Unsubscribe", "Something is missing in this request.")
        wanted = Suppression(
            channel="email",
            address=wish.address,
            reason=REASON,
            created_at=self._clock.now(),
            list_id="" if scope == _EVERYTHING else wish.list_id,
            source=Source.UNSUBSCRIBE,
            subscriber=wish.subscriber,
        )
        async with self._db.transaction() as tx:
            await self._suppressions.put(tx, wish.tenant, wanted)
        metrics.UNSUBSCRIBES.labels(metrics.DONE).inc()
        what = "anything that can be unsubscribed from" if scope == _EVERYTHING else _what(wish)
        return _page(
            200, "Unsubscribed", f"{_address(wish)} gets no more of {what}. What is on its way may still come."
        )

    def _limited(self) -> web.Response | None:
        if not self._rate.limit("all").limited:
            return None
        metrics.UNSUBSCRIBES.labels(metrics.LIMITED).inc()
        return _later(429, "Too many people are here at once.")


def _keys_in(text: str) -> Sequence[Key]:
    """Raises ValueError, which does not show the secret."""
    lines = [line.strip().encode() for line in text.splitlines()]
    keys = [Key(line) for line in lines if line and not line.startswith(b"#")]
    if not keys:
        raise ValueError("it holds no secret")
    if any(len(key.secret) < LEAST_SECRET for key in keys):
        raise ValueError(f"each secret must have at least {LEAST_SECRET} bytes")
    return keys


def _token(request: web.Request) -> str:
    return request.match_info["path"].rpartition("/")[2]


async def _form(request: web.Request) -> Mapping[str, object]:
    """The fields of a body of either kind (RFC 8058 §3.1); none in what is neither. 413 when it is too large."""
    try:
        return await request.post()
    except ValueError:  # Also what is no UTF-8, or says that it is multipart and is not.
        return {}


def _scope(form: Mapping[str, object]) -> str | None:
    """What is asked for: the token's list, or everything; None when nothing is."""
    if form.get("List-Unsubscribe") == "One-Click":
        return "list"
    scope = form.get("scope")
    return scope if isinstance(scope, str) and scope in ("list", _EVERYTHING) else None


def _address(wish: Wish) -> str:
    return f"<b>{escape(wish.address)}</b>"


def _what(wish: Wish) -> str:
    kind, _, name = wish.list_id.partition(":")
    return _WORDS.get(kind, "{}").format(f"<b>{escape(name)}</b>")


def _bad_token() -> web.Response:
    return _page(404, "Unsubscribe", "This link is not valid, or not any more.")


def _later(status: int, why: str) -> web.Response:
    response = _page(status, "Unsubscribe", f"{why} Please try again in a minute.")
    response.headers["Retry-After"] = "60"
    return response


def _page(status: int, title: str, text: str, *, form: str = "") -> web.Response:
    body = _PAGE.format(title=title, text=text, form=form)
    return web.Response(status=status, text=body, content_type="text/html", charset="utf-8", headers=_HEADERS)
