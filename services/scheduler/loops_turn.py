"""A turn of the engine: what goes into it, and what it made true."""

from dataclasses import dataclass, field
from uuid import UUID

from libs.links.frames import OutgoingFrame
from libs.links.receiver import IncomingFrame, Receipt
from services.scheduler.commands import Changes
from services.scheduler.conditions import Answer
from services.scheduler.events import OutgoingEvent
from services.scheduler.loops_mailbox import Arrival
from services.scheduler.loops_traces import Firing
from services.scheduler.shard import Shard
from services.scheduler.timer import Timer


@dataclass(slots=True, kw_only=True)
class Turn:
    """What one turn is about. `taken`: the timers it tried to fire, once it has; `decided_s`: of processor time."""

    shards: dict[int, Shard]
    arrivals: list[Arrival]
    most_timers: int
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    is_careful: bool = False
    taken: dict[int, list[Timer]] = field(default_factory=dict)
    decided_s: float = 0.0
    firing: Firing = field(default_factory=Firing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What a turn made true."""

    changes: list[Changes]
    frames: list[OutgoingFrame]
    events: list[OutgoingEvent]
    settled: list[IncomingFrame]
    fresh: list[IncomingFrame]
    receipts: dict[UUID, Receipt]
