"""What can go wrong, one class per reaction the caller can have.

Core code, stores and streams raise these; `libs.rpc_errors` turns them into a gRPC status with ErrorInfo, field
violations and retry delay in exactly one place. `reason` is for programs (UPPER_SNAKE, stable, part of the API), the
message is for people, `metadata` is what a program may want beside the reason.

Retryable or not is part of the type: `ResourceExhausted` and `Unavailable` may be tried again unchanged, every other
class answers the same until somebody changes the request or the state.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,62}")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing wrong with one field; `field` is its path in the request, such as `items[3].entity`."""

    field: str
    description: str


class CarillonError(Exception):
    """Something went wrong in Carillon."""

    default_reason: ClassVar[str] = "ERROR"
    retryable: ClassVar[bool] = False

    reason: str
    metadata: dict[str, str]

    def __init__(
        self, message: str | None = None, *, reason: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Without a message the class's docstring is the message; `reason` is UPPER_SNAKE, at most 63 characters."""
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        self.reason = reason or self.default_reason
        if not _REASON.fullmatch(self.reason):
            raise ValueError(f"An error's reason is UPPER_SNAKE of at most 63 characters, got {self.reason!r}.")
        self.metadata = dict(metadata or {})

    @property
    def message(self) -> str:
        """The sentence for people."""
        return str(self.args[0])


class SettingsError(CarillonError):
    """The configuration is wrong; the message lists everything that is, one line each."""

    default_reason = "BAD_CONFIGURATION"


class InvalidArgument(CarillonError):
    """The request is wrong whatever the state of the system; the violations say where."""

    default_reason = "INVALID_ARGUMENT"

    violations: tuple[FieldViolation, ...]

    def __init__(
        self,
        violations: Sequence[FieldViolation] = (),
        *,
        message: str | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """The default message repeats the first violations, so that it reads well where details are not shown."""
        self.violations = tuple(violations)
        super().__init__(message or _summary(self.violations), reason=reason, metadata=metadata)


class Unauthenticated(CarillonError):
    """The caller did not prove who it is."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(CarillonError):
    """The caller is known and may not do this."""

    default_reason = "PERMISSION_DENIED"


class NotFound(CarillonError):
    """There is nothing with this id for this tenant."""

    default_reason = "NOT_FOUND"


class AlreadyExists(CarillonError):
    """The id or idempotency key was used before with other content."""

    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(CarillonError):
    """The request is sound but the state of the system does not allow it."""

    default_reason = "FAILED_PRECONDITION"


class Aborted(CarillonError):
    """Somebody else changed the same thing first; read it again, then decide again."""

    default_reason = "ABORTED"


class DeadlineExceeded(CarillonError):
    """The caller's deadline passed before the work was done; what was not committed was not done."""

    default_reason = "DEADLINE_EXCEEDED"


class ResourceExhausted(CarillonError):
    """A limit is reached; try again after the delay (INV-9)."""

    default_reason = "RESOURCE_EXHAUSTED"
    retryable = True

    retry_after: timedelta | None

    def __init__(
        self,
        message: str | None = None,
        *,
        retry_after: timedelta | None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`retry_after` None: the same request never fits, however long the caller waits (too large a payload)."""
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after = retry_after


class Unavailable(CarillonError):
    """Something this needs cannot be reached just now; trying again later may work."""

    default_reason = "UNAVAILABLE"
    retryable = True

    retry_after: timedelta | None

    def __init__(
        self,
        message: str | None = None,
        *,
        retry_after: timedelta | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`retry_after` None: nothing better is known than the caller's own backoff."""
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after = retry_after


class Unimplemented(CarillonError):
    """This is part of the contract and not built yet."""

    default_reason = "UNIMPLEMENTED"


class Violations:
    """Collects what is wrong with a request, so that the caller hears everything at once.

    Keeps the first `limit` violations (a status travels in HTTP/2 trailers, which are small) and counts the rest.
    """

    def __init__(self, *, limit: int = 20) -> None:
        self._kept: list[FieldViolation] = []
        self._limit = limit
        self._count = 0

    def add(self, field: str, description: str) -> None:
        """Record that `field` (path in the request) is wrong, and how."""
        self._count += 1
        if len(self._kept) < self._limit:
            self._kept.append(FieldViolation(field=field, description=description))

    def extend(self, violations: Sequence[FieldViolation]) -> None:
        """Record violations found elsewhere, in their order."""
        for violation in violations:
            self.add(violation.field, violation.description)

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with everything recorded; do nothing when all was well."""
        if not self._count:
            return
        dropped = self._count - len(self._kept)
        message = f"{_summary(tuple(self._kept))} ({dropped} more not listed)" if dropped else None
        raise InvalidArgument(self._kept, message=message)

    def __bool__(self) -> bool:
        return self._count > 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[FieldViolation]:
        return iter(self._kept)


def _summary(violations: tuple[FieldViolation, ...], shown: int = 3) -> str:
    if not violations:
        return "The request is not valid."
    sentence = "; ".join(f"{violation.field} {violation.description}" for violation in violations[:shown])
    hidden = len(violations) - shown
    return f"{sentence}; and {hidden} more" if hidden > 0 else sentence
