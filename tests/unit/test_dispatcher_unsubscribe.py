"""What mails say about getting off their list, and whose word is taken for it."""

import base64
import email
import email.policy
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import jwt
import pytest

from services.dispatcher.delivery import Delivery, Letter
from services.dispatcher.mail import Envelope, compose
from services.dispatcher.unsubscribe import BadToken, Key, Unsubscribing, Wish, read, sign

OLD, NEW, STRANGE = Key(b"an old secret of thirty-two bytes!"), Key(b"n" * 32), Key(b"s" * 32)
BASE = "https://mail.example/unsubscribe"
NOW = datetime(2013, 7, 4, 12, tzinfo=UTC)
WISH = Wish(tenant="shop", list_id="cadence:daily", address="ann@example.com", subscriber="ann")
MAIL = Delivery(
    tenant="shop",
    id=UUID(int=1),
    digest_id=UUID(int=2),
    subscriber="ann",
    channel="email",
    address="ann@example.com",
    subject="Hello",
    text="Hello",
    list_id="cadence:daily",
)


def composed(delivery: Delivery, *, mailto: str = "", keys: tuple[Key, ...] = (OLD,)) -> bytes:
    """The mail as it goes over the wire."""
    headers = Unsubscribing(base_url=BASE, mailto=mailto, keys=lambda: keys).headers
    sender = Envelope(address="bells@carillon.example", name="Carillon")
    return compose(Letter(delivery=delivery, created_at=NOW, signed_at=NOW), sender, headers)


def header(raw: bytes, name: str) -> str | None:
    """A header as its receiver reads it, unfolded."""
    found = email.message_from_bytes(raw, policy=email.policy.default)[name]
    return None if found is None else str(found)


def test_a_mail_says_how_to_get_off_its_list() -> None:
    """RFC 8058: an https URL whose token names reader and list, and the header that makes it one click."""
    raw = composed(MAIL)
    assert header(raw, "List-Unsubscribe-Post") == "List-Unsubscribe=One-Click"
    url = header(raw, "List-Unsubscribe")
    assert url is not None
    assert url.startswith(f"<{BASE}/")
    assert url.endswith(">")
    assert read(url.strip("<>").removeprefix(f"{BASE}/"), [OLD]) == WISH


def test_a_mailbox_is_the_second_way() -> None:
    """Where one is configured, it stands behind the URL."""
    ways = str(header(composed(MAIL, mailto="off@carillon.example"), "List-Unsubscribe")).split(", ")
    assert ways[1:] == ["<mailto:off@carillon.example?subject=unsubscribe>"]


def test_a_mandatory_mail_says_nothing_of_unsubscribing() -> None:
    """What is on no list cannot be left, so that neither header is there."""
    raw = composed(replace(MAIL, list_id=""))
    assert header(raw, "List-Unsubscribe") is None
    assert header(raw, "List-Unsubscribe-Post") is None


def test_a_second_copy_has_the_same_token() -> None:
    """A mail that is sent twice is the same twice, to the byte."""
    assert composed(MAIL, mailto="off@carillon.example") == composed(MAIL, mailto="off@carillon.example")


@pytest.mark.parametrize("subscriber", ["ann", "\U0001f514" * 256])
def test_the_longest_names_fit_into_a_line(subscriber: str) -> None:
    """A header's line ends at 998 characters: the subscriber gives way, and what counts stays."""
    domain = ".".join(["d" * 63] * 3)[:189]
    longest = replace(
        MAIL, tenant="t" * 64, list_id=f"cadence:{'c' * 128}", address=f"{'ä' * 32}@{domain}", subscriber=subscriber
    )
    raw = composed(longest)
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    token = str(header(raw, "List-Unsubscribe")).strip("<>").removeprefix(f"{BASE}/")
    wish = read(token, [OLD])
    assert (wish.tenant, wish.list_id, wish.address) == (longest.tenant, longest.list_id, longest.address)
    assert wish.subscriber == (subscriber if subscriber == "ann" else "")


def test_keys_are_replaced_one_after_the_other() -> None:
    """The first signs; a token of one further down is believed, and of one taken away no more."""
    old = sign(WISH, OLD)
    assert read(old, [NEW, OLD]) == WISH
    with pytest.raises(BadToken):
        read(old, [NEW])


def _forged(**changes: Any) -> str:
    said = {"v": 1, "t": "shop", "l": "cadence:daily", "a": "bob@example.com", "s": "bob"} | changes
    return base64.urlsafe_b64encode(json.dumps(said).encode()).decode().rstrip("=")


def _signed(**said: Any) -> str:
    return jwt.encode(said, OLD.secret, headers={"kid": OLD.id})


GOOD = sign(WISH, OLD).split(".")
BAD_TOKENS = {
    "empty": "",
    "no token": "x",
    "too long": f"{sign(WISH, OLD)}{'A' * 1_000}",
    "of a stranger": sign(WISH, STRANGE),
    "of a stranger under our key's name": jwt.encode({"v": 1}, STRANGE.secret, headers={"kid": OLD.id}),
    "for somebody else": ".".join([GOOD[0], _forged(), GOOD[2]]),
    "cut": ".".join(GOOD[:2]),
    "unsigned": jwt.encode({"v": 1, "t": "shop"}, "", algorithm="none", headers={"kid": OLD.id}),
    "not of this version": jwt.encode(
        {"v": 2, "t": "", "l": "", "a": "", "s": ""}, OLD.secret, headers={"kid": OLD.id}
    ),
    "without a wish": _signed(v=1),
    "with another kind of content": jwt.api_jws.encode(b"[1]", OLD.secret, headers={"kid": OLD.id}),
    "in another script": "żółw.żółw.żółw",
}


@pytest.mark.parametrize("token", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_a_token_that_we_did_not_make_is_not_believed(token: str) -> None:
    """Whatever is wrong with it, there is one answer."""
    with pytest.raises(BadToken):
        read(token, [NEW, OLD])
