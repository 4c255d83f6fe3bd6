"""The command checks the server, and proves who it is where it is asked to."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from carillon.intake.v1 import intake_pb2 as intake

from tests.integration.test_rpc_tls import Authority
from tests.support.fake_services import FakeServices

TRIGGER = ("batch", "trigger", "flights", "--attempts", "1", "--timeout", "3")


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A server that takes only clients with a certificate of its CA, and where the files of such a client are."""

    services: FakeServices
    ca: str
    cert: str
    key: str


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    """Close no window each time, over mutual TLS."""
    authority = Authority(tmp_path, "ca")
    server_pair, client = authority.issue("server"), authority.issue("client")
    services = FakeServices(answers={"TriggerBatch": intake.TriggerBatchResponse(is_applied=True)})
    credentials = grpc.ssl_server_credentials(
        [(server_pair.key.read_bytes(), server_pair.cert.read_bytes())],
        root_certificates=authority.cert.read_bytes(),
        require_client_auth=True,
    )
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, handlers=[services])
        services.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        try:
            yield Guarded(services=services, ca=str(authority.cert), cert=str(client.cert), key=str(client.key))
        finally:
            server.stop(None).wait()


def test_a_client_with_a_certificate_is_let_in(guarded: Guarded) -> None:
    """As a batch's pod has it: three files, named by the environment."""
    files = {"CARILLON_CA_FILE": guarded.ca, "CARILLON_CERT_FILE": guarded.cert, "CARILLON_KEY_FILE": guarded.key}
    assert guarded.services.run(*TRIGGER, **files).code == 0
    assert len(guarded.services.asked("TriggerBatch")) == 1


def test_a_client_without_one_is_not(guarded: Guarded) -> None:
    """The call never arrives."""
    assert guarded.services.run(*TRIGGER, CARILLON_CA_FILE=guarded.ca).code == 1
    assert guarded.services.asked("TriggerBatch") == []


def test_a_certificate_without_its_key_is_unusable(guarded: Guarded) -> None:
    """Exit code 2: trying again is no use."""
    ran = guarded.services.run(*TRIGGER, CARILLON_CA_FILE=guarded.ca, CARILLON_CERT_FILE=guarded.cert)
    assert (ran.code, "go together" in ran.err) == (2, True)
