"""Which addresses are well-formed, where they lead, and which networks are out of bounds."""

import pytest

from services.dispatcher.addresses import destination_of, is_public, is_valid_address


@pytest.mark.parametrize(
    "address",
    ["ann@example.com", "a.b+c@mail.example.co.uk", "o'neill@example.com", "ops@localhost", "änn@bücher.example"],
)
def test_a_mailbox_is_an_address(address: str) -> None:
    """Plain mailboxes, tagged ones, single-label hosts and other scripts."""
    assert is_valid_address("email", address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ann",
        "@example.com",
        "ann@",
        "ann@@example.com",
        "ann@example..com",
        ".ann@example.com",
        "ann@-example.com",
        "ann@example.com\r\nBcc: all@example.com",
        "ann@example.com\n",
        "ann@example.com, bob@example.com",
        "Ann <ann@example.com>",
        "<ann@example.com>",
        "ann @example.com",
        "ann\x00@example.com",
        "ann\u200b@example.com",
        "ann\u2028@example.com",
        '"ann b"@example.com',
        "a" * 65 + "@example.com",
        "ann@" + "a." * 130 + "com",
    ],
)
def test_anything_around_a_mailbox_is_refused(address: str) -> None:
    """Nothing that could become a second header, a second recipient, or an invisible difference."""
    assert not is_valid_address("email", address)


@pytest.mark.parametrize("url", ["https://example.com", "http://127.0.0.1:8080/hook?x=1", "https://[2001:db8::1]/a"])
def test_an_http_url_is_an_address(url: str) -> None:
    """Where it may lead is judged when connecting."""
    assert is_valid_address("webhook", url)


@pytest.mark.parametrize(
    "url",
    [
        "example.com",
        "ftp://example.com",
        "file:///etc/passwd",
        "https://",
        "https://user:secret@example.com/",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://example.com/a b",
        "https://example.com/\r\nX-Evil: 1",
        "https://example.com\\@evil.example/",
        "https://[::1/",
        "https://example.com/" + "a" * 2048,
    ],
)
def test_what_is_no_plain_http_url_is_refused(url: str) -> None:
    """No other scheme, no credentials, no line breaks, no port that is none."""
    assert not is_valid_address("webhook", url)


def test_a_webhook_is_bounded_by_host_and_port() -> None:
    """Paths and cases of one receiver share its places; other channels have none of their own."""
    assert destination_of("webhook", "https://Example.com/a") == "example.com:443"
    assert destination_of("webhook", "http://example.com:8080/b?c") == "example.com:8080"
    assert destination_of("email", "ann@example.com") == ""


@pytest.mark.parametrize("host", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_public_addresses_are_public(host: str) -> None:
    """What the internet routes."""
    assert is_public(host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.192",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::c000:c0",
        "64:ff9b:1::1",
        "3fff::1",
        "5f00::1",
        "fec0::1",
        "2002:7f00:0001::",
        "2001::1",
        "fe80::1%eth0",
        "fd12:3456::1",
        "ff02::1",
        "example.com",
        "",
    ],
)
def test_everything_else_is_not(host: str) -> None:
    """Loopback, private, shared, link-local, multicast, reserved, IPv4 in disguise, and what is no address."""
    assert not is_public(host)
