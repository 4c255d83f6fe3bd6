"""Gauges of what has to be asked for, such as a backlog in Postgres, and how they behave when nobody answers.

A gauge that keeps its last value says that all is well while the database is away, and keeps an alert burning in a
process that cannot reach it while the others can. So one that was not set for `FRESH_S` has no series until it is set
again; Prometheus takes that for a series that has ended, and autoscalers for a metric that is missing.
"""

from collections.abc import Iterable
from time import monotonic

import prometheus_client
from prometheus_client.samples import Sample

FRESH_S = 60.0
"""Four times the longest of the intervals in which they are set."""


class Gauge(prometheus_client.Gauge):
    """A gauge without series once its last `set` is `FRESH_S` ago; it begins with 0, as if that had been measured."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._set_at_s = monotonic()

    def set(self, value: float) -> None:
        """Show `value`, until it is older than `FRESH_S`."""
        super().set(value)
        self._set_at_s = monotonic()

    def _child_samples(self) -> Iterable[Sample]:
        return super()._child_samples() if monotonic() - self._set_at_s <= FRESH_S else ()
