"""One-click unsubscribe (RFC 8058): the headers of a mail, and the token in them that says who wants no more of what.

A token names tenant, list, address and subscriber, and is signed, so that nobody can make one for somebody else, or
learn from one that he made whether anything exists. It is a JWS (RFC 7515, HS256); the key's id stands in its header,
so that keys can be replaced: the first signs, all are believed. It never runs out by itself: mails are kept for years,
and whoever still holds the mail may still unsubscribe. What it says depends on the delivery and the key alone, so that
a mail that is sent twice is the same twice.

Who is allowed to sign may take a reader off a list, and nothing more. Pure.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from urllib.parse import quote

from jwt import PyJWS
from jwt.exceptions import InvalidTokenError

from services.dispatcher.addresses import is_email
from services.dispatcher.delivery import Delivery

MAX_TOKEN = 940
MAX_BASE_URL = 160
LEAST_SECRET = 32
"""Bytes of a key: as many as the signature has (RFC 7518 §3.2)."""

_VERSION = 1
_ALGORITHM = "HS256"
_MAX_URL = 998 - len("List-Unsubscribe: <>,\r\n")
"""RFC 5322 §2.1.1."""
_jws = PyJWS(algorithms=[_ALGORITHM])


class BadToken(Exception):
    """It was not made by us, or with a key that is not believed any more, or is no token at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a token says: this address gets no more mails of this list. `subscriber` is empty where it had no room."""

    tenant: str
    list_id: str
    address: str
    subscriber: str


@dataclass(frozen=True, slots=True)
class Key:
    """A secret of at least LEAST_SECRET bytes, by an id that gives nothing of it away."""

    secret: bytes

    @property
    def id(self) -> str:
        """Short, and the same for the same secret."""
        return sha256(b"carillon unsubscribe key\x00" + self.secret).hexdigest()[:8]


Keys = Callable[[], Sequence[Key]]
"""The keys as they are now, at least one; the first signs."""


def sign(wish: Wish, key: Key) -> str:
    """The token of a wish: URL-safe characters and dots, the same for the same wish and key."""
    said = {"v": _VERSION, "t": wish.tenant, "l": wish.list_id, "a": wish.address, "s": wish.subscriber}
    payload = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    return _jws.encode(payload, key.secret, algorithm=_ALGORITHM, headers={"kid": key.id, "typ": ""})


def read(token: str, keys: Sequence[Key]) -> Wish:
    """The wish in a token that was signed with one of the keys; raises BadToken, always for the same reason."""
    try:
        if not len(token) <= MAX_TOKEN:
            raise BadToken
        wanted = _jws.get_unverified_header(token).get("kid")
        key = next(key for key in keys if key.id == wanted)
        said = json.loads(_jws.decode(token, key.secret, algorithms=[_ALGORITHM]))
        if said["v"] != _VERSION:
            raise BadToken
        wish = Wish(tenant=said["t"], list_id=said["l"], address=said["a"], subscriber=said["s"])
    except (InvalidTokenError, StopIteration, ValueError, KeyError, TypeError) as error:
        raise BadToken from error
    return wish


class Unsubscribing:
    """What the headers of mails say about getting off their list."""

    def __init__(self, *, base_url: str, mailto: str, keys: Keys) -> None:
        """`base_url` is where tokens are taken, https, without a slash at its end; `mailto` an address, or empty."""
        self._base_url = base_url
        self._mailto = mailto
        self._keys = keys

    def headers(self, delivery: Delivery) -> Sequence[tuple[str, str]]:
        """List-Unsubscribe and List-Unsubscribe-Post; none for what is mandatory, and for addresses that are none."""
        if not delivery.list_id or not is_email(delivery.address):
            return ()
        ways = [f"<{self.url(delivery)}>"]
        if self._mailto:
            ways.append(f"<mailto:{quote(self._mailto, safe='@')}?subject=unsubscribe>")
        return (
            ("List-Unsubscribe", ",\r\n ".join(ways)),
            ("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"),
        )

    def url(self, delivery: Delivery) -> str:
        """Where this delivery's reader unsubscribes; it fits into a line of a mail."""
        key = self._keys()[0]
        wish = Wish(
            tenant=delivery.tenant, list_id=delivery.list_id, address=delivery.address, subscriber=delivery.subscriber
        )
        token = sign(wish, key)
        if len(token) > min(MAX_TOKEN, _MAX_URL - len(self._base_url) - 1):
            token = sign(replace(wish, subscriber=""), key)
        return f"{self._base_url}/{token}"
