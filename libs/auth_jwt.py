"""Mode jwt: signed tokens, verified against the issuer's keys (JWKS, RFC 7517), from a URL or a file.

Only the algorithms in the settings are accepted, and a key only for its own algorithm, so neither `none` nor a public
key abused as an HMAC secret passes. Issuer, audience and expiry are required.

Keys are fetched when first needed, after their lifetime, and when a token names a key id that is not among them (the
issuer rotates its keys), at most once per `jwks_min_interval`. One fetch runs at a time, and callers wait for it. It is
nobody's own: a caller who gives up ends its waiting, not the fetch, or impatient callers would keep all others from
ever having keys. While the issuer cannot be reached the old keys stay in use, up to `jwks_max_stale` past their
lifetime; then, for a key id that is not among them, and when there never were any, calls are UNAVAILABLE: we cannot
tell, which is not the caller's fault.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp
import jwt

from libs.auth import OPERATOR, principal_for
from libs.errors import PermissionDenied, SettingsError, Unauthenticated, Unavailable
from libs.rpc_context import Principal
from libs.settings import AuthSettings
from libs.telemetry.logs import get_logger

_log = get_logger(__name__)

_FETCH_TIMEOUT_S = 5
_MAX_JWKS_BYTES = 1 << 20

Fetch = Callable[[], Awaitable[bytes]]


class KeySet:
    """The issuer's current keys, by key id."""

    def __init__(
        self, fetch: Fetch, settings: AuthSettings, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._fetch = fetch
        self._lifetime_s = settings.jwks_lifetime.total_seconds()
        self._max_stale_s = settings.jwks_max_stale.total_seconds()
        self._min_interval_s = settings.jwks_min_interval.total_seconds()
        self._monotonic = monotonic
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._has_failed = False
        self._fetching: asyncio.Task[None] | None = None

    async def key(self, key_id: str | None) -> jwt.PyJWK | None:
        """The key, or None when the issuer has no such key; Unavailable when that cannot be told."""
        is_usable = self._find(key_id) is not None and self._age() <= self._lifetime_s + self._max_stale_s
        is_being_fetched = self._fetching is not None
        if self._is_needed(key_id) and not (is_usable and is_being_fetched):
            await self._refresh()
        key = self._find(key_id)
        if self._age() > self._lifetime_s + self._max_stale_s or (key is None and self._has_failed):
            raise Unavailable("The keys of the token issuer cannot be fetched.", reason="ISSUER_UNAVAILABLE")
        return key

    async def _refresh(self) -> None:
        """Wait for the fetch under way, or for one begun now unless it is too soon."""
        if self._fetching is None:
            if self._monotonic() - self._tried_at < self._min_interval_s:
                return
            self._tried_at = self._monotonic()
            self._fetching = asyncio.create_task(self._fetch_once(), name="jwks")
        await asyncio.shield(self._fetching)

    async def _fetch_once(self) -> None:
        try:
            self._keys = _keys_in(await self._fetch())
        except Exception as error:  # noqa: BLE001 - the outermost frame of a task; whatever it is, there are no keys.
            self._has_failed = True
            _log.error("The keys of the token issuer cannot be fetched.", error=repr(error))
        else:
            self._has_failed = False
            self._fetched_at = self._monotonic()
            _log.info("Fetched the keys of the token issuer.", keys=len(self._keys))
        finally:
            self._fetching = None

    def _is_needed(self, key_id: str | None) -> bool:
        return self._age() > self._lifetime_s or self._find(key_id) is None

    def _find(self, key_id: str | None) -> jwt.PyJWK | None:
        """A token without a key id is fine where there is one key only."""
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(key_id)

    def _age(self) -> float:
        return self._monotonic() - self._fetched_at


class JwtVerifier:
    """Verifies tokens and reads tenant and roles from their claims."""

    def __init__(self, settings: AuthSettings, keys: KeySet) -> None:
        self._settings = settings
        self._keys = keys

    @classmethod
    def of(cls, settings: AuthSettings) -> Self:
        """With keys from where the settings say; SettingsError when their file cannot be used."""
        if settings.jwks_file is not None:
            _check_file(settings.jwks_file)
            path = settings.jwks_file

            async def read() -> bytes:
                return await asyncio.to_thread(path.read_bytes)

            return cls(settings, KeySet(read, settings))
        return cls(settings, KeySet(JwksUrl(settings), settings))

    async def verify(self, token: str) -> Principal:
        """Whom the token stands for; Unauthenticated when it is not valid, now or at all."""
        key = await self._key_for(token)
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(self._settings.jwt_algorithms),
                audience=self._settings.jwt_audience,
                issuer=self._settings.jwt_issuer,
                leeway=self._settings.jwt_leeway,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError as err:
            raise _invalid(_sentence(err)) from err
        return self._principal(claims)

    async def _key_for(self, token: str) -> jwt.PyJWK:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError as err:
            raise _invalid("it is not a JWT") from err
        if header.get("alg") not in self._settings.jwt_algorithms:
            raise _invalid("its algorithm is not allowed")
        key = await self._keys.key(header.get("kid"))
        if key is None:
            raise _invalid("the issuer has no key with its key id")
        return key

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        tenant = claim_at(claims, self._settings.jwt_tenant_claim)
        if tenant is None:
            claim = self._settings.jwt_tenant_claim
            raise PermissionDenied(
                f"The token has no claim {claim} to name its tenant.", reason="NO_TENANT", metadata={"claim": claim}
            )
        roles = claim_at(claims, self._settings.jwt_roles_claim) if self._settings.jwt_roles_claim else None
        subject = str(claims.get("sub", ""))
        given = [OPERATOR] if subject in self._settings.jwt_operators else []
        return principal_for(tenant=tenant, subject=subject, roles=[*_roles(roles), *given])


class JwksUrl:
    """Fetches the keys over HTTP: no redirects, bounded in time and size."""

    def __init__(self, settings: AuthSettings) -> None:
        self._url = settings.jwks_url or ""
        self._token_file = settings.jwks_token_file
        try:
            self._tls = ssl.create_default_context(cafile=settings.jwks_ca_file)
        except (OSError, ssl.SSLError) as err:
            raise SettingsError(f"CARILLON_AUTH_JWKS_CA_FILE: {settings.jwks_ca_file} cannot be used: {err}.") from err

    async def __call__(self) -> bytes:
        """The document; aiohttp.ClientError, OSError, TimeoutError or ValueError when it cannot be had."""
        headers = {"Accept": "application/jwk-set+json, application/json"}
        if self._token_file is not None:
            token = await asyncio.to_thread(self._token_file.read_text)
            headers["Authorization"] = f"Bearer {token.strip()}"
        timeout = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(self._url, headers=headers, ssl=self._tls, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise ValueError(f"{self._url} answered {response.status}")
            content = await response.content.read(_MAX_JWKS_BYTES)
            while more := await response.content.read(_MAX_JWKS_BYTES):
                content += more
                if len(content) > _MAX_JWKS_BYTES:
                    raise ValueError(f"{self._url} answered more than {_MAX_JWKS_BYTES} bytes")
            return content


def claim_at(claims: Mapping[str, Any], path: str) -> object:
    """The claim at a path with / between its levels; a key that holds a / itself is found too. None: there is none.

    `kubernetes.io/namespace` is `claims["kubernetes.io"]["namespace"]`; `https://acme.example/tenant` is one key.
    """
    if path in claims:
        return claims[path]
    first, _, rest = path.partition("/")
    inner = claims.get(first)
    return claim_at(inner, rest) if rest and isinstance(inner, Mapping) else None


def _keys_in(document: bytes) -> dict[str | None, jwt.PyJWK]:
    """The usable keys of a JWKS; ValueError or PyJWTError when there are none."""
    content = json.loads(document)
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(key, dict) for key in listed):
        raise ValueError("the answer is not a JWKS")
    return {key.key_id: key for key in jwt.PyJWKSet(listed).keys if key.public_key_use in (None, "sig")}


def _roles(claim: object) -> list[str]:
    if isinstance(claim, str):
        return claim.split()
    return [role for role in claim if isinstance(role, str)] if isinstance(claim, list) else []


def _sentence(error: jwt.PyJWTError) -> str:
    """What is wrong, without anything from the token."""
    sentences: dict[type[jwt.PyJWTError], str] = {
        jwt.ExpiredSignatureError: "it has expired",
        jwt.ImmatureSignatureError: "it is not valid yet",
        jwt.InvalidAudienceError: "it is for another audience",
        jwt.InvalidIssuerError: "it is from another issuer",
        jwt.MissingRequiredClaimError: "it lacks one of the claims exp, iss and aud",
    }
    return sentences.get(type(error), "its signature or form is wrong")


def _invalid(why: str) -> Unauthenticated:
    return Unauthenticated(f"The token is not valid: {why}.", reason="CREDENTIAL_INVALID")


def _check_file(path: Path) -> None:
    try:
        _keys_in(path.read_bytes())
    except (OSError, ValueError, jwt.PyJWTError) as err:
        raise SettingsError(f"CARILLON_AUTH_JWKS_FILE: {path} is not a JWKS: {err}.") from err
