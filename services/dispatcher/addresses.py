"""What may be sent to: which addresses are well-formed, where they lead, and which networks are out of bounds. Pure.

An address that fails here never reaches a header, a command or a resolver.
"""

import re
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

MAX_EMAIL = 254  # RFC 5321 §4.5.3.1.3, less the angle brackets.
MAX_ADDRESS = 2_048

# RFC 5321's Mailbox without quoted local parts and address literals, which nobody's customers have; UTF-8 as in
# RFC 6531. Printable is checked apart, because \w and friends let some invisible characters pass.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\u0080-\U0010ffff-]+"
_LABEL = r"[A-Za-z0-9\u0080-\U0010ffff](?:[A-Za-z0-9\u0080-\U0010ffff-]{0,61}[A-Za-z0-9\u0080-\U0010ffff])?"
_EMAIL = re.compile(rf"(?P<local>{_ATOM}(?:\.{_ATOM})*)@(?P<domain>{_LABEL}(?:\.{_LABEL})*)")
# Apprise itself takes several URLs in one text, apart by commas or spaces, wherever another schema follows.
_APPRISE = re.compile(r"[a-z][a-z0-9]{1,31}://(?:(?!://)[!-~])+")
_PORTS = {"http": 80, "https": 443}
_NAT64 = IPv6Network("64:ff9b::/96")
# Of the IANA registries of special addresses, what older Pythons take for global: 192.0.0.192 serves a cloud's secrets.
_SPECIAL = (
    *(IPv4Network("192.0.0.0/24"), IPv6Network("64:ff9b:1::/48"), IPv6Network("3fff::/20")),
    *(IPv6Network("5f00::/16"), IPv6Network("fec0::/10")),
)


def is_valid_address(channel: str, address: str) -> bool:
    """Whether a channel can be asked to send there at all."""
    if not 0 < len(address) <= MAX_ADDRESS or not address.isprintable():
        return False
    match channel:
        case "email":
            return is_email(address)
        case "webhook":
            return webhook_url(address) is not None
        case "apprise":
            return apprise_parts(address) is not None
        case _:
            return True


def is_email(address: str) -> bool:
    """Whether it is one bare mailbox, `local@domain`, and nothing around it."""
    match = _EMAIL.fullmatch(address)
    return match is not None and len(address.encode()) <= MAX_EMAIL and len(match["local"].encode()) <= 64


def webhook_url(address: str) -> SplitResult | None:
    """The parts of an http(s) URL with a host and without credentials; None for anything else."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return None
    is_url = parts.scheme in _PORTS and bool(parts.hostname) and "@" not in parts.netloc and port != 0
    return parts if is_url and " " not in address and "\\" not in address else None


def apprise_parts(address: str) -> SplitResult | None:
    """The parts of one URL of Apprise's, `schema://…`; None for anything else, such as several in one."""
    match = _APPRISE.fullmatch(address)
    if match is None:
        return None
    try:
        return urlsplit(address)
    except ValueError:
        return None


def destination_of(channel: str, address: str) -> str:
    """What concurrency, rates and breakers are kept by within a channel. Empty: by the channel alone.

    A webhook's `host:port`. An Apprise address as a whole, by a digest, because it is a secret.
    """
    if channel == "webhook" and (parts := webhook_url(address)) is not None:
        return f"{parts.hostname}:{parts.port or _PORTS[parts.scheme]}"
    if channel == "apprise" and (parts := apprise_parts(address)) is not None:
        return f"{parts.scheme}:{sha256(address.encode()).hexdigest()[:16]}"
    return ""


def is_public(host: str) -> bool:
    """Whether an IP address is on the public internet, seen through the disguises an IPv4 address can wear in IPv6.

    False for anything that is not an IP address: what cannot be judged is not connected to.
    """
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    inner = _embedded_ipv4(address) if isinstance(address, IPv6Address) else None
    meant = inner or address
    return meant.is_global and not meant.is_multicast and not any(meant in network for network in _SPECIAL)


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a mapped, 6to4, NAT64 or "compatible" IPv6 address leads to."""
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address in _NAT64 or int(address) >> 32 == 0:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None
