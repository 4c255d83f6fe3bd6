"""A history, indexed by what the checks ask: what fired when, what was applied when, what was known when."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID

from carillon.link.v1 import link_pb2

from services.scheduler.timer import State, Timer
from tests.simulation import plan
from tests.simulation.commands import TENANT
from tests.simulation.history import History, Sent
from tests.simulation.stores import ShardRow


@dataclass(frozen=True, slots=True)
class Firing:
    """A timer's entry in a committed frame (attempt 0), or one of its events (from 1)."""

    timer_id: UUID
    attempt: int
    commit: int


class Evidence:
    """What a history proves. Commits go by their numbers, from 1."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.timers: dict[UUID, Timer] = dict(history.tables.get("timer", {}))
        self.shards: dict[int, ShardRow] = dict(history.tables.get("shard", {}))

    @cached_property
    def firings(self) -> list[Firing]:
        """In the order in which they were committed."""
        found = []
        for commit in self.history.commits:
            for (table, _), (before, after) in commit.rows.items():
                if before is not None or after is None:
                    continue
                if table == "scheduler.outbox":
                    frame = link_pb2.Frame.FromString(after.frame.payload)
                    found += [Firing(UUID(bytes=one.notification.timer_id), 0, commit.number) for one in frame.entries]
                elif table == "event_outbox":
                    event = json.loads(after.event.payload)
                    attempt = event["carillonattempt"]
                    found.append(Firing(UUID(event["carillontimerid"]), attempt, commit.number))
        return found

    @cached_property
    def firings_of(self) -> dict[UUID, list[Firing]]:
        """By timer, in order."""
        found: defaultdict[UUID, list[Firing]] = defaultdict(list)
        for one in self.firings:
            found[one.timer_id].append(one)
        return dict(found)

    @cached_property
    def landed(self) -> dict[UUID, int]:
        """How often each timer landed at digest."""
        found: defaultdict[UUID, int] = defaultdict(int)
        for timer_id in self.history.tables.get("landed", {}).values():
            found[timer_id] += 1
        return dict(found)

    @cached_property
    def accepted(self) -> set[UUID]:
        """Frames that intake committed, whether or not its caller heard of it."""
        return {key for commit in self.history.commits for table, key in commit.rows if table == "intake.outbox"}

    @cached_property
    def applied_in(self) -> dict[UUID, int]:
        """The commit in which the scheduler took each frame in."""
        return {
            key: commit.number
            for commit in self.history.commits
            for (table, key), (before, _) in commit.rows.items()
            if table == "scheduler.inbox" and before is None
        }

    @cached_property
    def states_of(self) -> dict[UUID, list[tuple[int, State]]]:
        """Each timer's states, with the commits that made them."""
        found: defaultdict[UUID, list[tuple[int, State]]] = defaultdict(list)
        for commit in self.history.commits:
            for (table, key), (before, after) in commit.rows.items():
                if table == "timer" and (before is None or before.state is not after.state):
                    found[key].append((commit.number, after.state))
        return dict(found)

    def state_at(self, timer_id: UUID, commit: int) -> State | None:
        """A timer's stored state after a commit."""
        return next((state for number, state in reversed(self.states_of.get(timer_id, [])) if number <= commit), None)

    def ended_in(self, timer_id: UUID) -> int:
        """The commit that decided about a timer: that made its last state, or fired it."""
        states, firings = self.states_of.get(timer_id, []), self.firings_of.get(timer_id, [])
        if self.timers[timer_id].state is State.SCHEDULED and firings:
            return firings[-1].commit
        return states[-1][0] if states else 0

    @cached_property
    def commands(self) -> list[Sent]:
        """What was accepted, by sequence."""
        found = (one for frame_id, sent in self.history.sent.items() if frame_id in self.accepted for one in sent)
        return sorted(found, key=lambda one: one.sequence)

    @cached_property
    def orders(self) -> list[Sent]:
        """The accepted orders to timers, by sequence."""
        return [one for one in self.commands if isinstance(one.action, plan.Order)]

    def orders_to(self, timer: Timer, *kinds: type, applied_by: int | None = None) -> list[Sent]:
        """The orders of these kinds that were accepted after a timer and select it, by sequence."""
        return [
            one
            for one in self.orders
            if isinstance(one.action, kinds)
            and selects(one, timer)
            and (applied_by is None or self.applied_in.get(one.frame_id, applied_by + 1) <= applied_by)
        ]

    def facts_at(self, commit: int, entity: str) -> dict[str, Any]:
        """What was known of an entity after a commit."""
        known = reversed(self._facts.get((TENANT, entity), []))
        return next((facts for number, facts in known if number <= commit), {})

    @cached_property
    def _facts(self) -> dict[tuple[str, str], list[tuple[int, dict[str, Any]]]]:
        found: defaultdict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for commit in self.history.commits:
            for (table, key), (_, after) in commit.rows.items():
                if table == "facts":
                    found[key].append((commit.number, after.now))
        return dict(found)

    @cached_property
    def occurrences(self) -> dict[UUID, list[Timer]]:
        """The occurrences of each schedule, by their nominal times."""
        found: defaultdict[UUID, list[Timer]] = defaultdict(list)
        for timer in self.timers.values():
            if timer.recurrence is not None:
                found[timer.schedule_id].append(timer)
        return {schedule_id: sorted(chain, key=_nominal) for schedule_id, chain in found.items()}

    def told(self, timer_id: UUID) -> str:
        """A timer in words."""
        timer = self.timers.get(timer_id)
        if timer is None:
            return f"timer {timer_id}"
        what = f", step {timer.step_of.step!r}" if timer.step_of else ""
        what += f", occurrence {timer.occurrence}" if timer.occurrence else ""
        return f"timer …{timer_id.hex[-6:]} ({timer.entity}{what}, due {timer.due_at:%H:%M:%S}, shard {timer.shard})"

    def sent_as(self, timer: Timer) -> Iterator[Sent]:
        """The commands that made a timer, or what it follows."""
        ids = {timer.id, timer.schedule_id} | ({timer.step_of.run_id} if timer.step_of else set())
        makers = (plan.Schedule, plan.Recur, plan.Start, plan.Trigger)
        return (one for one in self.commands if isinstance(one.action, makers) and ids & {*one.ids})


def _nominal(timer: Timer) -> Any:
    return timer.nominal_at


def selects(order: Sent, timer: Timer) -> bool:
    """Whether an order is for this timer, and later than it; as the API says it, not as the code does it."""
    action = order.action
    assert isinstance(action, plan.Order)
    return (
        timer.entity == action.entity
        and timer.sequence < order.sequence
        and (not action.type or timer.type == action.type)
        and (not action.timeline or (timer.step_of is not None and timer.step_of.timeline == action.timeline))
        and (not order.ids or timer.id in order.ids or timer.schedule_id in order.ids)
    )


def commits_of(firings: list[Firing]) -> str:
    """Where to look."""
    shown = ", ".join(f"#{one.commit}" for one in firings[:5])
    return shown + (" …" if len(firings) > 5 else "")
