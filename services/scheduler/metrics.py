"""What the scheduler tells Prometheus."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from uuid import UUID

from prometheus_client import Counter, Gauge, Histogram

from libs.telemetry import exemplars, measured
from libs.trace_points import NOWHERE, Point
from services.scheduler.commands import Changes
from services.scheduler.timer import State, TargetKind
from services.scheduler.verdicts import Retry, Skip, retry_of, skip_of

LATENESS_SECONDS = Histogram(
    "carillon_scheduler_lateness_seconds",
    "From a timer's due time to the commit of its firing, in business time; from when it was asked for, resumed or"
    " moved, where its due time had passed by then. First firings at their own time only: neither retries, nor those"
    " that waited for a service's answer or for the occurrence before them.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
DUE = Counter("carillon_scheduler_timers_due_total", "Timers whose time came, whatever then became of them.")
FIRED = Counter("carillon_scheduler_timers_fired_total", "Timers fired, by what they do.", ["target"])
DECIDED = Counter(
    "carillon_scheduler_timers_decided_total",
    "Timers that ended otherwise than by firing; done and failed also after they had fired, by a report or for want of"
    " one.",
    ["state"],
)
SKIPPED = Counter(
    "carillon_scheduler_timers_skipped_total",
    "Timers that were skipped: missed (it was too late), overlap (the occurrence before had no outcome), condition (not"
    " true), answer (a service said no), no_answer (it said nothing).",
    ["reason"],
)
RETRIES = Counter(
    "carillon_scheduler_retries_total",
    "Events that are to be published once more: no_report came in time, or one that it failed (reported). Those that"
    " were the last attempt are in timers_decided_total, as failed.",
    ["reason"],
)
ACCEPTED = Counter("carillon_scheduler_timers_accepted_total", "Timers stored, successors and follow-ups included.")
FORGOTTEN = Counter("carillon_scheduler_timers_forgotten_total", "Timers deleted, history_retention after their time.")
TURNS = Counter("carillon_scheduler_turns_total", "Transactions of the engine, by how they ended.", ["result"])
FENCED = Counter(
    "carillon_scheduler_fenced_writes_total",
    "Times a shard turned out to be another's by now, at a turn or a renewal, and nothing was written (INV-3).",
)
WHEEL_TIMERS = Gauge("carillon_scheduler_wheel_timers", "Timers read ahead into the wheels of this replica.")
MAILBOX_FRAMES = Gauge("carillon_scheduler_mailbox_frames", "Frames in memory that wait for their shard's turn.")
PAGES = Counter("carillon_scheduler_pages_total", "Pages of waiting timers read.")
WATERMARK_LAG_SECONDS = Gauge(
    "carillon_scheduler_watermark_lag_seconds", "How late the latest shard of this replica is, in business time."
)
SHARDS = Gauge("carillon_scheduler_shards", "Shards there are, as fixed at install.")
SHARDS_HELD = Gauge("carillon_scheduler_shards_held", "Shards this replica holds.")
SHARDS_UNHELD = Gauge(
    "carillon_scheduler_shards_unheld",
    "Shards that nobody holds by the database's clock, of all replicas, when this one last looked: their timers do not"
    " fire. Looked at with every renewal of the leases.",
)
LIVE_REPLICAS = Gauge("carillon_scheduler_live_replicas", "Replicas that share the shards, when this one last looked.")
TAKEOVERS = Counter("carillon_scheduler_takeovers_total", "Shards taken by this replica.")
UNHELD_SECONDS = Histogram(
    "carillon_scheduler_unheld_seconds",
    "How long a shard that this replica took had had no holder, by the database's clock: since it was released, or its"
    " lease ended. Meanwhile its timers did not fire.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
)
RENEWALS = Counter("carillon_scheduler_lease_renewals_total", "Renewals of all leases, by how they ended.", ["result"])
FIRING_PAUSED = Gauge(
    "carillon_scheduler_firing_paused",
    "1 while this replica fires nothing because a link or the event backlog is full, otherwise 0.",
)
EVENTS_PUBLISHED = Counter("carillon_scheduler_events_published_total", "Events JetStream took over.")
EVENT_PUBLISH_FAILURES = Counter(
    "carillon_scheduler_event_publish_failures_total", "Publications of events JetStream did not take."
)
EVENTS_REPUBLISHED = Counter("carillon_scheduler_events_republished_total", "Events a sweeper published again.")
EVENTS_UNCONFIRMED = measured.Gauge(
    "carillon_scheduler_events_unconfirmed", "Events committed that JetStream has not acknowledged, of all replicas."
)
OLDEST_UNCONFIRMED_EVENT_SECONDS = measured.Gauge(
    "carillon_scheduler_oldest_unconfirmed_event_seconds",
    "Age of the oldest event that JetStream has not acknowledged; 0 without any.",
)
QUESTIONS = Counter(
    "carillon_scheduler_questions_total",
    "Questions about conditions to business services; dropped ones were not asked, for want of room.",
    ["result"],
)
ANSWER_SECONDS = exemplars.Histogram(
    "carillon_scheduler_answer_seconds",
    "From asking a business service to its answer, or to giving up on it.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

_LATE_STARTS = 100_000  # Of timers that were due when they were asked for; nearly all fire in the same turn.

_NO_POINTS: Mapping[UUID, Point] = {}

_FIRED = {kind: FIRED.labels(kind.name.lower()) for kind in TargetKind}
_DECIDED = {
    state: DECIDED.labels(state.name.lower())
    for state in (State.SKIPPED, State.CANCELLED, State.EXPIRED, State.FAILED, State.DONE)
}
_SKIPPED = {reason: SKIPPED.labels(reason.value) for reason in Skip}
_RETRIES = {reason: RETRIES.labels(reason.value) for reason in Retry}
_TURNS = {result: TURNS.labels(result) for result in ("committed", "failed")}
for _result in ("committed", "failed"):
    RENEWALS.labels(_result)
for _result in ("true", "false", "no_answer", "dropped"):
    QUESTIONS.labels(_result)

_due_since: dict[UUID, datetime] = {}


def count_turn(changes: Iterable[Changes], now: datetime, points: Mapping[UUID, Point] = _NO_POINTS) -> None:
    """Count what a committed turn did; `points` lead to the traces of those that have one."""
    _TURNS["committed"].inc()
    for one in changes:
        ACCEPTED.inc(len(one.inserts))
        DUE.inc(one.due)
        _remember(one.due_since)
        for timer in one.fired:
            _FIRED[timer.target_kind].inc()
            due_at = _due_since.pop(timer.id, timer.due_at) if _due_since else timer.due_at
            if timer.state is State.SCHEDULED:
                exemplar = exemplars.exemplar_at(points.get(timer.id, NOWHERE)) if points else None
                LATENESS_SECONDS.observe(max(0.0, (now - due_at).total_seconds()), exemplar)
        for attempt in one.attempts:
            after = one.updates.get(attempt.timer_id)
            if after is not None and after.state is State.RETRYING:
                _RETRIES[retry_of(attempt)].inc()
        for timer in (*one.updates.values(), *one.inserts.values()):
            if timer.state in _DECIDED:
                _DECIDED[timer.state].inc()
                if timer.state is State.SKIPPED:
                    _SKIPPED[skip_of(timer)].inc()


def _remember(due_since: Mapping[UUID, datetime]) -> None:
    """Of the oldest it forgets (INV-9) how late they were asked for, and takes them for late themselves."""
    _due_since.update(due_since)
    while len(_due_since) > _LATE_STARTS:
        del _due_since[next(iter(_due_since))]
