"""What a handler may know of the call it answers: who calls, for which tenant, and until when.

`libs.rpc_calls` establishes it before the handler runs. It lives in a context variable, because gRPC's context object
takes no attributes; each call has a context of its own, and tasks a handler starts inherit it. Handlers pass their
`context` all the same, so that a core function cannot ask by accident.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from msgspec import Struct

from libs.errors import PermissionDenied


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Who calls. `subject` is for logs and the audit, never for a decision; `roles` are what else it may do."""

    tenant: str
    subject: str
    roles: frozenset[str] = field(default_factory=frozenset)


class Deadline(Struct, frozen=True):
    """An instant on the event loop's clock, in seconds, after which nobody waits for the answer."""

    at: float

    @classmethod
    def after(cls, duration: timedelta) -> "Deadline":
        """The deadline that long from now; needs a running loop."""
        return cls(asyncio.get_running_loop().time() + duration.total_seconds())

    def remaining(self) -> timedelta:
        """How long is left, never negative."""
        return timedelta(seconds=max(0.0, self.at - asyncio.get_running_loop().time()))

    def timeout(self, *, margin: timedelta = timedelta(0)) -> asyncio.Timeout:
        """An `async with` block that raises TimeoutError `margin` before the deadline: time left to answer in."""
        return asyncio.timeout_at(self.at - margin.total_seconds())


class Call(Struct, frozen=True, kw_only=True):
    """Everything about a call that is not its request."""

    principal: Principal | None
    deadline: Deadline


class Context(Protocol):
    """Any gRPC servicer context; it is a token here, not used."""

    def peer(self) -> str:
        """The address of the caller."""


_CALL: ContextVar[Call] = ContextVar("carillon_call")


def enter_call(call: Call) -> None:
    """Make `call` the current one, for the rest of this context's life."""
    _CALL.set(call)


@contextmanager
def acting(principal: Principal, *, deadline: Deadline) -> Iterator[None]:
    """Run a block as if within a call of `principal`: for tests that call handlers directly."""
    token = _CALL.set(Call(principal=principal, deadline=deadline))
    try:
        yield
    finally:
        _CALL.reset(token)


def principal_of(context: Context | None) -> Principal:
    """Who makes the call being handled; RuntimeError outside a call, or in one that needs no credential."""
    call = _CALL.get(None)
    if call is None or call.principal is None:
        raise RuntimeError("There is no authenticated call here.")
    return call.principal


def tenant_of(context: Context | None) -> str:
    """The tenant that the call's credential stands for (INV-8)."""
    return principal_of(context).tenant


def deadline_of(context: Context | None) -> Deadline:
    """Until when the caller waits: its own deadline cut to the setting's maximum, or the default. Always there."""
    call = _CALL.get(None)
    if call is None:
        raise RuntimeError("There is no call here.")
    return call.deadline


def remaining_of(context: Context | None) -> timedelta:
    """How long the caller still waits, never negative."""
    return deadline_of(context).remaining()


def require_role(context: Context | None, role: str) -> None:
    """Raise PermissionDenied unless the caller has `role`."""
    principal = principal_of(context)
    if role not in principal.roles:
        raise PermissionDenied(
            f"This needs the role {role}, which {principal.subject} does not have.",
            reason="ROLE_MISSING",
            metadata={"role": role},
        )
