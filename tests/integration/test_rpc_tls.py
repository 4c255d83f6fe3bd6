"""TLS and mTLS by settings, with certificates made on the spot."""

import asyncio
import ipaddress
import shutil
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.wrappers_pb2 import StringValue
from structlog.testing import capture_logs

from libs.errors import SettingsError
from libs.rpc_client import ClientTls, connect
from libs.settings import GrpcSettings
from tests.integration.rpc_probe import ProbeStub
from tests.integration.test_rpc_server import refused, running

_FROM, _UNTIL = datetime(2020, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC)


class Pair(NamedTuple):
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """A CA of the test's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.cert = folder / f"{name}.pem"
        own = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        self._write(self.cert, own)

    def issue(self, name: str) -> Pair:
        """A certificate for 127.0.0.1, for servers and clients alike."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        self._write(pair.cert, self._builder(subject, key).add_extension(addresses, False))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(_FROM).not_valid_after(_UNTIL)

    def _write(self, path: Path, builder: x509.CertificateBuilder) -> None:
        certificate = builder.sign(self._key, hashes.SHA256())
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def tls_settings(server: Pair, client_ca: Path | None = None) -> GrpcSettings:
    """A server with a certificate, and mTLS where there is a client CA."""
    return GrpcSettings(
        tls_cert_file=server.cert,
        tls_key_file=server.key,
        tls_client_ca_file=client_ca,
        drain_timeout=timedelta(seconds=1),
    )


async def test_a_call_over_tls(tmp_path: Path) -> None:
    """The client checks the server against its CA."""
    ca = Authority(tmp_path, "ca")
    async with running(tls_settings(ca.issue("server")), tls=ClientTls(ca=ca.cert)) as rpc:
        assert (await rpc.stub.Say(StringValue(value="hi"))).value == "hi"


async def test_a_server_of_another_ca_is_not_trusted(tmp_path: Path) -> None:
    """The call fails on the client's side."""
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    async with running(tls_settings(theirs.issue("server")), tls=ClientTls(ca=ours.cert)) as rpc:
        assert (await refused(rpc.stub.Say(StringValue()))).code() is grpc.StatusCode.UNAVAILABLE
        assert rpc.probe.requests == []


async def test_a_client_with_a_certificate_passes_mutual_tls(tmp_path: Path) -> None:
    """Both sides are checked."""
    ca = Authority(tmp_path, "ca")
    client = ca.issue("client")
    tls = ClientTls(ca=ca.cert, cert=client.cert, key=client.key)
    async with running(tls_settings(ca.issue("server"), client_ca=ca.cert), tls=tls) as rpc:
        assert (await rpc.stub.Say(StringValue(value="hi"))).value == "hi"


@pytest.mark.parametrize("has_certificate", [False, True], ids=["without a certificate", "of another CA"])
async def test_any_other_client_is_refused_by_mutual_tls(tmp_path: Path, has_certificate: bool) -> None:
    """The handler is never reached."""
    ca, other = Authority(tmp_path, "ca"), Authority(tmp_path, "other")
    client = other.issue("client")
    tls = ClientTls(ca=ca.cert, cert=client.cert, key=client.key) if has_certificate else ClientTls(ca=ca.cert)
    async with running(tls_settings(ca.issue("server"), client_ca=ca.cert), tls=tls) as rpc:
        assert (await refused(rpc.stub.Say(StringValue()))).code() is grpc.StatusCode.UNAVAILABLE
        assert rpc.probe.requests == []


async def test_plaintext_is_refused_by_tls(tmp_path: Path) -> None:
    """A server with a certificate takes nothing else."""
    ca = Authority(tmp_path, "ca")
    async with running(tls_settings(ca.issue("server"))) as rpc:
        assert (await refused(rpc.stub.Say(StringValue()))).code() is grpc.StatusCode.UNAVAILABLE


async def shown_to(address: str, ca: Authority) -> str:
    """The common name of the certificate that a new connection is shown."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=ca.cert)
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return str(dict(part for parts in certificate["subject"] for part in parts)["commonName"])


def replaced(pair: Pair, *, cert: Path | None = None, key: Path | None = None) -> None:
    """Other files in their place, as whoever replaces a file does it."""
    for old, new in ((pair.cert, cert), (pair.key, key)):
        if new is not None:
            Path(shutil.copy(new, new.with_suffix(".copy"))).replace(old)


async def test_a_new_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    """Without a restart; who is connected stays so."""
    ca = Authority(tmp_path, "ca")
    pair, other = ca.issue("server"), ca.issue("renewed")
    async with running(tls_settings(pair), tls=ClientTls(ca=ca.cert)) as rpc:
        await rpc.stub.Say(StringValue())
        assert await shown_to(rpc.server.address, ca) == "server"
        replaced(pair, cert=other.cert, key=other.key)
        with capture_logs() as logged:
            assert [await shown_to(rpc.server.address, ca) for _ in range(3)] == ["renewed"] * 3
        assert (await rpc.stub.Say(StringValue(value="hi"))).value == "hi"
    assert [one["event"] for one in logged] == ["The server has a new certificate."]


async def test_client_certificates_of_a_new_ca_are_taken_and_of_the_old_one_no_more(tmp_path: Path) -> None:
    """The CAs of clients are read anew like the certificate."""
    old, new, servers = Authority(tmp_path, "old"), Authority(tmp_path, "new"), Authority(tmp_path, "servers")
    clients = {ca: ca.issue(f"client of {name}") for ca, name in ((old, "old"), (new, "new"))}
    trusted = Path(shutil.copy(old.cert, tmp_path / "trusted.pem"))
    async with running(tls_settings(servers.issue("server"), client_ca=trusted), tls=ClientTls(ca=servers.cert)) as rpc:
        for round_, welcome in enumerate((old, new)):
            if round_:
                Path(shutil.copy(new.cert, tmp_path / "next.pem")).replace(trusted)
            for ca, client in clients.items():
                tls = ClientTls(ca=servers.cert, cert=client.cert, key=client.key)
                async with connect(rpc.server.address, tls=tls) as channel:
                    call = ProbeStub(channel).Say(StringValue(value="hi"))
                    if ca is welcome:
                        assert (await call).value == "hi"
                    else:
                        assert (await refused(call)).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("what", ["nonsense", "half", "missing"])
async def test_a_new_certificate_that_cannot_be_used_leaves_the_old_one(tmp_path: Path, what: str) -> None:
    """Nonsense, one file of two, a file that is gone: said once, and over as soon as the files are right."""
    ca = Authority(tmp_path, "ca")
    pair, other = ca.issue("server"), ca.issue("renewed")
    (nonsense := tmp_path / "nonsense").write_text("no certificate")
    async with running(tls_settings(pair)) as rpc:
        match what:
            case "nonsense":
                replaced(pair, cert=nonsense, key=nonsense)
            case "half":
                replaced(pair, cert=other.cert)
            case "missing":
                pair.cert.unlink()
        with capture_logs() as logged:
            assert [await shown_to(rpc.server.address, ca) for _ in range(3)] == ["server"] * 3
        assert [one["log_level"] for one in logged] == ["error"]
        replaced(pair, cert=other.cert, key=other.key)
        assert await shown_to(rpc.server.address, ca) == "renewed"


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["missing", "nonsense"])
async def test_a_certificate_that_cannot_be_used_is_a_wrong_setting(tmp_path: Path, content: str | None) -> None:
    """The server does not start, and says which file it is."""
    pair = Pair(tmp_path / "server.crt", tmp_path / "server.key")
    if content is not None:
        pair.cert.write_text(content)
        pair.key.write_text(content)
    with pytest.raises(SettingsError, match=r"CARILLON_GRPC_TLS_\*: .*server.crt"):
        async with running(tls_settings(pair)):
            pass
