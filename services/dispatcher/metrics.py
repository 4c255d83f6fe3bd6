"""What the dispatcher tells Prometheus. Labels are bounded: lanes, states and reasons are enums."""

from collections.abc import Sequence
from functools import cache

from prometheus_client import Counter, Gauge

from libs.telemetry import measured
from libs.telemetry.exemplars import Histogram
from services.dispatcher.delivery import CHANNELS, LANES, Hold, Reason, State
from services.dispatcher.pipeline import Candidate, Settlement

ACCEPTED = Counter(
    "carillon_dispatcher_deliveries_accepted_total", "Deliveries taken in for the first time.", ["channel"]
)
ENDED = Counter(
    "carillon_dispatcher_deliveries_ended_total",
    "Deliveries by what became of them, and why; no reason for those that were sent.",
    ["channel", "outcome", "reason"],
)
ATTEMPTS = Counter(
    "carillon_dispatcher_attempts_total",
    "Attempts that ended; reason `sent` for those that worked.",
    ["channel", "reason"],
)
ATTEMPT_SECONDS = Histogram(
    "carillon_dispatcher_attempt_seconds",
    "How long an attempt took.",
    ["channel"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
HANDOVER_SECONDS = Histogram(
    "carillon_dispatcher_handover_seconds",
    "Real time from when a delivery could be sent until it was handed over, had ended otherwise, or was put off with a"
    " reason. It can be sent from its acceptance on, and again when the wait before a retry, or for a rate or breaker,"
    " is over; each time counts, and the waits do not. Of an attempt lost with its process the claim counts.",
    ["channel"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
)
IN_DOUBT = Counter(
    "carillon_dispatcher_in_doubt_total",
    "Attempts of which nobody knows whether they arrived: `crash` before the record, or the `reply` was lost.",
    ["channel", "cause"],
)
RETRIES = Counter("carillon_dispatcher_retries_total", "Attempts put off until a timer comes back.", ["channel"])
UNDER_WAY = Gauge("carillon_dispatcher_attempts_under_way", "Claimed and not recorded yet, in this process.")
QUEUED = measured.Gauge(
    "carillon_dispatcher_queued_deliveries", "Deliveries waiting or being sent, all replicas.", ["lane"]
)
OLDEST_QUEUED_SECONDS = measured.Gauge(
    "carillon_dispatcher_oldest_queued_seconds",
    "How long the longest-waiting delivery could have been sent, all replicas; 0 without any.",
    ["lane"],
)
DEAD_LETTERS = Gauge(
    "carillon_dispatcher_dead_letters",
    "Deliveries dead or held, that wait for somebody to redrive them, all replicas. Counted once a minute.",
)
FORGOTTEN = Counter(
    "carillon_dispatcher_deliveries_forgotten_total",
    "Deliveries deleted with their attempts, history_retention after their end.",
)
REDRIVEN = Counter("carillon_dispatcher_redriven_total", "Dead letters that somebody had sent again.")
LOST_CLAIMS = Counter(
    "carillon_dispatcher_lost_claims_total", "Attempts recorded too late, because their claim had run out."
)
POSTPONED = Counter(
    "carillon_dispatcher_postponed_total",
    "Deliveries held back before an attempt, by a `rate` or because of a `breaker_open`; each time counts.",
    ["channel", "reason"],
)
OPEN_BREAKERS = Gauge(
    "carillon_dispatcher_open_breakers", "Destinations that this process tries with one attempt at a time.", ["lane"]
)
BREAKER_OPENINGS = Counter(
    "carillon_dispatcher_breaker_openings_total", "Destinations that failed often enough in a row.", ["lane"]
)

UNSUBSCRIBES = Counter(
    "carillon_dispatcher_unsubscribes_total",
    "Requests to unsubscribe: `done`, with a `bad_token`, a `bad_request`, `limited` by the rate, `failed` here.",
    ["result"],
)
BOUNCES = Counter("carillon_dispatcher_bounces_total", "Attempts that found out that an address does not exist.")

DONE, BAD_TOKEN, BAD_REQUEST, LIMITED, FAILED = "done", "bad_token", "bad_request", "limited", "failed"
SENT = "sent"
"""What stands for a reason where an attempt worked."""
CRASH, REPLY_LOST = "crash", "reply"


_OF_ATTEMPTS = (
    *(Reason.REFUSED, Reason.UNREACHABLE, Reason.DISCONNECTED, Reason.TIMEOUT, Reason.RATE_LIMITED, Reason.DEFERRED),
    *(Reason.SERVER_ERROR, Reason.AUTH_FAILED, Reason.TLS_FAILED, Reason.INTERNAL_ERROR),
)
"""Reasons of attempts that may be repeated."""
_FOR_GOOD = (
    *(Reason.REJECTED, Reason.ADDRESS_REJECTED, Reason.SENDER_REJECTED, Reason.ADDRESS_INVALID, Reason.CONTENT_EMPTY),
    *(Reason.REDIRECTED, Reason.GONE, Reason.DESTINATION_FORBIDDEN),
)
"""Reasons of attempts that are not."""
_ENDS = {
    State.SENT: (Reason.NONE,),
    State.DEAD: (*_FOR_GOOD, Reason.UNSUPPORTED, Reason.ATTEMPTS_EXHAUSTED, Reason.TOO_OLD),
    State.SUPPRESSED: (Reason.SUPPRESSED, Reason.BOUNCED, Reason.UNSUBSCRIBED),
    State.HELD: (Reason.IN_DOUBT,),
    State.EXPIRED: (Reason.EXPIRED,),
}

handover_of = cache(HANDOVER_SECONDS.labels)
attempts_of = cache(ATTEMPTS.labels)
attempt_seconds_of = cache(ATTEMPT_SECONDS.labels)
ended_of = cache(ENDED.labels)
accepted_of = cache(ACCEPTED.labels)
"""Series by their labels, which are few: finding one costs more than changing it."""


def channel_label(channel: str) -> str:
    """The channel, when the contract has it."""
    return channel if channel in CHANNELS else "other"


def initialise() -> None:
    """Have every series exist with 0, so that rates and alerts work from the start."""
    for result in (DONE, BAD_TOKEN, BAD_REQUEST, LIMITED, FAILED):
        UNSUBSCRIBES.labels(result)
    for channel in LANES:
        ACCEPTED.labels(channel)
        RETRIES.labels(channel)
        HANDOVER_SECONDS.labels(channel)
        QUEUED.labels(channel)
        OLDEST_QUEUED_SECONDS.labels(channel)
        OPEN_BREAKERS.labels(channel)
        BREAKER_OPENINGS.labels(channel)
        for held in (Reason.RATE, Reason.BREAKER_OPEN):
            POSTPONED.labels(channel, held.value)
        for cause in (CRASH, REPLY_LOST):
            IN_DOUBT.labels(channel, cause)
        for state, reasons in _ENDS.items():
            for reason in reasons:
                ENDED.labels(channel, state.name.lower(), reason.value)
    for channel in CHANNELS:
        ATTEMPT_SECONDS.labels(channel)
        for word in (SENT, *(reason.value for reason in (*_OF_ATTEMPTS, *_FOR_GOOD))):
            ATTEMPTS.labels(channel, word)


def count_ends(settlements: Sequence[Settlement]) -> None:
    """What became of deliveries, once it is committed."""
    BOUNCES.inc(sum(one.is_bounce for one in settlements))
    for one in settlements:
        channel = channel_label(one.channel)
        if one.state is State.RETRYING:
            RETRIES.labels(channel).inc()
        else:
            ended_of(channel, one.state.name.lower(), one.reason.value).inc()


def count_holds(held: Sequence[tuple[Candidate, Hold]]) -> None:
    """Deliveries that are parked."""
    for one, hold in held:
        POSTPONED.labels(channel_label(one.delivery.channel), hold.reason.value).inc()


def count_doubts(letters: Sequence[Candidate], settlements: Sequence[Settlement]) -> None:
    """What a process left behind that ended without recording: now sent again, or held."""
    for one in letters:
        if one.is_in_doubt:
            IN_DOUBT.labels(channel_label(one.delivery.channel), CRASH).inc()
    for settlement in settlements:
        if settlement.number:
            IN_DOUBT.labels(channel_label(settlement.channel), CRASH).inc()
