"""The metrics of running services are those of docs/metrics.md, with no other labels and no other values of them."""

import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from local.stack import Stack
from tools.metrics_doc import COMMON, SERVICES, TARGET

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LABEL = re.compile(r"`(\w+)`: ([^;]*)")
OF_LIBRARIES = ("grpc.",)
"""gRPC's own services, for health and reflection, are not of our contracts."""

Labels = dict[str, set[str] | None]
"""The values of each label; None: any."""


def documented(service: str) -> dict[str, Labels]:
    """What the page says a service has."""
    _, *parts = HEADING.split(TARGET.read_text())
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    lines = (tables[COMMON.capitalize()] + tables[service.capitalize()]).splitlines()
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines if line.startswith("| `")]
    return {name.strip("`"): _labels(labels) for name, _, labels, _ in rows}


def _labels(cell: str) -> Labels:
    found: Labels = {}
    for label, words in LABEL.findall(cell):
        values = {"" if word == "none" else word.strip("`") for word in words.split(", ")}
        found[label] = values if words.startswith(("`", "none")) else None
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_what_is_documented_and_nothing_else(guarded: Stack, service: str) -> None:
    """Every metric is there with at least one series, whatever has happened so far, and every series is foreseen."""
    with urlopen(f"{guarded.http(service)}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    expected = documented(service)
    shown = {
        f"{one.name}_total" if one.type == "counter" else one.name: one.samples
        for one in families
        if one.name.startswith("carillon_")
    }
    assert shown.keys() == expected.keys()
    for name, samples in shown.items():
        assert samples, f"{name} has no series"
        for one in samples:
            labels = {label: value for label, value in one.labels.items() if label != "le"}
            assert labels.keys() == expected[name].keys(), name
            for label, value in labels.items():
                known = expected[name][label]
                assert known is None or value in known or value.startswith(OF_LIBRARIES), f"{name}: {label}={value}"


def test_the_page_is_read_as_it_is_meant() -> None:
    """Or the other test would compare nothing."""
    assert Path(TARGET).exists()
    page = documented("digest")
    assert page["carillon_digest_batch_runs_total"] == {"result": {"new", "repeated"}}
    assert page["carillon_rpc_in_flight"]["method"] is None
    assert "" in (page["carillon_digest_items_total"]["reason"] or set())
    assert page["carillon_clock_drift_seconds"] == {}
