"""A stack that knows its callers: the four services as processes, in mode `tokens`, for all tests that need one."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.stack import Stack
from tests.support.servers import scratch_directory

TENANTS = ("shop", "bank", "odd")


def token_of(tenant: str) -> str:
    """A tenant's token."""
    return f"the-token-of-{tenant}"


@pytest.fixture(scope="package")  # Not for longer: four idle services are a twentieth of a core.
def guarded() -> Iterator[Stack]:
    """One replica of each service; every tenant of TENANTS has a token."""
    with scratch_directory() as directory, Stack(directory / "stack", env=guarded_env(directory)) as stack:
        yield stack


def guarded_env(directory: Path) -> dict[str, str]:
    """What a stack's services are told to be so, with a file in this directory."""
    tokens = directory / "tokens.json"
    tokens.write_text(json.dumps({"tokens": [_entry(tenant) for tenant in TENANTS]}))
    return {"CARILLON_AUTH_MODE": "tokens", "CARILLON_AUTH_TOKENS_FILE": str(tokens)}


def _entry(tenant: str) -> dict[str, str]:
    return {"name": tenant, "tenant": tenant, "sha256": hashlib.sha256(token_of(tenant).encode()).hexdigest()}
