"""Answers in the making: filled while a call is checked and prepared, settled when its receipts have come."""

from collections.abc import Sequence
from typing import Generic, Protocol, Self, TypeVar

from carillon.intake.v1 import intake_pb2

from libs.errors import FieldViolation
from libs.links.frames import Outgoing
from services.intake.commands import EntryOutcome
from services.intake.errors import Code, Refusal

MAX_MESSAGE = 2_048


class _Results(Protocol):
    """What the repeated field of results can do."""

    def add(self, *, id: str = ..., error: intake_pb2.ItemError | None = ...) -> intake_pb2.ItemResult: ...  # noqa: A002
    def __getitem__(self, index: int) -> intake_pb2.ItemResult: ...


class Response(Protocol):
    """What every answer turns into."""

    is_applied: bool

    def SerializeToString(self) -> bytes: ...
    @classmethod
    def FromString(cls, s: bytes, /) -> Self: ...


class BatchResponse(Response, Protocol):
    """An answer with a result per item."""

    @property
    def results(self) -> _Results: ...


ResponseT = TypeVar("ResponseT", bound=BatchResponse)
AnyResponseT = TypeVar("AnyResponseT", bound=Response, covariant=True)


class Answer(Protocol[AnyResponseT]):
    """The answer to a call, in the making; see services.intake.stream, which makes it durable."""

    @property
    def response(self) -> AnyResponseT: ...
    @property
    def entries(self) -> Sequence[Outgoing]: ...
    @property
    def accepted(self) -> int: ...
    @property
    def refused(self) -> int: ...
    def serialized(self) -> bytes: ...
    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None: ...


class BatchAnswer(Generic[ResponseT]):
    """The answer to a call with several items: each is accepted, with its entries, or refused, in order.

    `name` is the repeated field of the request, for the paths in errors.
    """

    def __init__(self, response: ResponseT, name: str) -> None:
        self.response = response
        self.entries: list[Outgoing] = []
        self.accepted = 0
        self.refused = 0
        self._name = name
        self._item_of: list[int] = []  # Per entry, which item it is of.

    def accept(self, item_id: str, entries: Sequence[Outgoing]) -> None:
        """The next item is accepted; the id is empty where it has none."""
        index = self.accepted + self.refused
        self.accepted += 1
        self.response.results.add(id=item_id)
        self.entries += entries
        self._item_of += [index] * len(entries)

    def refuse(self, refusal: Refusal) -> None:
        """The next item is not."""
        index = self.accepted + self.refused
        self.refused += 1
        path = f"{self._name}[{index}]"
        error = intake_pb2.ItemError(
            code=refusal.code,
            reason=refusal.reason,
            message=refusal.message[:MAX_MESSAGE],
            field=f"{path}.{refusal.field}" if refusal.field else path,
        )
        self.response.results.add(error=error)

    def serialized(self) -> bytes:
        """As it stands."""
        return self.response.SerializeToString()

    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None:
        """An item whose owner refused it gets the error in place of its id."""
        self.response.is_applied = is_applied
        for item, outcome in zip(self._item_of, outcomes, strict=False):
            if outcome.code:
                result = self.response.results[item]
                result.id = ""
                result.error.code = outcome.code
                result.error.reason = outcome.reason
                result.error.message = outcome.message
                result.error.field = f"{self._name}[{item}]"


class BackfillAnswer(BatchAnswer[intake_pb2.BackfillScheduleResponse]):
    """The answer to BackfillSchedule: of each range it also counts what fires."""

    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None:
        """The count stays 0 until every range has been applied."""
        super().settle(outcomes, is_applied=is_applied)
        if is_applied:
            self.response.timers = sum(outcome.changed for outcome in outcomes)


class WithdrawAnswer(BatchAnswer[intake_pb2.WithdrawRequestResponse]):
    """The answer to WithdrawRequest: it also counts what digest had waiting, and what had left."""

    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None:
        """The counts stay 0 until everything has been applied."""
        super().settle(outcomes, is_applied=is_applied)
        if is_applied:
            items = [
                outcome
                for entry, outcome in zip(self.entries, outcomes, strict=False)
                if entry.receiver == "digest"  # The scheduler's are our own answer-by timers.
            ]
            self.response.items = sum(outcome.changed for outcome in items)
            self.response.already_left = sum(outcome.already_left for outcome in items)


class TimersResponse(Response, Protocol):
    """An answer that only counts timers."""

    timers: int


TimersResponseT = TypeVar("TimersResponseT", bound=TimersResponse)


class TimersAnswer(Generic[TimersResponseT]):
    """The answer to Reschedule, Pause and Resume: how many timers changed."""

    def __init__(self, response: TimersResponseT, entry: Outgoing) -> None:
        self.response = response
        self.entries: list[Outgoing] = [entry]
        self.accepted, self.refused = 1, 0

    def serialized(self) -> bytes:
        """As it stands."""
        return self.response.SerializeToString()

    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None:
        """What the scheduler did; 0 until it has said so."""
        (outcome,) = outcomes
        self.response.is_applied = is_applied
        self.response.timers = outcome.changed if is_applied else 0


class CancelAnswer:
    """The answer to Cancel: the first entry's outcome counts timers, the second one's items."""

    def __init__(self, entries: Sequence[Outgoing]) -> None:
        self.response = intake_pb2.CancelResponse()
        self.entries = entries
        self.accepted, self.refused = 1, 0

    def serialized(self) -> bytes:
        """As it stands."""
        return self.response.SerializeToString()

    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None:
        """The counts stay 0 until both sides have said theirs: half a count would be a wrong one."""
        self.response.is_applied = is_applied
        if is_applied:
            timers, items = outcomes
            self.response.timers = timers.changed
            self.response.items = items.changed
            self.response.already_left = timers.already_left + items.already_left


class TriggerAnswer:
    """The answer to TriggerBatch."""

    def __init__(self, entry: Outgoing) -> None:
        self.response = intake_pb2.TriggerBatchResponse()
        self.entries: list[Outgoing] = [entry]
        self.accepted, self.refused = 1, 0

    def serialized(self) -> bytes:
        """As it stands."""
        return self.response.SerializeToString()

    def settle(self, outcomes: Sequence[EntryOutcome], *, is_applied: bool) -> None:
        """What digest did."""
        (outcome,) = outcomes
        self.response.is_applied = is_applied
        self.response.windows = outcome.changed
        self.response.is_repeated = outcome.is_repeated


def refusal_of(found: Sequence[FieldViolation]) -> Refusal:
    """One item's violations as one refusal: it names the first field, and says what is wrong with all of them."""
    message = "; ".join(f"{one.field} {one.description}".lstrip() for one in found)
    return Refusal(code=Code.INVALID_ARGUMENT, reason="INVALID_ARGUMENT", message=message, field=found[0].field)
