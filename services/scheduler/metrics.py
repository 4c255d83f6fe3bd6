"""What the scheduler tells Prometheus."""

from collections.abc import Iterable
from datetime import datetime

from prometheus_client import Counter, Gauge, Histogram

from services.scheduler.commands import Changes
from services.scheduler.timer import State, TargetKind

LATENESS_SECONDS = Histogram(
    "carillon_scheduler_lateness_seconds",
    "From a timer's due time to the commit of its firing, in business time.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
FIRED = Counter("carillon_scheduler_timers_fired_total", "Timers fired, by what they do.", ["target"])
DECIDED = Counter("carillon_scheduler_timers_decided_total", "Timers that ended without firing.", ["state"])
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
SHARDS_HELD = Gauge("carillon_scheduler_shards_held", "Shards this replica holds.")
TAKEOVERS = Counter("carillon_scheduler_takeovers_total", "Shards taken by this replica.")
RENEWALS = Counter("carillon_scheduler_lease_renewals_total", "Renewals of all leases, by how they ended.", ["result"])
EVENTS_PUBLISHED = Counter("carillon_scheduler_events_published_total", "Events JetStream took over.")
EVENT_PUBLISH_FAILURES = Counter(
    "carillon_scheduler_event_publish_failures_total", "Publications of events JetStream did not take."
)
EVENTS_REPUBLISHED = Counter("carillon_scheduler_events_republished_total", "Events a sweeper published again.")
EVENTS_UNCONFIRMED = Gauge(
    "carillon_scheduler_events_unconfirmed", "Events committed that JetStream has not acknowledged, of all replicas."
)
OLDEST_UNCONFIRMED_EVENT_SECONDS = Gauge(
    "carillon_scheduler_oldest_unconfirmed_event_seconds",
    "Age of the oldest event that JetStream has not acknowledged; 0 without any.",
)
QUESTIONS = Counter(
    "carillon_scheduler_questions_total",
    "Questions about conditions to business services; dropped ones were not asked, for want of room.",
    ["result"],
)
ANSWER_SECONDS = Histogram(
    "carillon_scheduler_answer_seconds",
    "From asking a business service to its answer, or to giving up on it.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

_FIRED = {kind: FIRED.labels(kind.name.lower()) for kind in TargetKind}
_DECIDED = {
    state: DECIDED.labels(state.name.lower()) for state in (State.SKIPPED, State.CANCELLED, State.EXPIRED, State.FAILED)
}
for _result in ("committed", "failed"):
    TURNS.labels(_result)
    RENEWALS.labels(_result)
for _result in ("true", "false", "no_answer", "dropped"):
    QUESTIONS.labels(_result)


def count_turn(changes: Iterable[Changes], now: datetime) -> None:
    """Count what a committed turn did."""
    TURNS.labels("committed").inc()
    for one in changes:
        ACCEPTED.inc(len(one.inserts))
        for timer in one.fired:
            _FIRED[timer.target_kind].inc()
            LATENESS_SECONDS.observe(max(0.0, (now - timer.due_at).total_seconds()))
        for state in (*(it.state for it in one.updates.values()), *(it.state for it in one.inserts.values())):
            if state in _DECIDED:
                _DECIDED[state].inc()
