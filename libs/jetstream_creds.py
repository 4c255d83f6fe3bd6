"""A NATS .creds file: a user's JWT, and the nkey seed that proves whose it is.

It is read anew for every connection, as tokens are replaced. nats-py would do that too; but of a file without a JWT it
reads for ever, the event loop standing still, and a seed that is none ends the task that reconnects.
"""

import base64
from pathlib import Path

import nats.errors
import nkeys  # type: ignore[import-untyped]

from libs.errors import SettingsError
from libs.telemetry.logs import get_logger

_log = get_logger(__name__)

_JWT, _SEED = "BEGIN NATS USER JWT", "BEGIN USER NKEY SEED"


class BadCredentials(nats.errors.Error):
    """The file is away, or no .creds file; of nats-py's own kind, after which it tries again."""


class Credentials:
    """What nats-py asks for when it connects; both raise BadCredentials, and log why."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def check(self) -> None:
        """Raise SettingsError when the file cannot be used."""
        try:
            self.jwt()
            self.signature("")
        except BadCredentials as error:
            raise SettingsError(f"CARILLON_NATS_CREDS_FILE: {self._file} cannot be used: {error}.") from error

    def jwt(self) -> bytes:
        """The user's JWT."""
        return self._after(_JWT)

    def signature(self, nonce: str) -> bytes:
        """The nonce, signed, in base64."""
        try:
            return base64.b64encode(nkeys.from_seed(bytearray(self._after(_SEED))).sign(nonce.encode()))
        except (nkeys.NkeysError, ValueError, TypeError) as error:
            raise self._bad("its seed is none") from error

    def _after(self, header: str) -> bytes:
        try:
            lines = iter(self._file.read_bytes().splitlines())
        except OSError as error:
            raise self._bad(str(error)) from error
        for line in lines:
            if header.encode() in line and (value := next(lines, b"").strip()):
                return value
        raise self._bad(f"it has no line after {header}")

    def _bad(self, why: str) -> BadCredentials:
        _log.error("The file with NATS's credentials cannot be used.", file=str(self._file), error=why)
        return BadCredentials(why)
