"""What a call is as a command: whose it is, under which key, to whom it goes, and how long its caller waits."""

from datetime import timedelta
from hashlib import blake2b
from typing import Any

import grpc
from carillon.intake.v1 import intake_pb2

from libs.errors import FieldViolation, InvalidArgument
from libs.rpc import remaining_of, tenant_of
from services.intake import rpc_checks
from services.intake.commands import Command

Context = grpc.aio.ServicerContext[Any, Any]

SCHEDULER = ("scheduler",)
DIGEST = ("digest",)
BOTH = ("scheduler", "digest")

_WAIT_FOR = frozenset(intake_pb2.WaitFor.values())


def command_of(
    method: str, receivers: tuple[str, ...], request: Any, context: Context, *, default: int, answer_margin: timedelta
) -> Command:
    """The command a request is; `default` is its wait_for where it says none.

    Waiting ends `answer_margin` before the caller's deadline. Raises InvalidArgument for the key or wait_for.
    """
    key = getattr(request, "idempotency_key", "")
    wait_for = request.wait_for or default
    if not rpc_checks.is_key(key):
        what = "must be 1-128 characters without control characters, or absent"
        raise InvalidArgument([FieldViolation("idempotency_key", what)])
    if wait_for not in _WAIT_FOR:
        what = "must be WAIT_FOR_ACCEPTED or WAIT_FOR_APPLIED"
        raise InvalidArgument([FieldViolation("wait_for", what)])
    is_waiting = wait_for == intake_pb2.WAIT_FOR_APPLIED
    return Command(
        tenant=tenant_of(context),
        method=method,
        receivers=receivers,
        key=key,
        fingerprint=_fingerprint(request) if key else b"",
        timeout=remaining_of(context) - answer_margin if is_waiting else None,
    )


def _fingerprint(request: Any) -> bytes:
    """Stands for what the call says; how long it waits and under which key are no part of that."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("idempotency_key")
    content.ClearField("wait_for")
    return blake2b(content.SerializeToString(deterministic=True), digest_size=16).digest()
