"""Every expression of every panel and alert is one that a real Prometheus answers, with data of the real services.

The stack runs under a load that touches everything, scraped once a second; then the expressions are asked. A metric
that was renamed, or a label value that does not exist, gives no data and fails here, not on a screen at night.
"""

import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
import pytest
import pytest_asyncio
import yaml

from tests.monitoring.living import living
from tests.monitoring.watcher import RULES, Refused, Watcher

pytestmark = pytest.mark.timeout(300)

DASHBOARDS = RULES.parent / "dashboards"
_PATIENCE_S = 150
_STEP_S = 2.0
_CHOSEN = {"$__rate_interval": "10s", "$namespace": ".*", "$job": ".*", "$instance": ".*"}
"""What Grafana puts in for its variables, with All chosen in each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """An expression, whether it is asked for an instant only, and where it stands."""

    where: str
    expr: str
    is_instant: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What Prometheus saw, from the end of preparations to the end of the load (Unix times)."""

    watcher: Watcher
    start: float
    end: float
    missing: list[str]
    names: set[str]

    def complaint(self, question: Question) -> str:
        """Why a panel would be empty; nothing when it would not be."""
        expr = question.expr
        for variable, value in _CHOSEN.items():
            expr = expr.replace(variable, value)
        try:
            if unknown := {one.name for one in selectors(expr)} - self.names:
                return f"{question.where}: there is no metric {', '.join(sorted(map(str, unknown)))}"
            if question.is_instant:
                found = [one["value"][1] for one in self.watcher.now(expr, self.end)]
            else:
                series = self.watcher.over(expr, self.start, self.end, _STEP_S)
                found = [value for one in series for _, value in one["values"]]
        except (Refused, ValueError) as error:
            return f"{question.where}: {error}"
        if not any(math.isfinite(float(value)) for value in found):
            return f"{question.where}: no data from {expr}"
        return ""

    def blind(self, expr: str) -> list[str]:
        """The selectors of an alert that have never found anything: it could never fire."""
        window = f"{math.ceil(self.end - self.start)}s"
        found = {one: self.watcher.now(f"last_over_time({one}[{window}])", self.end) for one in plain_selectors(expr)}
        return [one for one, series in found.items() if not series]


def selectors(expr: str) -> Iterator[Any]:
    """The vector selectors in PromQL; raises ValueError where it cannot be read."""
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql_parser.walk(promql_parser.parse(expr), visit)
    yield from found


def plain_selectors(expr: str) -> set[str]:
    """The same as text, without ranges and offsets."""
    return {f"{one.name}{{{', '.join(map(str, one.matchers.matchers))}}}" for one in selectors(expr)}


def questions(dashboard: dict[str, Any]) -> list[Question]:
    """What the panels and the variables of a dashboard ask."""
    asked = [
        Question(where=f"{dashboard['title']}, {panel['title']}", expr=target["expr"], is_instant=target["instant"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    for variable in dashboard["templating"]["list"]:
        if values := re.fullmatch(r"label_values\((.*), (\w+)\)", str(variable["query"])):
            where = f"{dashboard['title']}, variable {variable['name']}"
            asked.append(Question(where=where, expr=f"count by ({values[2]}) ({values[1]})", is_instant=True))
    return asked


ALL = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recorded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Recorded]:
    """A load that lasts until everything has happened, with a moment in which digest stands still."""
    async with living(tmp_path_factory.mktemp("monitoring")) as world:
        start = time.time()
        await world.pause("digest", 4)
        missing = await world.wait_until_moved(_PATIENCE_S)
        yield Recorded(
            watcher=world.watcher,
            start=start,
            end=time.time(),
            missing=missing,
            names=world.watcher.metrics(),
        )


def test_the_load_has_touched_everything(recorded: Recorded) -> None:
    """Otherwise the rest would be proven on zeros."""
    assert recorded.missing == []


@pytest.mark.parametrize("name", ALL)
def test_every_panel_shows_data(recorded: Recorded, name: str) -> None:
    """Each expression parses, names metrics that exist, and has finite values in the time of the load."""
    complaints = [recorded.complaint(question) for question in questions(ALL[name])]
    assert [one for one in complaints if one] == []


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule.get("alert") or rule["record"]))
def test_an_alert_sees_what_it_is_about(recorded: Recorded, rule: dict[str, Any]) -> None:
    """Each of its selectors finds series, also when nothing is wrong; and Prometheus evaluates the rule."""
    assert recorded.blind(rule["expr"]) == []
    states = [(one["health"], one.get("lastError", "")) for one in recorded.watcher.rules() if _is(one, rule)]
    assert states
    assert set(states) == {("ok", "")}


def test_an_expression_that_shows_nothing_is_found(recorded: Recorded) -> None:
    """A misspelt metric, a label value that does not exist, PromQL that is none: each with its own complaint."""
    good = "sum by (target) (rate(carillon_scheduler_timers_fired_total[$__rate_interval]))"
    bad = {
        good.replace("fired_total", "fried_total"): "there is no metric carillon_scheduler_timers_fried_total",
        good.replace("total[", 'total{target="nobody"}['): "no data",
        good.replace("sum by", "some by"): "panel: ",
    }
    ask = [Question(where="panel", expr=expr, is_instant=False) for expr in (good, *bad)]
    good_one, *bad_ones = [recorded.complaint(question) for question in ask]
    assert good_one == ""
    assert all(expected in complaint for expected, complaint in zip(bad.values(), bad_ones, strict=True)), bad_ones
    assert recorded.blind("carillon_digest_unaccounted > 0 and carillon_digest_unacounted > 0") == [
        "carillon_digest_unacounted{}"
    ]


def _is(found: dict[str, Any], rule: dict[str, Any]) -> bool:
    return bool(found["name"] == (rule.get("alert") or rule["record"]))
