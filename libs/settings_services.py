"""A setting that registers business services: names, and where they are asked.

Operators register them, callers name them: so no caller ever chooses an address.
"""

import json
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator
from pydantic_settings import NoDecode

_NAME = re.compile(r"[a-z0-9._-]{1,64}")


def _parsed(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as err:
        raise ValueError(f"must be a JSON object, service name to URL: {err}") from err


def _checked(services: dict[str, str]) -> dict[str, str]:
    for name, url in services.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"a name is 1-64 characters of [a-z0-9._-], and {name!r} is not")
        if not _is_web_address(url):
            raise ValueError(f"{name}: must look like https://host:port/path")
        if "@" in urlsplit(url).netloc:
            raise ValueError(f"{name}: must not hold credentials; there is a setting for a token")
    return services


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # A port that is none, half an IPv6 address.
        return False


BusinessServices = Annotated[dict[str, str], NoDecode, BeforeValidator(_parsed), AfterValidator(_checked)]
"""A JSON object of names (1-64 characters of [a-z0-9._-]) and http or https URLs without credentials."""
