"""Mode tokens: static tokens, known by their hashes, from a YAML or JSON file.

    tokens:
      - name: shop-backend            # for logs
        sha256: 9f86d0…               # of the token, 64 hexadecimal digits; of salt + token where there is a salt
        salt: 5c1a                    # optional
        tenant: shop
        roles: [operator]             # optional

A plain SHA-256 is enough because tokens are random (`new_token`, 256 bits): there is nothing to guess that a slow hash
would slow down. Every comparison is constant-time and every entry is compared, so timing tells nothing. The file is
read again when it changes; one that cannot be read then leaves the tokens as they were, and is logged.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from libs.auth import principal_for
from libs.errors import SettingsError, Unauthenticated
from libs.rpc_context import Principal
from libs.settings import TENANT_PATTERN, AuthSettings
from libs.telemetry.logs import get_logger

_log = get_logger(__name__)

_MAX_FILE_BYTES = 1 << 20


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=128)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    salt: str = Field("", max_length=128)
    tenant: str = Field(pattern=TENANT_PATTERN)
    roles: frozenset[Annotated[str, Field(min_length=1, max_length=64)]] = frozenset()


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tokens: tuple[_Entry, ...] = Field(max_length=1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileVersion:
    """What tells one content of a file from the next without reading it."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The version there now, through symlinks (Kubernetes swaps those); OSError when there is none."""
        stat = path.stat()
        return cls(inode=stat.st_ino, size=stat.st_size, modified_ns=stat.st_mtime_ns)


class TokenFile:
    """Verifies tokens against the file's current content."""

    def __init__(self, path: Path, *, check_every_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Reads the file; SettingsError when it cannot be used."""
        self._path = path
        self._check_every_s = check_every_s
        self._monotonic = monotonic
        self._version = self._seen_version()
        self._entries = read_tokens(path)
        self._next_check_at = monotonic() + check_every_s

    @classmethod
    def opened(cls, settings: AuthSettings) -> Self:
        """As the settings say, which have made sure that there is a path."""
        if settings.tokens_file is None:
            raise SettingsError("CARILLON_AUTH_TOKENS_FILE: required in mode tokens.")
        return cls(settings.tokens_file, check_every_s=settings.tokens_reload.total_seconds())

    async def verify(self, token: str) -> Principal:
        """Whom the token stands for; Unauthenticated when it is not in the file."""
        await self._reload_if_changed()
        found: _Entry | None = None
        for entry in self._entries:
            if hmac.compare_digest(hash_token(token, salt=entry.salt), entry.sha256):
                found = entry
        if found is None:
            raise Unauthenticated("The token is not known.", reason="CREDENTIAL_INVALID")
        return principal_for(tenant=found.tenant, subject=found.name, roles=found.roles)

    async def _reload_if_changed(self) -> None:
        now = self._monotonic()
        if now < self._next_check_at:
            return
        self._next_check_at = now + self._check_every_s
        version = self._seen_version()
        if version == self._version:
            return
        try:
            self._entries = await asyncio.to_thread(read_tokens, self._path)
        except SettingsError as error:
            _log.error("The token file has changed and cannot be used; the tokens stay as they were.", error=str(error))
        else:
            _log.info("Read the token file again, because it has changed.", tokens=len(self._entries))
        self._version = version

    def _seen_version(self) -> FileVersion | None:
        try:
            return FileVersion.of(self._path)
        except OSError:
            return None


def read_tokens(path: Path) -> tuple[_Entry, ...]:
    """The entries of the file; SettingsError, with every problem and no hash, when it cannot be used."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise SettingsError(f"{path} is longer than {_MAX_FILE_BYTES} bytes.")
        return _File.model_validate(yaml.safe_load(content)).tokens
    except OSError as err:
        raise SettingsError(f"{path} cannot be read: {err.strerror}.") from err
    except yaml.YAMLError as err:
        raise SettingsError(f"{path} is neither YAML nor JSON.") from err
    except pydantic.ValidationError as err:
        problems = (f"{'.'.join(map(str, part['loc'])) or 'the file'}: {part['msg']}" for part in err.errors())
        raise SettingsError(f"{path} is not a token file: {'; '.join(problems)}.") from err


def hash_token(token: str, *, salt: str = "") -> str:
    """What stands in the file for this token, in lower-case hexadecimal."""
    return hashlib.sha256((salt + token).encode()).hexdigest()


def new_token() -> str:
    """A random token of 256 bits, safe in headers and URLs."""
    return f"crl_{secrets.token_urlsafe(32)}"
