"""What the engine needs of the world. Behind these are Postgres and NATS, or the simulation of both."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from libs.links.frames import Addressed, OutgoingFrame, Position
from libs.links.receiver import Admission, EntryResult, IncomingFrame, Message, Receipt
from libs.postgres import Transaction
from libs.trace_points import Point
from services.scheduler.commands import Changes, Command, Outcome
from services.scheduler.conditions import Question
from services.scheduler.events import OutgoingEvent
from services.scheduler.needs import Known, Needs
from services.scheduler.timer import Mark, Timer


class Database(Protocol):
    """Where the transactions come from; libs.postgres.Database."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]: ...
    def read(self) -> AbstractAsyncContextManager[Transaction]: ...


class Store(Protocol):
    """What a turn reads and writes; services.scheduler.store.TurnStore."""

    async def fence(self, tx: Transaction, epochs: Mapping[int, int], *, longest_pause: timedelta) -> set[int]: ...
    async def pages(self, tx: Transaction, after: Mapping[int, Mark], limit: int) -> dict[int, list[Timer]]: ...
    async def load(self, tx: Transaction, needs: Needs) -> Known: ...
    async def write(self, tx: Transaction, changes: Sequence[Changes], now: datetime) -> None: ...


class Codec(Protocol):
    """Between frames and commands, and from timers to what they send; services.scheduler.stream and stream_fired."""

    def commands_of(self, incoming: IncomingFrame) -> list[Command]: ...
    def encode(
        self, due: Iterable[Timer], now: datetime, points: Mapping[UUID, Point]
    ) -> tuple[dict[UUID, Addressed | OutgoingEvent], dict[UUID, str]]: ...
    def results_of(self, outcomes: Sequence[Outcome]) -> Mapping[UUID, Sequence[EntryResult]]: ...


class Settlement(Protocol):
    """What happens to frames around a turn; libs.links.receiver.Settlement."""

    async def parse(self, messages: Sequence[Message]) -> list[IncomingFrame]: ...
    async def admit(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Admission: ...
    async def keep(self, tx: Transaction, receipts: Mapping[UUID, Receipt]) -> None: ...
    async def settle(
        self, frames: Sequence[IncomingFrame], receipts: Mapping[UUID, Receipt], fresh: Sequence[IncomingFrame]
    ) -> None: ...
    async def fail(self, frames: Sequence[IncomingFrame], error: Exception) -> None: ...


class Sender(Protocol):
    """Where frames go; libs.links.sender.Sender."""

    def pack(
        self, addressed: Iterable[Addressed], carrier: Mapping[str, str]
    ) -> tuple[list[OutgoingFrame], list[Position]]: ...
    async def insert(self, tx: Transaction, frames: Sequence[OutgoingFrame]) -> None: ...
    def publish(self, frames: Sequence[OutgoingFrame]) -> None: ...
    def check_room(self, receivers: Iterable[str]) -> None: ...


class Events(Protocol):
    """Where events go; services.scheduler.loops_events.EventPublisher."""

    async def insert(self, tx: Transaction, events: Sequence[OutgoingEvent]) -> None: ...
    def publish(self, events: Sequence[OutgoingEvent]) -> None: ...
    def check_room(self) -> None: ...


class Asker(Protocol):
    """Who asks business services; services.scheduler.loops_asking.Asker."""

    def ask(self, questions: Sequence[Question]) -> None: ...
