"""Who calls: metadata, token files that change, and the open mode's refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from libs.auth import BearerAuthenticator, Metadata, NoAuthenticator, authenticator_of, is_loopback, principal_for
from libs.auth_tokens import TokenFile, hash_token, new_token
from libs.errors import InvalidArgument, PermissionDenied, SettingsError, Unauthenticated
from libs.rpc_context import Principal
from libs.settings import AuthMode, AuthSettings


class FakeMonotonic:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def entry(token: str, **fields: Any) -> dict[str, Any]:
    """An entry of a token file."""
    return {"name": "backend", "sha256": hash_token(token), "tenant": "shop", **fields}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    """A token file with these entries, always a new one, as Kubernetes does it."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"tokens": entries}))
    return fresh.replace(path)


def bearer(token: str) -> Metadata:
    """Metadata with a credential."""
    return [("authorization", f"Bearer {token}")]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "unix:/run/c.sock"])
def test_loopback_is_what_only_this_machine_reaches(host: str) -> None:
    """Mode none is allowed there."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com", "localhost.example.com", ""])
def test_anything_else_is_not_loopback(host: str) -> None:
    """A name could resolve to anything."""
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Basic abc")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer " + "x" * 17_000)],
    ],
    ids=["another scheme", "no token", "an empty token", "a huge token"],
)
async def test_a_malformed_credential_is_unauthenticated(metadata: Metadata, tmp_path: Path) -> None:
    """And the key it belongs under is named."""
    verifier = TokenFile(write(tmp_path / "tokens", entry("t")), check_every_s=5)
    with pytest.raises(Unauthenticated) as caught:
        await BearerAuthenticator(verifier).authenticate(metadata)
    assert caught.value.metadata == {"key": "authorization"}


async def test_a_credential_given_twice_is_refused() -> None:
    """Which one counts would be a guess."""
    metadata = [("carillon-tenant", "a"), ("carillon-tenant", "b")]
    with pytest.raises(InvalidArgument):
        await NoAuthenticator("default").authenticate(metadata)


async def test_naming_the_credentials_own_tenant_is_fine(tmp_path: Path) -> None:
    """Only another one is refused (INV-8)."""
    authenticator = BearerAuthenticator(TokenFile(write(tmp_path / "tokens", entry("t")), check_every_s=5))
    principal = await authenticator.authenticate([*bearer("t"), ("carillon-tenant", "shop")])
    assert principal.tenant == "shop"
    with pytest.raises(PermissionDenied):
        await authenticator.authenticate([*bearer("t"), ("carillon-tenant", "acme")])


@pytest.mark.parametrize("tenant", [None, 7, "", "a/b", "-a", "a" * 65, "türe", ["a"]])
def test_a_credential_without_a_proper_tenant_is_denied(tenant: object) -> None:
    """It is valid, and stands for nobody."""
    with pytest.raises(PermissionDenied):
        principal_for(tenant=tenant, subject="x", roles=())


async def test_each_token_stands_for_its_own_tenant_and_roles(tmp_path: Path) -> None:
    """From YAML, salted or not."""
    file = tmp_path / "tokens.yaml"
    file.write_text(
        f"""
        tokens:
          - {{name: a, sha256: {hash_token("one")}, tenant: shop}}
          - {{name: b, sha256: {hash_token("two", salt="5c1a")}, salt: "5c1a", tenant: bank, roles: [operator]}}
        """
    )
    tokens = TokenFile(file, check_every_s=5)
    assert await tokens.verify("one") == Principal(tenant="shop", subject="a")
    assert await tokens.verify("two") == Principal(tenant="bank", subject="b", roles=frozenset({"operator"}))
    with pytest.raises(Unauthenticated):
        await tokens.verify("three")


async def test_a_changed_file_is_read_again_when_it_is_looked_at(tmp_path: Path) -> None:
    """A token can be added and withdrawn without a restart."""
    clock = FakeMonotonic()
    file = write(tmp_path / "tokens", entry("old"))
    tokens = TokenFile(file, check_every_s=5, monotonic=clock)
    write(file, entry("new"))
    assert (await tokens.verify("old")).tenant == "shop"
    clock.now += 5
    assert (await tokens.verify("new")).tenant == "shop"
    with pytest.raises(Unauthenticated):
        await tokens.verify("old")


@pytest.mark.parametrize("content", ["{", "tokens: 7", "", None], ids=["not YAML", "wrong form", "empty", "gone"])
async def test_a_file_that_breaks_leaves_the_tokens_as_they_were(tmp_path: Path, content: str | None) -> None:
    """A slip in a secret must not lock everybody out."""
    clock = FakeMonotonic()
    file = write(tmp_path / "tokens", entry("t"))
    tokens = TokenFile(file, check_every_s=5, monotonic=clock)
    file.unlink() if content is None else file.write_text(content)
    clock.now += 5
    assert (await tokens.verify("t")).tenant == "shop"
    write(file, entry("next"))
    clock.now += 5
    assert (await tokens.verify("next")).tenant == "shop"


@pytest.mark.parametrize(
    "entries",
    [[entry("t", sha256="secret-in-plain-text")], [entry("t", tenant="a/b")], [entry("t", tenat="x")]],
    ids=["no hash", "no tenant name", "unknown field"],
)
def test_a_wrong_file_stops_the_start_without_showing_its_content(
    tmp_path: Path, entries: list[dict[str, Any]]
) -> None:
    """Somebody may have put the token itself there."""
    settings = AuthSettings(mode=AuthMode.TOKENS, tokens_file=write(tmp_path / "tokens", *entries))
    with pytest.raises(SettingsError) as caught:
        authenticator_of(settings)
    assert "secret-in-plain-text" not in caught.value.message


def test_new_tokens_are_random_and_long() -> None:
    """256 bits: there is nothing to guess."""
    assert new_token() != new_token()
    assert len(new_token()) >= 43
