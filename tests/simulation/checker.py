"""Judges a history: the invariants of DESIGN §8, read off the commits and what callers and receivers saw.

Nothing here asks the code under test what it did. A timer *fired* in the commit that put its entry or event into an
outbox of the scheduler; it *landed* in the commit that took it into digest's tables. The rest is arithmetic on rows,
and where a rule has to be read again (conditions, recurrences, who is selected), the scheduler's code is not asked.

Each check gives sentences, one per violation, that name the timer or shard and the commits (`#123`) to look at.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from libs.recurrence import next_after
from services.scheduler.conditions import NoAnswer
from services.scheduler.recurrence import Misfire, Overlap
from services.scheduler.timer import HAS_TURN, UNDER_WAY, State, Timer
from tests.simulation import plan
from tests.simulation.commands import FIRST_STEPS, MOST_ATTEMPTS
from tests.simulation.evidence import Evidence, Firing, commits_of
from tests.simulation.history import History, Sent
from tests.simulation.postgres import Commit
from tests.simulation.processes import holds_by_service
from tests.simulation.stores import ShardRow

_ENDED = {State.SKIPPED, State.CANCELLED, State.EXPIRED, State.FAILED, State.DONE}
_PARTICULARS = re.compile(r"\([^)]*\)|[0-9a-f-]{36}|\S*\d\S*")
_LATE = timedelta(minutes=1)
"""Occurrences that are later than this are not fired by MISFIRE_POLICY_SKIP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """An invariant that does not hold, and why."""

    invariant: str
    sentence: str

    @property
    def kind(self) -> str:
        """The same for violations that differ in their particulars only."""
        return f"{self.invariant}: {_PARTICULARS.sub('…', self.sentence)}"

    def __str__(self) -> str:
        return f"{self.invariant}: {self.sentence}"


def violations_of(history: History) -> list[Violation]:
    """All that is wrong with a history; the most basic first."""
    evidence = Evidence(history)
    return [
        Violation(invariant=invariant, sentence=sentence) for invariant, check in CHECKS for sentence in check(evidence)
    ]


def nothing_unforeseen(evidence: Evidence) -> Iterator[str]:
    """No task ended by an error, no lease was trusted for too long, no frame was put aside."""
    yield from evidence.history.problems
    for table in ("scheduler.dead_frame", "digest.dead_frame"):
        for frame_id, reason in evidence.history.tables.get(table, {}).items():
            yield f"frame {frame_id} was put aside: {reason}"


# INV-1


def acknowledged_commands_are_applied(evidence: Evidence) -> Iterator[str]:
    """Each accepted frame once, with its effects, and the sender hears of it."""
    tables = evidence.history.tables
    for table in ("intake.outbox", "scheduler.outbox", "event_outbox"):
        for frame_id in tables.get(table, {}):
            yield f"{frame_id} of {table} was never confirmed{_with(evidence, frame_id)}"
    for frame_id in evidence.history.returned:
        if frame_id not in evidence.accepted:
            yield f"frame {frame_id} was acknowledged and is not there{_with(evidence, frame_id)}"
    for frame_id in sorted(evidence.accepted - evidence.applied_in.keys()):
        yield f"frame {frame_id} was accepted and never applied{_with(evidence, frame_id)}"
    made = {timer.schedule_id for timer in evidence.timers.values()}
    made |= {timer.step_of.run_id for timer in evidence.timers.values() if timer.step_of}
    for sent in evidence.commands:
        if isinstance(sent.action, plan.Schedule | plan.Recur | plan.Start) and not made.issuperset(sent.ids):
            yield f"{sent.action} was accepted, and there is no timer of it"


def _with(evidence: Evidence, frame_id: UUID) -> str:
    commands = evidence.history.sent.get(frame_id, [])
    return f", with {commands[0].action}" if commands else ""


# INV-2


def timers_fire_once(evidence: Evidence) -> Iterator[str]:
    """Each timer whose time has come fired once, and each attempt of an event; what fired landed once."""
    for timer_id, firings in evidence.firings_of.items():
        timer, told = evidence.timers.get(timer_id), evidence.told(timer_id)
        attempts = [one.attempt for one in firings]
        if timer is None:
            yield f"{told} fired in {commits_of(firings)} and is not in the table"
        elif len(set(attempts)) != len(attempts):
            yield f"{told} fired {len(firings)} times, in {commits_of(firings)}"
        elif timer.report_within is not None and attempts != list(range(1, timer.attempts + 1)):
            yield f"{told} counts {timer.attempts} attempts and made {attempts}, in {commits_of(firings)}"
        elif attempts == [0] and evidence.landed.get(timer_id, 0) != 1:
            yield f"{told} fired in {commits_of(firings)} and landed {evidence.landed.get(timer_id, 0)} times"
    for timer_id in evidence.landed.keys() - evidence.firings_of.keys():
        yield f"{evidence.told(timer_id)} landed and has never fired"
    for timer in evidence.timers.values():
        if (sentence := _still_waits(evidence, timer)) is not None:
            yield f"{evidence.told(timer.id)} {sentence}"


def _still_waits(evidence: Evidence, timer: Timer) -> str | None:
    """What is wrong with a timer that may still do something."""
    firings = evidence.firings_of.get(timer.id, [])
    is_past = timer.mark <= evidence.shards[timer.shard].watermark
    if timer.state is State.SCHEDULED:
        if is_past and not firings:
            return "is behind the watermark and has never fired"
        if firings and not is_past:
            return f"fired in {commits_of(firings)} and still waits"
    elif timer.state in HAS_TURN and is_past:
        return f"is {timer.state.name} behind the watermark: its turn never comes"
    elif timer.state is State.BUFFERED:
        siblings = (one for one in evidence.timers.values() if one.schedule_id == timer.schedule_id)
        is_between = State.PAUSED  # Two attempts.
        if not any(one.state in UNDER_WAY or one.state is is_between for one in siblings if one.id != timer.id):
            return "is BUFFERED and waits for nobody"
    end_at = evidence.history.end_at
    is_due = end_at is not None and timer.fire_at < end_at
    return "was due long ago and still waits" if timer.state in HAS_TURN and not is_past and is_due else None


def verdicts_are_right(evidence: Evidence) -> Iterator[str]:
    """Who ended had a reason, by the facts of that moment; who fired had none against it."""
    for timer in evidence.timers.values():
        told, ended_in = evidence.told(timer.id), evidence.ended_in(timer.id)
        for firing in evidence.firings_of.get(timer.id, []):
            if timer.state in _ENDED and (timer.report_within is None or firing.commit >= ended_in):
                yield f"{told} is {timer.state.name} since #{ended_in}, and fired in #{firing.commit}"
            elif not _may_fire(evidence, timer, firing.commit):
                yield f"{told} fired in #{firing.commit}, and its condition did not hold"
        if timer.state in _ENDED and not _may_end(evidence, timer, ended_in):
            yield f"{told} is {timer.state.name} since #{ended_in} for no reason: {timer.note or timer.last_error}"


def _holds(condition: str, facts: dict[str, Any]) -> bool | None:
    """By another reading than CEL's; None: it cannot be decided."""
    is_paid = facts.get("paid") is True
    return {"": True, plan.PAID: is_paid, plan.UNPAID: not is_paid, plan.BROKEN: None}[condition]


def _may_fire(evidence: Evidence, timer: Timer, commit: int) -> bool:
    if timer.asked is not None:
        return holds_by_service(timer.id) or timer.asked.no_answer is NoAnswer.FIRE
    return _holds(timer.condition, evidence.facts_at(commit, timer.entity)) is True


def _may_end(evidence: Evidence, timer: Timer, commit: int) -> bool:
    holds = _holds(timer.condition, evidence.facts_at(commit, timer.entity))
    assert timer.decided_at is not None
    match timer.state:
        case State.CANCELLED:
            return bool(evidence.orders_to(timer, plan.Cancel))
        case State.EXPIRED:
            return timer.expires_at is not None and timer.expires_at <= timer.decided_at
        case State.DONE:
            return any(one.ids == (timer.id,) for one in evidence.commands if _is_done(one))
        case State.FAILED:
            is_silent = timer.asked is not None and timer.asked.no_answer is NoAnswer.FAIL
            return holds is None or is_silent or (timer.report_within is not None and timer.attempts == MOST_ATTEMPTS)
    if timer.recurrence is not None:
        is_late = timer.recurrence.misfire is Misfire.SKIP and timer.decided_at - timer.due_at > _LATE
        if is_late or _siblings_under_way(evidence, timer, commit - 1) or _siblings_under_way(evidence, timer, commit):
            return True
    if timer.asked is not None:
        return not holds_by_service(timer.id) or timer.asked.no_answer is NoAnswer.SKIP
    return holds is False


def _is_done(sent: Sent) -> bool:
    return isinstance(sent.action, plan.Report) and sent.action.is_done


def _siblings_under_way(evidence: Evidence, timer: Timer, commit: int) -> list[Timer]:
    """Occurrences that keep this one back by its policy, after a commit."""
    if timer.recurrence is None or timer.recurrence.overlap is Overlap.ALLOW:
        return []
    others = (one for one in evidence.timers.values() if one.schedule_id == timer.schedule_id and one.id != timer.id)
    return [one for one in others if evidence.state_at(one.id, commit) in UNDER_WAY]


def outcomes_end_it(evidence: Evidence) -> Iterator[str]:
    """Nothing is tried again after it was reported as done; no occurrence overlaps another where it must not."""
    for report in filter(_is_done, evidence.commands):
        (timer_id,) = report.ids
        applied = evidence.applied_in.get(report.frame_id)
        for firing in evidence.firings_of.get(timer_id, []):
            if applied is not None and firing.commit > applied:
                yield f"{evidence.told(timer_id)} was tried again in #{firing.commit}, and was done in #{applied}"
    for firing in evidence.firings:
        timer = evidence.timers.get(firing.timer_id)
        if timer is None or firing.attempt != 1:
            continue
        for other in _siblings_under_way(evidence, timer, firing.commit):
            # Those that are triggered do not wait, so what counts is what was so before.
            before = firing.commit - (other.recurrence is None)
            if {evidence.state_at(other.id, one) for one in (before, firing.commit)} == {State.AWAITING}:
                told = evidence.told(timer.id)
                yield f"{told} fired in #{firing.commit}, and {evidence.told(other.id)} had not ended"


def occurrences_follow_the_rule(evidence: Evidence) -> Iterator[str]:
    """Each occurrence once, none left out but by its policy, and none made up for that has fired."""
    for chain in evidence.occurrences.values():
        for one, following in zip(chain, [*chain[1:], None], strict=True):
            yield from _link(evidence, one, following)
    fired: dict[tuple[UUID, object], UUID] = {}
    for timer_id in evidence.firings_of:
        timer = evidence.timers.get(timer_id)
        if timer is not None and timer.nominal_at is not None:
            first = fired.setdefault((timer.schedule_id, timer.nominal_at), timer_id)
            if first != timer_id:
                yield f"{evidence.told(timer_id)} fired, and {evidence.told(first)}, which is the same occurrence"


def _link(evidence: Evidence, one: Timer, following: Timer | None) -> Iterator[str]:
    assert one.recurrence is not None
    assert one.nominal_at is not None
    had_its_time = _had_its_time(evidence, one)
    if had_its_time is None:
        if following is not None:
            yield f"{evidence.told(following.id)} exists before {evidence.told(one.id)} has had its time"
        return
    rule, now = one.recurrence.rule, evidence.history.latest_now(evidence.history.commits[had_its_time - 1].at_s)
    soonest = next_after(rule, one.nominal_at)
    # What came due while this one was late is made up for by it, unless the policy wants each of them.
    made_up_for = {Misfire.FIRE_ONCE: now, Misfire.FIRE_ALL: one.nominal_at, Misfire.SKIP: now - _LATE}
    latest = next_after(rule, max(one.nominal_at, made_up_for[one.recurrence.misfire]))
    if following is None:
        if latest is not None:
            yield f"{evidence.told(one.id)} had its time in #{had_its_time} and nothing follows it"
    elif soonest is None or following.nominal_at < soonest:  # type: ignore[operator]
        yield f"{evidence.told(following.id)} is no occurrence by its rule after {one.nominal_at:%H:%M:%S}"
    elif latest is not None and following.nominal_at > latest:  # type: ignore[operator]
        yield f"{evidence.told(following.id)} follows {evidence.told(one.id)}, and {latest:%H:%M:%S} was left out"


def _had_its_time(evidence: Evidence, timer: Timer) -> int | None:
    """The commit in which a timer fired or was kept from it otherwise than by a cancel that came before."""
    commits = [one.commit for one in evidence.firings_of.get(timer.id, [])]
    commits += [
        number
        for number, state in evidence.states_of.get(timer.id, [])
        if state in UNDER_WAY or state in _ENDED - {State.CANCELLED}
    ]
    return min(commits, default=None)


def facts_are_in_order(evidence: Evidence) -> Iterator[str]:
    """What was said last of an entity is what is known of it, whatever came last."""
    said: dict[str, bool | None] = {}
    for one in evidence.commands:
        if isinstance(one.action, plan.Facts):
            said[one.action.entity] = one.action.is_paid
    last = len(evidence.history.commits)
    for entity, is_paid in said.items():
        known = evidence.facts_at(last, entity).get("paid")
        if known is not is_paid:
            yield f"of {entity} was said last that paid is {is_paid}, and it is {known}"


# INV-3


def only_holders_write(evidence: Evidence) -> Iterator[str]:
    """Whoever changes timers or the watermark of a shard holds it, in an epoch that nobody else wrote in."""
    shards: dict[int, ShardRow] = {}
    authors: dict[tuple[int, int], str] = {}
    for commit in evidence.history.commits:
        for number in sorted(_shards_written(commit)):
            row = shards.get(number, ShardRow())
            author = authors.setdefault((number, row.epoch), commit.author)
            if author != commit.author:
                yield f"{author} and {commit.author} changed shard {number} in epoch {row.epoch}, see #{commit.number}"
            elif row.holder != commit.author:
                yield f"{commit.author} changed shard {number} in #{commit.number}, and {row.holder} held it"
        shards |= {key: after for (table, key), (_, after) in commit.rows.items() if table == "shard"}


def _shards_written(commit: Commit) -> set[int]:
    timers = {after.shard for (table, _), (_, after) in commit.rows.items() if table == "timer"}
    moved = {
        key
        for (table, key), (before, after) in commit.rows.items()
        if table == "shard" and before is not None and before.watermark != after.watermark
    }
    return timers | moved


# INV-4


def nothing_fires_after_its_cancel(evidence: Evidence) -> Iterator[str]:
    """Not after the cancel was applied, nor after its caller heard so."""
    for cancel in evidence.orders:
        if not isinstance(cancel.action, plan.Cancel):
            continue
        returned = evidence.history.returned.get(cancel.frame_id)
        known = (evidence.applied_in.get(cancel.frame_id), returned.applied_after if returned else None)
        since = min((one for one in known if one is not None), default=None)
        for timer in evidence.timers.values() if since is not None else ():
            if cancel not in evidence.orders_to(timer, plan.Cancel):
                continue
            firings = evidence.firings_of.get(timer.id, [])
            late = [one for one in firings if one.commit >= since]  # type: ignore[operator]
            if late:
                told = evidence.told(timer.id)
                yield f"{told} fired in #{late[0].commit}, and {cancel.action} was applied in #{since}"
            elif timer.state not in _ENDED and not (timer.state is State.SCHEDULED and firings):
                yield f"{evidence.told(timer.id)} goes on after {cancel.action} was applied in #{since}"


def orders_are_obeyed(evidence: Evidence) -> Iterator[str]:
    """Pause, resume and reschedule have the same result in whatever order they arrive: that of their sequences."""
    for timer in evidence.timers.values():
        if timer.asked is not None or (timer.recurrence is not None and timer.recurrence.overlap is not Overlap.ALLOW):
            continue  # While it is asked about or kept back, orders pass it by.
        pauses = evidence.orders_to(timer, plan.Pause, plan.Resume)
        if timer.state is State.PAUSED and not (pauses and isinstance(pauses[-1].action, plan.Pause)):
            yield f"{evidence.told(timer.id)} is paused at the end, and should not be"
        for firing in evidence.firings_of.get(timer.id, [])[:1]:
            yield from _fired_as_ordered(evidence, timer, firing)


def _fired_as_ordered(evidence: Evidence, timer: Timer, firing: Firing) -> Iterator[str]:
    pauses = evidence.orders_to(timer, plan.Pause, plan.Resume, applied_by=firing.commit)
    if pauses and isinstance(pauses[-1].action, plan.Pause):
        yield f"{evidence.told(timer.id)} fired in #{firing.commit}, though {pauses[-1].action} had been applied"
    follows = timer.occurrence > 1 or (timer.step_of is not None and timer.step_of.step not in FIRST_STEPS)
    moves = [] if follows else evidence.orders_to(timer, plan.Move, applied_by=firing.commit)
    if moves and isinstance(move := moves[-1].action, plan.Move):
        due_at = moves[-1].accepted_at + timedelta(seconds=move.due_in_s)
        if abs(timer.due_at - due_at) > timedelta(milliseconds=1):
            yield f"{evidence.told(timer.id)} fired in #{firing.commit}, though {move} had been applied"


# INV-5


def firing_order_holds(evidence: Evidence) -> Iterator[str]:
    """Per shard in (fire_at, id) order, and the watermark only moves on."""
    latest: dict[tuple[int, bool], Firing] = {}
    for one in evidence.firings:
        timer = evidence.timers.get(one.timer_id)
        if timer is None or timer.report_within is not None:
            continue  # The latter's fire_at has moved on since.
        for is_event in (False, True):
            before = latest.get((timer.shard, is_event))
            if before is None or evidence.timers[before.timer_id].mark <= timer.mark:
                continue
            if before.commit < one.commit or is_event is bool(one.attempt):  # Otherwise they left side by side.
                told = evidence.told(before.timer_id)
                yield f"{evidence.told(one.timer_id)} fired in #{one.commit}, after {told} in #{before.commit}"
        latest[timer.shard, bool(one.attempt)] = one
    for commit in evidence.history.commits:
        for (table, key), (old, new) in commit.rows.items():
            if table == "shard" and old is not None and new.watermark < old.watermark:
                yield f"the watermark of shard {key} moved back in #{commit.number}"


CHECKS: tuple[tuple[str, Callable[[Evidence], Iterator[str]]], ...] = (
    ("unforeseen", nothing_unforeseen),
    ("INV-1", acknowledged_commands_are_applied),
    ("INV-2", timers_fire_once),
    ("INV-2", verdicts_are_right),
    ("INV-2", facts_are_in_order),
    ("INV-2", outcomes_end_it),
    ("INV-2", occurrences_follow_the_rule),
    ("INV-3", only_holders_write),
    ("INV-4", nothing_fires_after_its_cancel),
    ("INV-4", orders_are_obeyed),
    ("INV-5", firing_order_holds),
)
