"""Who calls, and for which tenant.

Three modes, by settings. `none` believes the caller, and is refused on an address that others can reach. `tokens` knows
static tokens by their hashes (`libs.auth_tokens`). `jwt` checks signed tokens against the issuer's keys
(`libs.auth_jwt`), such as Kubernetes service-account tokens.

A credential travels in the metadata `authorization: Bearer …` and stands for exactly one tenant. A caller may also name
its tenant in `carillon-tenant`; in modes `tokens` and `jwt` another one than the credential's is refused (INV-8), so
that a mix-up shows instead of landing in the wrong tenant.
"""

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

from libs.errors import FieldViolation, InvalidArgument, PermissionDenied, SettingsError, Unauthenticated
from libs.rpc_context import Principal
from libs.settings import TENANT_PATTERN, AuthMode, AuthSettings

AUTHORIZATION = "authorization"
TENANT = "carillon-tenant"

# Roles that Carillon itself asks for. Mode none has them all.
OPERATOR = "operator"
ROLES = frozenset({OPERATOR})

Metadata = Iterable[tuple[str, str | bytes]]

_TENANT = re.compile(TENANT_PATTERN)
_MAX_TOKEN = 16 * 1024


class Authenticator(Protocol):
    """Turns a call's metadata into who calls."""

    async def authenticate(self, metadata: Metadata) -> Principal:
        """Raise Unauthenticated, PermissionDenied, InvalidArgument (malformed), or Unavailable (cannot tell now)."""


class TokenVerifier(Protocol):
    """Turns a bearer token into whom it stands for."""

    async def verify(self, token: str) -> Principal:
        """Raise Unauthenticated when it is not valid, PermissionDenied when it has no tenant, or Unavailable."""


class NoAuthenticator:
    """Mode none: the caller is whoever it says."""

    def __init__(self, default_tenant: str) -> None:
        self._default_tenant = default_tenant

    async def authenticate(self, metadata: Metadata) -> Principal:
        """The tenant that the caller names, or the default."""
        tenant = _tenant_named(metadata) or self._default_tenant
        return _anybody(tenant)


@lru_cache(1_024)
def _anybody(tenant: str) -> Principal:
    return Principal(tenant=tenant, subject="anybody", roles=ROLES)


class BearerAuthenticator:
    """Modes tokens and jwt: the caller is whom its token stands for."""

    def __init__(self, verifier: TokenVerifier) -> None:
        self._verifier = verifier

    async def authenticate(self, metadata: Metadata) -> Principal:
        """The token's principal; the tenant that the caller names, if any, must be the token's."""
        metadata = tuple(metadata)
        principal = await self._verifier.verify(_bearer_token(metadata))
        named = _tenant_named(metadata)
        if named is not None and named != principal.tenant:
            raise PermissionDenied(
                f"The metadata {TENANT} names another tenant than the credential stands for.",
                reason="WRONG_TENANT",
                metadata={"key": TENANT},
            )
        return principal


def authenticator_of(settings: AuthSettings) -> Authenticator:
    """What the settings ask for; SettingsError when a file they name cannot be used."""
    # Imported here because the two modes are alternatives, and cryptography is slow to load.
    if settings.mode is AuthMode.TOKENS:
        from libs.auth_tokens import TokenFile

        return BearerAuthenticator(TokenFile.opened(settings))
    if settings.mode is AuthMode.JWT:
        from libs.auth_jwt import JwtVerifier

        return BearerAuthenticator(JwtVerifier.of(settings))
    return NoAuthenticator(settings.default_tenant)


def refuse_open_server(mode: AuthMode, host: str) -> None:
    """SettingsError when anybody who reaches `host` could call without a credential."""
    if mode is AuthMode.NONE and not is_loopback(host):
        raise SettingsError(
            f"CARILLON_AUTH_MODE: none is for loopback only, and CARILLON_GRPC_HOST is {host}; use tokens or jwt.",
            reason="OPEN_SERVER",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost could resolve to anything: False."""
    if host.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def principal_for(*, tenant: object, subject: str, roles: Iterable[str]) -> Principal:
    """A verified credential's principal; PermissionDenied when what it has for a tenant cannot be one."""
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise PermissionDenied(
            "The credential is valid and names no tenant, or none that Carillon allows.", reason="NO_TENANT"
        )
    return Principal(tenant=tenant, subject=subject, roles=frozenset(roles))


def _tenant_named(metadata: Metadata) -> str | None:
    tenant = _single(metadata, TENANT)
    if tenant is not None and not _TENANT.fullmatch(tenant):
        description = "must be 1-64 letters, digits, dots, dashes and underscores, starting with a letter or digit"
        raise InvalidArgument([FieldViolation(f"metadata['{TENANT}']", description)])
    return tenant


def _bearer_token(metadata: Metadata) -> str:
    value = _single(metadata, AUTHORIZATION)
    if value is None:
        raise Unauthenticated(
            f"The metadata {AUTHORIZATION} is missing; it must be 'Bearer ' and a token.",
            reason="CREDENTIAL_MISSING",
            metadata={"key": AUTHORIZATION},
        )
    scheme, _, token = value.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN:
        raise Unauthenticated(
            f"The metadata {AUTHORIZATION} must be 'Bearer ' and a token of at most {_MAX_TOKEN} characters.",
            reason="CREDENTIAL_MALFORMED",
            metadata={"key": AUTHORIZATION},
        )
    return token


def _single(metadata: Metadata, key: str) -> str | None:
    values = [value for name, value in metadata if name == key]
    if len(values) > 1:
        raise InvalidArgument([FieldViolation(f"metadata['{key}']", "must be given once")])
    if values and not isinstance(values[0], str):
        raise InvalidArgument([FieldViolation(f"metadata['{key}']", "must be text")])
    return values[0] if values and isinstance(values[0], str) else None
