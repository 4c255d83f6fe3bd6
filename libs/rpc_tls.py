"""The certificate of a gRPC server, which follows its files: cert-manager and the like replace them while it runs.

gRPC asks for the certificate before each handshake, so a connection gets what is there when it is made; those that are
open keep theirs. Files that cannot be used, because half of them has been replaced or because they are wrong, change
nothing: the server goes on with what it has, says so once, and looks again when they are other ones.
"""

import ssl
from pathlib import Path

import grpc

from libs.errors import SettingsError
from libs.settings import GrpcSettings
from libs.telemetry.logs import get_logger

_log = get_logger(__name__)

Stamp = tuple[tuple[int, int, int] | None, ...]
"""What tells one version of the files from another."""


def server_credentials(settings: GrpcSettings) -> grpc.ServerCredentials:
    """Those of the settings' files, now and later; SettingsError when they cannot be used now."""
    files = _Files(settings)
    try:
        first = files.read()
    except OSError as err:
        raise SettingsError(f"CARILLON_GRPC_TLS_*: {files.names} cannot be used: {err}.") from err
    return grpc.dynamic_ssl_server_credentials(
        first,
        files.news,  # type: ignore[arg-type]  # The stubs do not know that None is no change.
        require_client_authentication=settings.tls_client_ca_file is not None,
    )


class _Files:
    """The certificate, its key, and the CAs of clients where there are any."""

    def __init__(self, settings: GrpcSettings) -> None:
        assert settings.tls_cert_file is not None
        assert settings.tls_key_file is not None
        self._cert, self._key, self._client_ca = (
            settings.tls_cert_file,
            settings.tls_key_file,
            settings.tls_client_ca_file,
        )
        self._paths = [path for path in (self._cert, self._key, self._client_ca) if path is not None]
        self._seen: Stamp = ()

    @property
    def names(self) -> str:
        """For people."""
        return ", ".join(map(str, self._paths))

    def news(self) -> grpc.ServerCertificateConfiguration | None:
        """What the files hold, where that is something new; called by gRPC's threads."""
        if self._stamp() == self._seen:
            return None
        try:
            found = self.read()
        except OSError as err:
            _log.error("The new certificate cannot be used; the server keeps the one it has.", error=str(err))
            return None
        _log.info("The server has a new certificate.", files=self.names)
        return found

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What the files hold; raises OSError where that cannot be used."""
        self._seen = self._stamp()
        key, cert = self._key.read_bytes(), self._cert.read_bytes()
        client_ca = None if self._client_ca is None else self._client_ca.read_bytes()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key, password="")  # Whether one belongs to the other.
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
        if self._stamp() != self._seen:
            raise OSError("they are being replaced")
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=client_ca)

    def _stamp(self) -> Stamp:
        return tuple(map(_stamp_of, self._paths))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
