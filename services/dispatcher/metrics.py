"""What the dispatcher tells Prometheus. Labels are bounded: lanes, states and reasons are enums."""

from prometheus_client import Counter, Gauge, Histogram

from services.dispatcher.delivery import CHANNELS, LANES, TOLD, Reason

ACCEPTED = Counter(
    "carillon_dispatcher_deliveries_accepted_total", "Deliveries taken in for the first time.", ["channel"]
)
ENDED = Counter(
    "carillon_dispatcher_deliveries_ended_total", "Deliveries by what became of them.", ["channel", "outcome"]
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
IN_DOUBT = Counter(
    "carillon_dispatcher_in_doubt_total",
    "Attempts of which nobody knows whether they arrived: `crash` before the record, or the `reply` was lost.",
    ["channel", "cause"],
)
RETRIES = Counter("carillon_dispatcher_retries_total", "Attempts put off until a timer comes back.", ["channel"])
UNDER_WAY = Gauge("carillon_dispatcher_attempts_under_way", "Claimed and not recorded yet, in this process.")
QUEUED = Gauge("carillon_dispatcher_queued_deliveries", "Deliveries waiting or being sent, all replicas.", ["lane"])
OLDEST_QUEUED_SECONDS = Gauge(
    "carillon_dispatcher_oldest_queued_seconds",
    "How long the longest-waiting delivery could have been sent; 0 without any.",
)
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
CRASH, REPLY_LOST = "crash", "reply"


def channel_label(channel: str) -> str:
    """The channel, when the contract has it."""
    return channel if channel in CHANNELS else "other"


def initialise() -> None:
    """Have every bounded series exist with 0, so that rates and alerts work from the start."""
    for result in (DONE, BAD_TOKEN, BAD_REQUEST, LIMITED, FAILED):
        UNSUBSCRIBES.labels(result)
    for channel in LANES:
        ACCEPTED.labels(channel)
        RETRIES.labels(channel)
        ATTEMPT_SECONDS.labels(channel)
        ATTEMPTS.labels(channel, SENT)
        QUEUED.labels(channel).set(0)
        OPEN_BREAKERS.labels(channel)
        BREAKER_OPENINGS.labels(channel)
        for held in (Reason.RATE, Reason.BREAKER_OPEN):
            POSTPONED.labels(channel, held.value)
        for cause in (CRASH, REPLY_LOST):
            IN_DOUBT.labels(channel, cause)
        for state in TOLD:
            ENDED.labels(channel, state.name.lower())
        for reason in (Reason.TIMEOUT, Reason.REJECTED, Reason.UNREACHABLE):
            ATTEMPTS.labels(channel, reason.value)
