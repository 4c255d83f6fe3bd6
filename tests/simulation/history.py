"""What is recorded of a history, for `checker`: what callers sent and heard, every commit, what processes noticed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID

from carillon.link.v1 import link_pb2

from tests.simulation.plan import RATE, Action
from tests.simulation.postgres import Commit, Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A command as intake numbered it. `ids` are of the timers, schedule or run it makes, or selects."""

    frame_id: UUID
    index: int
    sequence: int
    action: Action
    accepted_at: datetime
    ids: tuple[UUID, ...] = ()


@dataclass(slots=True)
class Returned:
    """What a caller heard, and when it called: numbers of commits made by then."""

    called_after: int
    acknowledged_after: int | None = None
    applied_after: int | None = None
    receipt: link_pb2.Receipt | None = None


@dataclass(slots=True)
class History:
    """All of it. `commits` are of all services, in the order in which they became true."""

    begin_at: datetime
    commits: list[Commit] = field(default_factory=list)
    sent: dict[UUID, list[Sent]] = field(default_factory=dict)
    returned: dict[UUID, Returned] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    end_at: datetime | None = None
    tables: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    steps: int = 0
    clock_steps: list[tuple[float, timedelta]] = field(default_factory=list)

    @property
    def now(self) -> int:
        """How many commits there are."""
        return len(self.commits)

    def latest_now(self, at_s: float) -> datetime:
        """The latest business time that any process may have read by a time of the history."""
        steps = (by for begin_s, by in self.clock_steps if begin_s <= at_s and by > timedelta(0))
        return self.begin_at + timedelta(seconds=RATE * at_s + 1) + sum(steps, timedelta(0))

    def note(self, problem: str) -> None:
        """Something that must not happen; once is enough."""
        if problem not in self.problems:
            self.problems.append(problem)

    def fingerprint(self) -> str:
        """Equal for equal histories."""
        digest = sha256(repr((self.steps, self.problems)).encode())
        for commit in self.commits:
            digest.update(repr((commit.number, commit.at_s, commit.author, _names(commit.rows))).encode())
        return digest.hexdigest()


def _names(rows: Mapping[Key, tuple[Any, Any]]) -> list[tuple[str, str, str]]:
    return [(table, str(key), repr(after)) for (table, key), (_, after) in rows.items()]
