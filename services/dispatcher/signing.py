"""Which secrets sign a tenant's webhooks: what the file with the secrets says. Pure.

Several signatures are how Standard Webhooks rotates secrets: every secret of a tenant signs, and a receiver accepts
what one of them signed. Whoever can verify with a secret can also sign with it, so one that two tenants share would let
the receivers of each forge messages to the other's.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated

import pydantic
import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from standardwebhooks.webhooks import Webhook

from libs.settings import TENANT_PATTERN

EVERYBODY = "*"
"""Whom a file without tenants is for; in a file with tenants, all that it does not name."""

_Tenant = Annotated[str, Field(pattern=rf"{TENANT_PATTERN}|^\*$")]
_Secrets = Annotated[tuple[str, ...], Field(min_length=1, max_length=10)]
_FILE: TypeAdapter[dict[_Tenant, _Secrets]] = TypeAdapter(
    dict[_Tenant, _Secrets], config=ConfigDict(hide_input_in_errors=True)
)
_SECRET = re.compile(r"(whsec_)?[A-Za-z0-9+/]{32,}={0,2}")
_EPOCH = datetime.fromtimestamp(0, UTC)

Keys = Mapping[str, tuple[Webhook, ...]]


def parse_keys(content: bytes) -> Keys:
    """A file's secrets, in its order; ValueError, which shows none of them, when they cannot be used."""
    try:
        named = _named(content.decode())
        keys = {tenant: tuple(_webhook(tenant, one) for one in secrets) for tenant, secrets in named.items()}
    except yaml.YAMLError:
        raise ValueError("it has a colon, and is neither YAML nor JSON") from None
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(_problems(error))) from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    _check_nobody_shares(keys)
    return keys


def keys_of(keys: Keys, tenant: str) -> tuple[Webhook, ...]:
    """What signs for a tenant: its own, or what everybody has who has none."""
    own = keys.get(tenant)
    return keys.get(EVERYBODY, ()) if own is None else own


def _named(text: str) -> Mapping[str, tuple[str, ...]]:
    """Secrets by tenant. Neither a secret nor its prefix has a colon in it, a mapping always has."""
    lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    if not any(":" in line for line in lines):
        if not lines:
            raise ValueError("it holds no secret")
        return {EVERYBODY: tuple(lines)}
    given = yaml.safe_load(text)
    if isinstance(given, dict) and any(str(tenant).startswith("whsec_") for tenant in given):
        raise ValueError("a secret stands where a tenant should")  # Problems below name the tenant.
    return _FILE.validate_python(given)


def _webhook(tenant: str, secret: str) -> Webhook:
    if not _SECRET.fullmatch(secret):
        raise ValueError(f"what stands for {tenant} is not `whsec_` and at least 24 bytes in Base64")
    return Webhook(secret)


def _check_nobody_shares(keys: Keys) -> None:
    """By what they sign, because the same secret can be written in several ways."""
    owners: dict[str, str] = {}
    for tenant, webhooks in keys.items():
        for webhook in webhooks:
            owner = owners.setdefault(webhook.sign("", _EPOCH, ""), tenant)
            if owner != tenant:
                raise ValueError(f"{owner} and {tenant} have a secret in common, so each could sign for the other")


def _problems(error: pydantic.ValidationError) -> Iterator[str]:
    """Whose secrets and what, at most ten."""
    for part in error.errors(include_input=False, include_url=False)[:10]:
        yield f"{'.'.join(map(str, part['loc'][:1])) or 'the file'}: {part['msg']}"
