"""Signed tokens: what passes, what does not, and keys that rotate, go stale or cannot be had."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from libs.auth_jwt import JwtVerifier, KeySet, claim_at
from libs.errors import PermissionDenied, SettingsError, Unauthenticated, Unavailable
from libs.settings import AuthMode, AuthSettings
from tests.unit.test_auth import FakeMonotonic

ISSUER, AUDIENCE = "https://kubernetes.default.svc", "carillon"
FAR_FUTURE, LONG_AGO = 4_102_444_800, 1_000_000_000

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def rsa_jwk(key: rsa.RSAPrivateKey, kid: str) -> dict[str, Any]:
    """The public half as a JWK."""
    return {**json.loads(RSAAlgorithm.to_jwk(key.public_key())), "kid": kid, "alg": "RS256", "use": "sig"}


JWKS = {
    "keys": [
        rsa_jwk(RSA_KEY, "rsa"),
        {**json.loads(ECAlgorithm.to_jwk(EC_KEY.public_key())), "kid": "ec", "alg": "ES256", "use": "sig"},
    ]
}


def service_account(namespace: str = "shop", **claims: Any) -> dict[str, Any]:
    """The claims of a Kubernetes service-account token."""
    return {
        "iss": ISSUER,
        "aud": [AUDIENCE],
        "exp": FAR_FUTURE,
        "sub": f"system:serviceaccount:{namespace}:backend",
        "kubernetes.io": {"namespace": namespace, "serviceaccount": {"name": "backend"}},
        **claims,
    }


def signed(claims: Mapping[str, Any], *, kid: str | None = "rsa", key: Any = RSA_KEY, algorithm: str = "RS256") -> str:
    """A token with these claims; a claim of None is left out."""
    present = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(present, key, algorithm=algorithm, headers={"kid": kid} if kid else None)


def settings_for(**changes: Any) -> AuthSettings:
    """Mode jwt."""
    fields = {"jwks_url": "http://127.0.0.1:1/jwks", "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, **changes}
    return AuthSettings(mode=AuthMode.JWT, **fields)


class Issuer:
    """Publishes keys; counts how often it was asked."""

    def __init__(self, document: object = JWKS) -> None:
        self.document: object = document
        self.fetches = 0
        self.is_down = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def __call__(self) -> bytes:
        self.fetches += 1
        await asyncio.sleep(0)
        await self.answers.wait()
        if self.is_down:
            raise ConnectionRefusedError
        return json.dumps(self.document).encode()


def verifier(issuer: Issuer, clock: FakeMonotonic | None = None, **changes: Any) -> JwtVerifier:
    """A verifier of this issuer's tokens."""
    settings = settings_for(**changes)
    return JwtVerifier(settings, KeySet(issuer, settings, monotonic=clock or FakeMonotonic()))


async def test_a_service_account_token_stands_for_its_namespace() -> None:
    """INV-8: the tenant is the claim's."""
    principal = await verifier(Issuer()).verify(signed(service_account("shop")))
    assert principal.tenant == "shop"
    assert principal.subject == "system:serviceaccount:shop:backend"
    assert principal.roles == frozenset()


async def test_an_elliptic_curve_key_does_as_well() -> None:
    """ES256 is on the list of algorithms."""
    token = signed(service_account(), kid="ec", key=EC_KEY, algorithm="ES256")
    assert (await verifier(Issuer()).verify(token)).tenant == "shop"


@pytest.mark.parametrize("roles", [["operator"], "operator reader"])
async def test_roles_come_from_a_claim_where_one_is_set(roles: object) -> None:
    """A list, or one string."""
    token = signed(service_account(groups=roles))
    principal = await verifier(Issuer(), jwt_roles_claim="groups").verify(token)
    assert "operator" in principal.roles


async def test_a_service_account_is_an_operator_when_it_is_named_as_one() -> None:
    """By its whole subject: not another account of its namespace, and not the same name elsewhere."""
    checking = verifier(Issuer(), jwt_operators=("system:serviceaccount:shop:backend",))
    named = await checking.verify(signed(service_account("shop")))
    elsewhere = await checking.verify(signed(service_account("bakery")))
    beside = await checking.verify(signed(service_account("shop", sub="system:serviceaccount:shop:backend2")))
    assert (named.tenant, named.roles) == ("shop", frozenset({"operator"}))
    assert elsewhere.roles == beside.roles == frozenset()


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": LONG_AGO}, "expired"),
        ({"exp": None}, "lacks"),
        ({"nbf": FAR_FUTURE}, "not valid yet"),
        ({"aud": "somebody-else"}, "audience"),
        ({"aud": None}, "lacks"),
        ({"iss": "https://evil.example"}, "issuer"),
        ({"iss": None}, "lacks"),
    ],
)
async def test_a_token_that_is_not_for_us_now_is_unauthenticated(claims: dict[str, Any], why: str) -> None:
    """The caller learns which check failed."""
    with pytest.raises(Unauthenticated, match=why):
        await verifier(Issuer()).verify(signed(service_account(**claims)))


async def test_a_token_signed_by_somebody_else_is_unauthenticated() -> None:
    """Even under a key id of ours."""
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with pytest.raises(Unauthenticated):
        await verifier(Issuer()).verify(signed(service_account(), key=other))


async def test_an_unsigned_token_is_unauthenticated() -> None:
    """Algorithm none."""
    with pytest.raises(Unauthenticated, match="algorithm"):
        await verifier(Issuer()).verify(signed(service_account(), key=None, algorithm="none"))


async def test_a_token_signed_with_the_public_key_as_a_secret_is_unauthenticated() -> None:
    """HS256 over public knowledge, the classic confusion."""
    token = signed(service_account(), key="a public key, as everybody knows it", algorithm="HS256")
    with pytest.raises(Unauthenticated, match="algorithm"):
        await verifier(Issuer()).verify(token)


async def test_a_key_serves_its_own_algorithm_only() -> None:
    """An RSA key published for RS256 does not verify RS512."""
    token = signed(service_account(), algorithm="RS512")
    with pytest.raises(Unauthenticated):
        await verifier(Issuer(), jwt_algorithms=("RS256", "RS512")).verify(token)


@pytest.mark.parametrize("token", ["", "abc", "a.b.c", "e30.e30.", "ü.ü.ü"])
async def test_what_is_no_jwt_is_unauthenticated(token: str) -> None:
    """Never an internal error."""
    with pytest.raises(Unauthenticated):
        await verifier(Issuer()).verify(token)


async def test_a_token_without_a_tenant_is_denied_and_the_claim_named() -> None:
    """It is valid, and stands for no tenant."""
    claims = {**service_account(), "kubernetes.io": {}}
    with pytest.raises(PermissionDenied) as caught:
        await verifier(Issuer()).verify(signed(claims))
    assert caught.value.metadata == {"claim": "kubernetes.io/namespace"}


def test_a_claim_is_found_by_its_path() -> None:
    """With / between levels, and keys that hold a / themselves."""
    claims = {"kubernetes.io": {"namespace": "shop"}, "https://acme.example/tenant": "acme", "flat": "f"}
    assert claim_at(claims, "kubernetes.io/namespace") == "shop"
    assert claim_at(claims, "https://acme.example/tenant") == "acme"
    assert claim_at(claims, "flat") == "f"
    assert claim_at(claims, "flat/deeper") is None
    assert claim_at(claims, "nowhere") is None


async def test_keys_are_fetched_once_for_many_callers() -> None:
    """The others wait for the fetch under way."""
    issuer = Issuer()
    jwts = verifier(issuer)
    token = signed(service_account())
    await asyncio.gather(*(jwts.verify(token) for _ in range(20)))
    assert issuer.fetches == 1


async def test_a_rotated_key_is_found_at_once() -> None:
    """An unknown key id causes a fetch."""
    issuer, clock = Issuer({"keys": [rsa_jwk(RSA_KEY, "first")]}), FakeMonotonic()
    jwts = verifier(issuer, clock)
    await jwts.verify(signed(service_account(), kid="first"))
    issuer.document = JWKS
    clock.now += 10
    assert (await jwts.verify(signed(service_account(), kid="rsa"))).tenant == "shop"
    with pytest.raises(Unauthenticated, match="no key"):
        await jwts.verify(signed(service_account(), kid="first"))


async def test_forged_key_ids_do_not_flood_the_issuer() -> None:
    """At most one fetch per interval, whatever callers send."""
    issuer, clock = Issuer(), FakeMonotonic()
    jwts = verifier(issuer, clock)
    for number in range(50):
        with pytest.raises(Unauthenticated):
            await jwts.verify(signed(service_account(), kid=f"forged-{number}"))
    assert issuer.fetches == 1


async def test_a_caller_who_gives_up_does_not_end_the_fetch() -> None:
    """Nobody, impatient or hostile, keeps the others from having keys."""
    issuer = Issuer()
    issuer.answers.clear()
    jwts = verifier(issuer)
    impatient = asyncio.create_task(jwts.verify(signed(service_account(), kid="forged")))
    patient = asyncio.create_task(jwts.verify(signed(service_account())))
    while not issuer.fetches:  # noqa: ASYNC110 - until both wait.
        await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.wait([impatient])
    issuer.answers.set()
    assert (await patient).tenant == "shop"
    assert (await jwts.verify(signed(service_account()))).tenant == "shop"
    assert issuer.fetches == 1


async def test_a_new_key_of_an_issuer_that_is_down_is_unavailable() -> None:
    """It may have just been rotated in: we cannot tell, and the caller is not to throw its token away."""
    issuer, clock = Issuer(), FakeMonotonic()
    jwts = verifier(issuer, clock)
    await jwts.verify(signed(service_account()))
    issuer.is_down = True
    clock.now += 60
    for _ in range(2):  # The second one is too soon to ask again.
        with pytest.raises(Unavailable):
            await jwts.verify(signed(service_account(), kid="rotated"))
    assert (await jwts.verify(signed(service_account()))).tenant == "shop"
    issuer.is_down = False
    clock.now += 60
    with pytest.raises(Unauthenticated, match="no key"):
        await jwts.verify(signed(service_account(), kid="rotated"))


async def test_old_keys_stay_in_use_while_the_issuer_is_down() -> None:
    """For a bounded time; after it we cannot tell, which is not the caller's fault."""
    issuer, clock = Issuer(), FakeMonotonic()
    jwts = verifier(issuer, clock, jwks_lifetime="10m", jwks_max_stale="1h")
    token = signed(service_account())
    await jwts.verify(token)
    issuer.is_down = True
    clock.now += 69 * 60
    assert (await jwts.verify(token)).tenant == "shop"
    clock.now += 2 * 60
    with pytest.raises(Unavailable):
        await jwts.verify(token)
    issuer.is_down = False
    clock.now += 60
    assert (await jwts.verify(token)).tenant == "shop"


@pytest.mark.parametrize("document", [{}, {"keys": []}, {"keys": [{"kty": "RSA"}]}, {"keys": [7]}, [], "text"])
async def test_an_issuer_that_talks_nonsense_is_unavailable(document: object) -> None:
    """Not the caller's fault either."""
    with pytest.raises(Unavailable):
        await verifier(Issuer(document)).verify(signed(service_account()))


async def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    """For clusters whose API server cannot be reached."""
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(JWKS))
    jwts = JwtVerifier.of(settings_for(jwks_url=None, jwks_file=file))
    assert (await jwts.verify(signed(service_account()))).tenant == "shop"


def test_a_file_that_is_no_jwks_stops_the_start(tmp_path: Path) -> None:
    """Instead of refusing every caller later."""
    file = tmp_path / "jwks.json"
    file.write_text("{}")
    with pytest.raises(SettingsError, match="CARILLON_AUTH_JWKS_FILE"):
        JwtVerifier.of(settings_for(jwks_url=None, jwks_file=file))


async def test_keys_are_fetched_over_http_with_our_own_credential(tmp_path: Path) -> None:
    """As the Kubernetes API server wants it."""
    seen: list[str] = []

    async def jwks(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        return web.json_response(JWKS)

    app = web.Application()
    app.router.add_get("/openid/v1/jwks", jwks)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        (tmp_path / "token").write_text("our-own\n")
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/openid/v1/jwks"
        jwts = JwtVerifier.of(settings_for(jwks_url=url, jwks_token_file=tmp_path / "token"))
        assert (await jwts.verify(signed(service_account()))).tenant == "shop"
    finally:
        await runner.cleanup()
    assert seen == ["Bearer our-own"]
