"""What intake tells Prometheus. Labels: method is an RPC's name, outcome and state are from fixed lists."""

from functools import cache

from prometheus_client import Counter, Gauge

from services.intake.requests import State

METHODS = (
    *("Notify", "Schedule", "Cancel", "PutFacts", "StartTimeline"),
    *("Reschedule", "Pause", "Resume", "TriggerSchedule", "BackfillSchedule", "ReportOutcome"),
    *("SubmitRequest", "RecordResponse", "WithdrawRequest", "TriggerBatch"),
)

ITEMS = Counter("carillon_intake_items_total", "Items of commands, accepted or refused.", ["method", "outcome"])
items_of = cache(ITEMS.labels)
"""A series of ITEMS by its labels, which are few: finding it costs more than changing it."""

REPEATS = Counter(
    "carillon_intake_repeated_calls_total", "Calls answered from their idempotency key; they did nothing.", ["method"]
)
NOT_YET_APPLIED = Counter(
    "carillon_intake_not_yet_applied_total",
    "Calls that waited for APPLIED, answered before it came.",
    ["method"],
)
CLOSED_REQUESTS = Counter(
    "carillon_intake_closed_requests_total",
    "Requests that ended: with answers (closed), without (expired), or withdrawn.",
    ["state"],
)
PRUNED_KEYS = Counter("carillon_intake_pruned_keys_total", "Idempotency keys forgotten because of their age.")
FORGOTTEN_REQUESTS = Counter(
    "carillon_intake_forgotten_requests_total", "Requests deleted because they had been over for their retention."
)
LIMITED_CALLS = Counter(
    "carillon_intake_limited_calls_total", "Calls refused because of their tenant's limits: rate or backlog.", ["limit"]
)
STREAM_BATCHES = Gauge("carillon_intake_stream_batches", "Batches of streaming calls under way now.")


def initialise() -> None:
    """Start every series at 0, so that the first increase is seen."""
    for method in METHODS:
        ITEMS.labels(method, "accepted")
        ITEMS.labels(method, "refused")
        REPEATS.labels(method)
        NOT_YET_APPLIED.labels(method)
    for limit in ("rate", "backlog"):
        LIMITED_CALLS.labels(limit)
    for state in (State.CLOSED, State.EXPIRED, State.WITHDRAWN):
        CLOSED_REQUESTS.labels(state.name.lower())
