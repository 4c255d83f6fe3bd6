"""All four services in one: a gRPC server in a thread that answers what a test says, and keeps what it was asked."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from typer.testing import CliRunner

from cli.main import app

SERVICES = ("intake", "scheduler", "digest", "dispatcher")


@dataclass(frozen=True, kw_only=True)
class Refuses:
    """An answer that is an error, once or (`times` 0) always."""

    code: grpc.StatusCode
    message: str
    reason: str = ""


Answer = Message | Refuses | Callable[[Any], Message]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one run of the command came to."""

    code: int
    out: str
    err: str


@dataclass
class FakeServices(grpc.GenericRpcHandler):
    """`answers` by method, Notify or intake/Notify: one for all calls, or a list of which the last stays.

    Others are UNIMPLEMENTED.
    """

    answers: dict[str, Answer | list[Answer]] = field(default_factory=dict)
    calls: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    address: str = ""

    def service(self, details: Any) -> Any:
        """See GenericRpcHandler."""
        service, _, name = details.method.lstrip("/").partition("/")
        method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        full = f"{service.split('.')[1]}/{name}"  # As intake/Explain.
        metadata = {key: value for key, value in details.invocation_metadata if isinstance(value, str)}

        def answer(request: Any, context: Any) -> Any:
            self.calls.append((name, request, metadata))
            found = self._answer(full if full in self.answers else name)
            if callable(found):
                found = found(request)
            if isinstance(found, Refuses):
                context.abort_with_status(rpc_status.to_status(_status(found)))
            return found

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def asked(self, name: str) -> list[Any]:
        """The requests of all calls of a method."""
        return [request for called, request, _ in self.calls if called == name]

    def run(self, *arguments: str, input: str | None = None, **environment: str) -> Ran:  # noqa: A002 - CliRunner's.
        """Run the command with this server as all services; a variable that is empty is taken away."""
        known = {f"CARILLON_{name.upper()}_ENDPOINT": self.address for name in SERVICES}
        env = {**known, "CARILLON_CONFIG": "", "COLUMNS": "200", "TZ": "UTC", **environment}
        result = CliRunner().invoke(app, list(arguments), input=input, env={k: v or None for k, v in env.items()})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(code=result.exit_code, out=result.stdout, err=result.stderr)

    def _answer(self, name: str) -> Any:
        found = self.answers.get(name, Refuses(code=grpc.StatusCode.UNIMPLEMENTED, message="Not in this test."))
        if not isinstance(found, list):
            return found
        return found.pop(0) if len(found) > 1 else found[0]


@contextmanager
def fake_services() -> Iterator[FakeServices]:
    """Listening on a free port."""
    services = FakeServices()
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, handlers=[services])
        port = server.add_insecure_port("127.0.0.1:0")
        services.address = f"127.0.0.1:{port}"
        server.start()
        try:
            yield services
        finally:
            server.stop(None).wait()


def _status(refusal: Refuses) -> Any:
    status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message)
    if refusal.reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=refusal.reason, domain="carillon"))
    return status
