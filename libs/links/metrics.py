"""What the links tell Prometheus. Labels: receiver or sender, both service names."""

from prometheus_client import Counter, Gauge, Histogram

UNCONFIRMED_FRAMES = Gauge(
    "carillon_link_unconfirmed_frames", "Frames committed and without a receipt, exact.", ["receiver"]
)
OLDEST_UNCONFIRMED_SECONDS = Gauge(
    "carillon_link_oldest_unconfirmed_seconds",
    "Age of the oldest frame without a receipt; 0 without any.",
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
DEAD_FRAMES_KEPT = Gauge("carillon_link_dead_frames_kept", "Frames put aside and not redriven yet.")
DEFERRED_FRAMES = Counter(
    "carillon_link_deferred_frames_total", "Frames handed back after a passing failure.", ["sender"]
)
APPLY_SECONDS = Histogram(
    "carillon_link_apply_seconds",
    "Time to apply what one fetch gave, commit included.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
