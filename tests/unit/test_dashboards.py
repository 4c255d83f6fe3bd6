"""The dashboards as Grafana gets them: laid out, described, connected. What they show is asked in tests/monitoring."""

import json
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from tools.dashboards.__main__ import TARGET
from tools.dashboards.panels import MEANINGS, OWN, full

ALL: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in sorted(TARGET.glob("*.json"))}


def panels(name: str) -> Iterator[dict[str, Any]]:
    """Those that show something."""
    yield from (panel for panel in ALL[name]["panels"] if panel["type"] != "row")


@pytest.mark.parametrize("name", ALL)
def test_a_panel_says_what_it_shows_and_in_which_unit(name: str) -> None:
    """At night nobody remembers: title, a sentence, a unit, and thresholds where one number is good or bad."""
    for panel in panels(name):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        if panel["type"] == "heatmap":
            assert panel["options"]["yAxis"]["unit"], panel["title"]
            continue
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        if panel["type"] == "stat":
            assert len(panel["fieldConfig"]["defaults"]["thresholds"]["steps"]) > 1, panel["title"]


@pytest.mark.parametrize("name", ALL)
def test_panels_lie_beside_each_other(name: str) -> None:
    """No two cover the same cell of the grid, and none reaches beyond its 24 columns."""
    cells: set[tuple[int, int]] = set()
    for panel in ALL[name]["panels"]:
        at = panel["gridPos"]
        own = set(product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not own & cells, panel["title"]
        cells |= own


@pytest.mark.parametrize("name", ALL)
def test_every_selector_obeys_the_variables(name: str) -> None:
    """Whoever picks one namespace sees nothing of another, on any panel."""
    for panel in panels(name):
        for target in panel["targets"]:
            bare = re.sub(r'"[^"]*"', "", target["expr"])
            metrics = len(re.findall(r"\b(?:carillon|process)_\w+", bare))
            assert metrics == target["expr"].count('namespace=~"$namespace", job=~"$job", instance=~"$instance"}')


def test_all_dashboards_lead_to_all_others() -> None:
    """By links that keep the time, the data source and the namespace; and no link leads nowhere."""
    uids = {dashboard["uid"] for dashboard in ALL.values()}
    for name, dashboard in ALL.items():
        linked = {re.sub(r"/d/([^?]+).*", r"\1", link["url"]) for link in dashboard["links"]}
        assert linked == uids - {dashboard["uid"]}
        for link in (*dashboard["links"], *(link for panel in panels(name) for link in panel.get("links", ()))):
            assert link["keepTime"]
            assert link["url"].removesuffix("?${datasource:queryparam}&${namespace:queryparam}") in {
                f"/d/{uid}" for uid in uids
            }


def test_a_name_has_one_meaning() -> None:
    """No word stands under two colours."""
    words = [word for shades in MEANINGS.values() for names in shades for word in names.split("|")]
    words += [word for coloured in OWN.values() for word in coloured]
    assert sorted(words) == sorted(set(words))


def test_a_dashboard_fits_into_a_config_map_that_is_applied() -> None:
    """`kubectl apply` keeps a copy in an annotation, and annotations end at 256 KiB."""
    sizes = {path.name: path.stat().st_size for path in TARGET.glob("*.json")}
    assert max(sizes.values()) < 200 * 1024, sizes


def test_abbreviations_are_written_out() -> None:
    """Braces get the selection behind what they have; empty ranges become Grafana's."""
    chosen = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
    assert full("a{}") == f"a{{{chosen}}}"
    assert full('rate(a{b="c"}[])') == f'rate(a{{b="c", {chosen}}}[$__rate_interval])'
    assert full("rate(a{}[5m])") == f"rate(a{{{chosen}}}[5m])"
