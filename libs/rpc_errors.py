"""The one place where an error becomes a gRPC status: code, ErrorInfo, field violations, retry delay.

A status travels in HTTP/2 trailers, which clients cut off at 8 KiB and encode at up to three times their size; so texts
and lists are trimmed here, last violations first. What is not a CarillonError becomes INTERNAL with an id that is also
in the log, and nothing of the exception itself.
"""

from datetime import timedelta
from uuid import uuid4

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from libs import errors
from libs.errors import CarillonError

DOMAIN = "carillon"

_MAX_STATUS_BYTES = 3000
_MAX_MESSAGE = 400
_MAX_FIELD = 120
_MAX_DESCRIPTION = 240
_MAX_METADATA_ENTRIES = 8

_CODES: dict[type[CarillonError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
}


class InternalError(CarillonError):
    """Something went wrong inside Carillon."""

    default_reason = "INTERNAL"

    def __init__(self) -> None:
        self.error_id = str(uuid4())
        message = f"Something went wrong inside Carillon. The log has it under error id {self.error_id}."
        super().__init__(message, metadata={"error_id": self.error_id})


def code_of(error: CarillonError) -> grpc.StatusCode:
    """The status code of an error's class or nearest base; INTERNAL for one that callers should never see."""
    return next((_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), grpc.StatusCode.INTERNAL)


def code_number(error: CarillonError) -> int:
    """The same as the number of google.rpc.Code, for answers that carry an error per item."""
    number: int = code_of(error).value[0]
    return number


def status_of(error: CarillonError) -> grpc.Status:
    """The whole status, with details; for `context.abort_with_status`."""
    status = status_pb2.Status(
        code=code_pb2.Code.ValueType(code_number(error)), message=_cut(error.message, _MAX_MESSAGE)
    )
    metadata = {key: _cut(value, _MAX_FIELD) for key, value in list(error.metadata.items())[:_MAX_METADATA_ENTRIES]}
    _add(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        _add(status, error_details_pb2.RetryInfo(retry_delay=_duration(retry_after)))
    if isinstance(error, errors.InvalidArgument) and error.violations:
        _add(status, _bad_request(error.violations, room=_MAX_STATUS_BYTES - status.ByteSize()))
    return rpc_status.to_status(status)


def _bad_request(violations: tuple[errors.FieldViolation, ...], *, room: int) -> error_details_pb2.BadRequest:
    """As many violations as fit, the first ones, at least one."""
    request = error_details_pb2.BadRequest()
    for violation in violations:
        request.field_violations.add(
            field=_cut(violation.field, _MAX_FIELD), description=_cut(violation.description, _MAX_DESCRIPTION)
        )
        if len(request.field_violations) > 1 and request.ByteSize() > room:
            del request.field_violations[-1]
            break
    return request


def _add(
    status: status_pb2.Status,
    detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest,
) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _duration(value: timedelta) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromTimedelta(value)
    return duration


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
