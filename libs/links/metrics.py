"""What the links tell Prometheus. Labels: receiver or sender, both service names.

A sender's name comes with its frames, so `know` fixes which ones there are; any other is `OTHER`. Series are found once
and kept, because looking one up costs more than changing it.

How old the oldest frame is that a receiver has not applied, only its senders can tell: what JetStream holds may have
been lost, or be there twice. So receivers are scaled on `carillon_link_oldest_unconfirmed_seconds` of their senders.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

from prometheus_client import Counter, Gauge

from libs.telemetry import measured
from libs.telemetry.exemplars import Histogram

OTHER = "other"
"""Senders that nobody expected, and what is no frame."""

UNCONFIRMED_FRAMES = measured.Gauge(
    "carillon_link_unconfirmed_frames",
    "Frames committed and without a receipt, exact, of all replicas of this service.",
    ["receiver"],
)
OLDEST_UNCONFIRMED_SECONDS = measured.Gauge(
    "carillon_link_oldest_unconfirmed_seconds",
    "Age of the oldest frame without a receipt, exact, of all replicas of this service; 0 without any. The receiver is"
    " behind by this much: scale it on this.",
    ["receiver"],
)
PUBLISHED_FRAMES = Counter("carillon_link_published_frames_total", "Frames JetStream took over.", ["receiver"])
PUBLISH_FAILURES = Counter("carillon_link_publish_failures_total", "Publications JetStream did not take.", ["receiver"])
REPUBLISHED_FRAMES = Counter(
    "carillon_link_republished_frames_total", "Frames a sweeper published again.", ["receiver"]
)
CONFIRMED_FRAMES = Counter("carillon_link_confirmed_frames_total", "Frames deleted on their receipt.", ["receiver"])
APPLIED_FRAMES = Counter("carillon_link_applied_frames_total", "Frames applied for the first time.", ["sender"])
APPLIED_ENTRIES = Counter(
    "carillon_link_applied_entries_total", "Entries in frames applied for the first time.", ["sender"]
)
DUPLICATE_FRAMES = Counter(
    "carillon_link_duplicate_frames_total", "Frames that came again and had no effects.", ["sender"]
)
DEAD_FRAMES = Counter("carillon_link_dead_frames_total", "Frames put aside.", ["sender"])
DEAD_FRAMES_KEPT = Gauge(
    "carillon_link_dead_frames_kept",
    "Frames put aside and not redriven yet, of all replicas of this service. Counted once a minute.",
)
DEFERRED_FRAMES = Counter(
    "carillon_link_deferred_frames_total", "Frames handed back after a passing failure.", ["sender"]
)
APPLY_SECONDS = Histogram(
    "carillon_link_apply_seconds",
    "Time to apply what one fetch gave, commit included.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
DELAY_SECONDS = Histogram(
    "carillon_link_delay_seconds",
    "From the making of a frame, by its sender's clock, to its first application, by the database's; one that is rolled"
    " back counts as well.",
    ["sender"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbound:
    """The series of what goes to one receiver."""

    unconfirmed_frames: Gauge
    oldest_unconfirmed_seconds: Gauge
    published_frames: Counter
    publish_failures: Counter
    republished_frames: Counter
    confirmed_frames: Counter


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbound:
    """The series of what comes from one sender."""

    applied_frames: Counter
    applied_entries: Counter
    duplicate_frames: Counter
    deferred_frames: Counter
    dead_frames: Counter
    delay_seconds: Histogram

    def took(self, delay: timedelta) -> None:
        """So long a frame was on its way, or less than nothing, where the two clocks differ by more."""
        self.delay_seconds.observe(max(0.0, delay.total_seconds()))


@cache
def to(receiver: str) -> Outbound:
    """What goes to a receiver, whose name is one of ours."""
    return Outbound(
        unconfirmed_frames=UNCONFIRMED_FRAMES.labels(receiver),
        oldest_unconfirmed_seconds=OLDEST_UNCONFIRMED_SECONDS.labels(receiver),
        published_frames=PUBLISHED_FRAMES.labels(receiver),
        publish_failures=PUBLISH_FAILURES.labels(receiver),
        republished_frames=REPUBLISHED_FRAMES.labels(receiver),
        confirmed_frames=CONFIRMED_FRAMES.labels(receiver),
    )


def come_from(sender: str) -> Inbound:
    """What comes from a sender, whose name may be anything."""
    return _INBOUND.get(sender) or _INBOUND[OTHER]


def know(*, receivers: Iterable[str], senders: Iterable[str]) -> None:
    """Start every series at 0, so that the first increase is seen; no other sender has any of its own."""
    for receiver in receivers:
        to(receiver)
    for sender in senders:
        _INBOUND[sender] = _inbound(sender)


def _inbound(sender: str) -> Inbound:
    return Inbound(
        applied_frames=APPLIED_FRAMES.labels(sender),
        applied_entries=APPLIED_ENTRIES.labels(sender),
        duplicate_frames=DUPLICATE_FRAMES.labels(sender),
        deferred_frames=DEFERRED_FRAMES.labels(sender),
        dead_frames=DEAD_FRAMES.labels(sender),
        delay_seconds=DELAY_SECONDS.labels(sender),
    )


_INBOUND = {OTHER: _inbound(OTHER)}
