"""What clocks tell Prometheus: this machine's, the database's, and business time's."""

from prometheus_client import Gauge

DRIFT_SECONDS = Gauge(
    "carillon_clock_drift_seconds",
    "This machine's clock minus the database's, when last measured: above 0, ours is ahead. Nothing is decided by this"
    " machine's clock, but ids, tokens, certificates and logs have its time.",
)
CORRECTION_SECONDS = Gauge(
    "carillon_clock_correction_seconds",
    "How far the database's clock had moved from where this process took it to be, when last measured.",
)
UNCERTAINTY_SECONDS = Gauge(
    "carillon_clock_uncertainty_seconds", "Half the round trip of the last measurement, which is no better than this."
)
AGE_SECONDS = Gauge("carillon_clock_age_seconds", "Time since the last measurement of the database's clock.")
