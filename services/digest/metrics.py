"""What digest tells Prometheus. Labels are states, reasons and outcomes: fixed words, never ids."""

from datetime import datetime
from functools import cache

from prometheus_client import Counter, Gauge

from libs.telemetry import measured
from libs.telemetry.exemplars import Histogram
from services.digest.catalog import ItemState, WindowKind
from services.digest.views import Kept, WindowBacklog

REASONS = (
    *("off", "no_address", "no_subscriber", "unknown_type", "unknown_subscriber", "unknown_cadence", "cadence_over"),
    *("subscriber_deleted", "payload_invalid", "filter"),
)

NOTIFICATIONS = Counter("carillon_digest_notifications_total", "Notifications taken over.")
ITEMS = Counter(
    "carillon_digest_items_total",
    "Items (notification × subscriber × choice) that entered a state.",
    ["state", "reason"],
)
items_of = cache(ITEMS.labels)
"""A series of ITEMS by its labels, which are few: finding it costs more than changing it."""
WINDOWS_OPENED = Counter("carillon_digest_windows_opened_total", "Windows opened, those of items sent alone left out.")
OPEN_WINDOWS = measured.Gauge("carillon_digest_open_windows", "Windows that take items, of all replicas.", ["kind"])
CLOSING_WINDOWS = measured.Gauge(
    "carillon_digest_closing_windows", "Windows that wait to be rendered, of all replicas."
)
HELD_WINDOWS = measured.Gauge(
    "carillon_digest_held_windows", "Windows that quiet hours keep from leaving, of all replicas."
)
OVERDUE_SECONDS = measured.Gauge(
    "carillon_digest_overdue_seconds",
    "Business time since the due time of the most overdue window, of all replicas; 0 without any. An open one waits for"
    " its timer, one held by quiet hours for that of their end, one that is closing to be rendered; one of a batch is"
    " due when its fallback is.",
    ["state"],
)
OLDEST_BATCH_WINDOW_SECONDS = measured.Gauge(
    "carillon_digest_oldest_batch_window_seconds",
    "Business time since the first thing in the oldest window that waits for its batch's trigger, of all replicas; 0"
    " without any.",
)
BATCH_TRIGGER_OVERDUE_SECONDS = measured.Gauge(
    "carillon_digest_batch_trigger_overdue_seconds",
    "Business time since half of its cadence's fallback_after was over for the first of the windows that wait for their"
    " batch's trigger, of all replicas; 0 without any.",
)
BATCH_WINDOWS = Counter(
    "carillon_digest_batch_windows_total",
    "Windows of batches that began to close, by their batch's trigger, or because none came (fallback).",
    ["cause"],
)
BATCH_RUNS = Counter(
    "carillon_digest_batch_runs_total",
    "Triggers of batches: new ones, and those repeated for a logical window that had been triggered.",
    ["result"],
)
WINDOW_ITEMS = Histogram(
    "carillon_digest_window_items",
    "Items in a window when it was closed, those of items sent alone left out.",
    buckets=(0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 10000, 50000),
)
DIGESTS = Counter("carillon_digest_rendered_total", "Windows closed, by what came of them.", ["result"])
RENDER_SECONDS = Histogram(
    "carillon_digest_render_seconds",
    "Time to close one batch of windows: claim, render, hand over, commit.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
TEMPLATE_FAILURES = Counter(
    "carillon_digest_template_failures_total",
    "Digests that a tenant's own templates or a business service should have written, and others did.",
)
FORMATTING_REQUESTS = Counter(
    "carillon_digest_formatting_requests_total",
    "Requests to business services to format items; not_asked: for a while after failures, or not registered.",
    ["result"],
)
FORMATTED_ITEMS = Counter(
    "carillon_digest_formatted_items_total",
    "Items in a format, by who wrote them: a service now (asked) or before (cached), or a template for it (fallback).",
    ["result"],
)
FORMATTING_SECONDS = Histogram(
    "carillon_digest_formatting_seconds", "Time that business services took for a request, repetitions included."
)
FORMATTING_WINDOWS = Gauge(
    "carillon_digest_formatting_windows", "Windows of this process that wait for business services."
)
FILTER_ERRORS = Counter(
    "carillon_digest_filter_errors_total",
    "Filters that could not be decided about a notification, which was told all the same.",
)
PRESS_JAMS = Counter("carillon_digest_press_jams_total", "Rendering processes killed over time or memory.")
FORGOTTEN = Counter(
    "carillon_digest_forgotten_total", "Rows deleted because they had been kept for their retention.", ["what"]
)
OUTCOMES = Counter("carillon_digest_delivery_outcomes_total", "Outcomes reported by the dispatcher.", ["outcome"])

LEDGER_NOTIFICATIONS = Gauge(
    "carillon_digest_ledger_notifications",
    "Notifications kept, of all tenants and replicas, as the last complete round of checks counted them.",
)
LEDGER_ITEMS = Gauge(
    "carillon_digest_ledger_items",
    "Items kept, by state, of all tenants and replicas, as the last complete round of checks counted them.",
    ["state"],
)
UNACCOUNTED = Gauge(
    "carillon_digest_unaccounted",
    "Items, notifications and deliveries of all tenants that are missing, or are there and should not be: what this"
    " replica found in the round of checks under way, or in the last one that ended, whichever is more. A round looks"
    " at every row once; carillon_digest_unaccounted_age_seconds says how old what it does not show yet may be. Not"
    " seen: a notification that vanished together with all its items.",
)
UNACCOUNTED_AGE_SECONDS = Gauge(
    "carillon_digest_unaccounted_age_seconds",
    "Real time since the last complete round of checks began, or since the process did where none has ended yet.",
)

OPEN, CLOSING, HELD = "open", "closing", "held"
TRIGGER, FALLBACK = "trigger", "fallback"
NEW, REPEATED = "new", "repeated"
RESULTS = ("sent", "empty", "no_address", "subscriber_deleted", "dead")

for _state in ItemState:
    LEDGER_ITEMS.labels(_state.name.lower())
    if _state is not ItemState.SUPPRESSED:
        ITEMS.labels(_state.name.lower(), "")
for _reason in REASONS:
    ITEMS.labels(ItemState.SUPPRESSED.name.lower(), _reason)
for _kind in WindowKind:
    if _kind is not WindowKind.ALONE:
        OPEN_WINDOWS.labels(_kind.name.lower())
for _word in (OPEN, CLOSING, HELD):
    OVERDUE_SECONDS.labels(_word)
for _cause in (TRIGGER, FALLBACK):
    BATCH_WINDOWS.labels(_cause)
for _result in (NEW, REPEATED):
    BATCH_RUNS.labels(_result)
for _result in RESULTS:
    DIGESTS.labels(_result)
for _result in ("answered", "bad_answer", "no_answer", "not_asked"):
    FORMATTING_REQUESTS.labels(_result)
for _result in ("asked", "cached", "fallback"):
    FORMATTED_ITEMS.labels(_result)
for _what in ("item", "notification", "window", "digest", "batch_run"):
    FORGOTTEN.labels(_what)
for _outcome in ("sent", "dead", "suppressed", "held", "expired"):
    OUTCOMES.labels(_outcome)


def show_backlog(backlog: WindowBacklog, now: datetime) -> None:
    """Set the gauges of windows that are not closed."""
    for kind in WindowKind:
        if kind is not WindowKind.ALONE:
            OPEN_WINDOWS.labels(kind.name.lower()).set(backlog.open.get(kind, 0))
    CLOSING_WINDOWS.set(backlog.closing)
    HELD_WINDOWS.set(backlog.held)
    OVERDUE_SECONDS.labels(OPEN).set(_seconds_since(backlog.open_due_at, now))
    OVERDUE_SECONDS.labels(CLOSING).set(_seconds_since(backlog.closing_due_at, now))
    OVERDUE_SECONDS.labels(HELD).set(_seconds_since(backlog.held_due_at, now))
    OLDEST_BATCH_WINDOW_SECONDS.set(_seconds_since(backlog.batch_opened_at, now))
    BATCH_TRIGGER_OVERDUE_SECONDS.set(_seconds_since(backlog.batch_halfway_at, now))


def show_kept(kept: Kept) -> None:
    """Set the ledger's gauges."""
    LEDGER_NOTIFICATIONS.set(kept.notifications)
    for state in ItemState:
        LEDGER_ITEMS.labels(state.name.lower()).set(kept.items[state])


def _seconds_since(at: datetime | None, now: datetime) -> float:
    return 0.0 if at is None else max(0.0, (now - at).total_seconds())
