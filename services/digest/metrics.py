"""What digest tells Prometheus. Labels are states, reasons and outcomes: fixed words, never ids."""

from prometheus_client import Counter, Gauge, Histogram

from services.digest.catalog import ItemState

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
WINDOWS_OPENED = Counter("carillon_digest_windows_opened_total", "Windows opened, those of items sent alone left out.")
OPEN_WINDOWS = Gauge("carillon_digest_open_windows", "Windows that take items, exact.")
CLOSING_WINDOWS = Gauge("carillon_digest_closing_windows", "Windows that wait to be rendered, exact.")
OVERDUE_SECONDS = Gauge(
    "carillon_digest_overdue_seconds",
    "Business time since the due time of the window that has waited longest to be rendered; 0 without any.",
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

RESULTS = ("sent", "empty", "no_address", "subscriber_deleted", "dead")

for _state in ItemState:
    if _state is not ItemState.SUPPRESSED:
        ITEMS.labels(_state.name.lower(), "")
for _reason in REASONS:
    ITEMS.labels(ItemState.SUPPRESSED.name.lower(), _reason)
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
