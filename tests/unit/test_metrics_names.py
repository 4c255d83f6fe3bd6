"""Every metric of every service: named, labelled, started and documented as Prometheus and its users expect."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.digest import metrics as digest_metrics
from services.dispatcher import metrics as dispatcher_metrics
from services.dispatcher.delivery import CHANNELS
from tools.metrics_doc import COMMON, SERVICES, TARGET, Documented, render

ROOT = Path(__file__).resolve().parents[2]

# What Prometheus, its operator and its exposition format keep for themselves.
TAKEN = {"job", "instance", "namespace", "pod", "container", "endpoint", "service", "le", "quantile"}
PER_CALLER = {"tenant", "subscriber", "entity", "id", "address", "destination", "shard", "replica", "user", "batch"}
MOST_SERIES = 500
"""Of one metric, those of gRPC's methods aside."""


# In a process of its own, because other tests leave series behind.
_ASK = """
import json, sys
from dataclasses import asdict
from prometheus_client import REGISTRY
from tools.metrics_doc import documented, start_everything
start_everything()
labelled = [one._name for one in REGISTRY._collector_to_names if getattr(one, "_labelnames", ())]
json.dump([[asdict(one) for one in documented()], labelled], sys.stdout)
"""


@pytest.fixture(scope="module")
def asked() -> tuple[dict[str, Documented], list[str]]:
    """All metrics that there are, by name; and the names, as prometheus_client has them, of those with labels."""
    answer = subprocess.run([sys.executable, "-c", _ASK], cwd=ROOT, capture_output=True, check=True, timeout=60)
    metrics, labelled = json.loads(answer.stdout)
    return {one["name"]: Documented(**one) for one in metrics}, labelled


@pytest.fixture(scope="module")
def metrics(asked: tuple[dict[str, Documented], list[str]]) -> dict[str, Documented]:
    """All that there are, by name."""
    return asked[0]


def test_names_follow_the_rules_that_promtool_checks(metrics: dict[str, Documented]) -> None:
    """Base units, no types in names, `_total` for counters and for nothing else, and a help text."""
    assert [fault for one in metrics.values() for fault in faults_of(one)] == []


def faults_of(one: Documented) -> list[str]:
    """The rules of `promtool check metrics` that a name can break, and that every name is one of ours."""
    words = one.name.split("_")
    rules = {
        "is not of a service, nor common": one.group == COMMON or one.group in SERVICES,
        "is not lower case": re.fullmatch(r"carillon(_[a-z0-9]+)+", one.name) is not None,
        "has no help text, or one that is no sentence": re.fullmatch(r"[A-Z0-9].*\.", one.help, re.DOTALL) is not None,
        "has a type in its name": not {"gauge", "counter", "histogram", "summary"} & set(words),
        "abbreviates a unit": not {"s", "ms", "sec", "secs", "msec", "kb", "mb", "b", "pct", "percent"} & set(words),
        "is not in base units": not {"milliseconds", "minutes", "hours", "days", "kilobytes"} & set(words),
        "is a counter without _total, or _total without being one": (one.type == "counter") == (words[-1] == "total"),
        "ends as a part of a histogram does": words[-1] not in {"count", "sum", "bucket", "info"}
        or one.name == "carillon_build_info",
        "repeats a label in its name": not {label for label in one.labels if f"_by_{label}" in one.name},
    }
    return [f"{one.name} {fault}" for fault, holds in rules.items() if not holds]


def test_labels_are_bounded_and_clash_with_nobodys(metrics: dict[str, Documented]) -> None:
    """No label is a caller's to choose, and none is one that Prometheus would rename."""
    for one in metrics.values():
        assert not one.labels.keys() & (TAKEN | PER_CALLER), one.name
        series = 1
        for label, values in one.labels.items():
            assert all(len(value) <= 64 for value in values), one.name
            series *= len(values) if label not in {"rpc_service", "method"} else 1
        assert series <= MOST_SERIES, f"{one.name} may have {series} series"


def test_every_metric_with_labels_has_series_from_the_start(asked: tuple[dict[str, Documented], list[str]]) -> None:
    """A rate needs a first value, and an alert on what is not there is silent."""
    metrics, labelled = asked
    started = {name.removesuffix("_total") for name, one in metrics.items() if one.labels}
    assert "carillon_digest_items" in labelled, "prometheus_client keeps its collectors otherwise by now"
    assert set(labelled) - started == set()


def test_both_service_levels_have_their_bucket(metrics: dict[str, Documented]) -> None:
    """Fired within a second, handed over within five minutes: where the bound is missing, nobody can tell."""
    assert "1.0" in metrics["carillon_scheduler_lateness_seconds"].buckets
    assert "300.0" in metrics["carillon_dispatcher_handover_seconds"].buckets


def test_every_reason_that_a_channel_gives_is_there_from_the_start(metrics: dict[str, Documented]) -> None:
    """Looked up in the channels' source: a new reason must be put into metrics.py."""
    known = set(metrics["carillon_dispatcher_attempts_total"].labels["reason"])
    given = {reason.lower() for name in ("smtp", "webhook", "apprise", "log") for reason in _reasons_in(name)}
    assert given - known == set()
    assert "rejected" in given
    assert set(metrics["carillon_dispatcher_attempts_total"].labels["channel"]) == set(CHANNELS)


def test_every_reason_for_the_end_of_a_delivery_is_there_from_the_start(metrics: dict[str, Documented]) -> None:
    """Those of the pipeline's stages, and those of attempts that are for good."""
    known = set(metrics["carillon_dispatcher_deliveries_ended_total"].labels["reason"])
    permanent = {one.lower() for name in ("smtp", "webhook", "apprise") for one in _reasons_in(name, of="Permanent")}
    stages = {one.lower() for one in _reasons_in("pipeline")} - {"none", "breaker_open"}
    assert (permanent | stages) - known == set()
    assert {"gone", "too_old"} <= permanent | stages


def _reasons_in(module: str, *, of: str = "") -> set[str]:
    tree = ast.parse((ROOT / f"services/dispatcher/{module}.py").read_text())
    roots = [
        node
        for node in ast.walk(tree)
        if not of or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == of)
    ]
    return {
        node.attr
        for root in roots
        for node in ast.walk(root)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }


def test_every_reason_for_which_digest_suppresses_is_there_from_the_start() -> None:
    """Looked up in the statements that decide: a new reason must be put into metrics.py."""
    sql = "".join(path.read_text() for path in (ROOT / "services/digest").glob("store_*.py"))
    given = set(re.findall(r"reason = '([a-z_]+)'", sql)) | set(re.findall(r"THEN '([a-z]+_[a-z_]+|off|filter)'", sql))
    assert given - set(digest_metrics.REASONS) == set()
    assert {"cadence_over", "subscriber_deleted"} <= given


def test_unknown_channels_share_one_label() -> None:
    """A channel comes with the frame, so its name may be anything."""
    assert dispatcher_metrics.channel_label("email") == "email"
    assert dispatcher_metrics.channel_label("carrier pigeon") == "other"


def test_the_page_in_the_repository_is_fresh(metrics: dict[str, Documented]) -> None:
    """Run `make docs` after changing a metric."""
    assert TARGET.read_text() == render(metrics.values())


def test_a_row_says_name_type_labels_and_meaning(metrics: dict[str, Documented]) -> None:
    """With every value that a label can have."""
    page = render(metrics.values())
    assert (
        "| `carillon_digest_batch_runs_total` | counter | `result`: `new`, `repeated` | Triggers of batches: new ones,"
        " and those repeated for a logical window that had been triggered. |"
    ) in page
    assert "| `carillon_scheduler_lateness_seconds` | histogram, 0.001 to 3600.0 |  | From a timer's due time" in page
