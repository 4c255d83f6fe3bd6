"""Gauges that stand for something elsewhere: they do not outlive what was last seen of it."""

import math

import pytest
from prometheus_client import CollectorRegistry

from libs.telemetry import measured
from libs.telemetry.measured import FRESH_S, Gauge


@pytest.fixture
def at_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock; its only item is the time in seconds."""
    now = [1_000.0]
    monkeypatch.setattr(measured, "monotonic", lambda: now[0])
    return now


def test_a_gauge_that_nobody_sets_is_missing_until_somebody_does(at_s: list[float]) -> None:
    """It begins with 0, and is there for as long as it is fresh."""
    registry = CollectorRegistry()
    gauge = Gauge("backlog", "What waits.", registry=registry)
    seen = []
    for wait_s in (0.0, FRESH_S, 1.0):
        at_s[0] += wait_s
        seen.append(registry.get_sample_value("backlog"))
    gauge.set(7)
    seen.append(registry.get_sample_value("backlog"))
    assert seen == [0, 0, None, 7]


def test_each_series_is_as_old_as_its_own_last_value(at_s: list[float]) -> None:
    """And `labels` gives the one that will be seen again."""
    registry = CollectorRegistry()
    gauge = Gauge("backlog", "What waits.", ["lane"], registry=registry)
    email, webhook = gauge.labels("email"), gauge.labels("webhook")
    at_s[0] += FRESH_S
    email.set(3)
    at_s[0] += 1
    lanes = [registry.get_sample_value("backlog", {"lane": lane}) or math.nan for lane in ("email", "webhook")]
    assert lanes[0] == 3
    assert math.isnan(lanes[1])
    webhook.set(4)
    assert registry.get_sample_value("backlog", {"lane": "webhook"}) == 4
