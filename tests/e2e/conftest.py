"""A stack that knows its callers: the four services as processes, in mode `tokens`, for all tests that need one."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.stack import Stack

TENANTS = ("shop", "bank", "odd")


def token_of(tenant: str) -> str:
    """A tenant's token."""
    return f"the-token-of-{tenant}"


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One replica of each service; every tenant of TENANTS has a token."""
    directory = tmp_path_factory.mktemp("guarded")
    tokens = directory / "tokens.json"
    tokens.write_text(json.dumps({"tokens": [_entry(tenant) for tenant in TENANTS]}))
    env = {"CARILLON_AUTH_MODE": "tokens", "CARILLON_AUTH_TOKENS_FILE": str(tokens)}
    with Stack(Path(directory / "stack"), env=env) as stack:
        yield stack


def _entry(tenant: str) -> dict[str, str]:
    return {"name": tenant, "tenant": tenant, "sha256": hashlib.sha256(token_of(tenant).encode()).hexdigest()}
