"""The alert rules: promtool finds nothing wrong with them, and each has a runbook page and series that try it.

The series are in alerts/<Alert>.yaml, promtool's unit tests: some fire the alert, some look like it and must not.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer
import yaml

from cli.main import app
from tools.prometheus import program

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "deploy" / "helm" / "carillon" / "files" / "alerts.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks"
SERIES = ROOT / "tests" / "monitoring" / "alerts"
SEVERITIES = {"critical", "warning"}
PAGES = sorted(RUNBOOKS.glob("*.md"))
METRICS = set(re.findall(r"`(carillon_\w+)", (ROOT / "docs" / "metrics.md").read_text()))
SETTINGS = set(re.findall(r"`(CARILLON_\w+)", (ROOT / "docs" / "settings.md").read_text()))
CODE = "\n".join(path.read_text() for part in ("libs", "services", "cli") for path in (ROOT / part).rglob("*.py"))
RULE_FILE: dict[str, Any] = yaml.safe_load(RULES.read_text())
ALERTS: list[dict[str, Any]] = [rule for group in RULE_FILE["groups"] for rule in group["rules"] if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})


def _name(rule: dict[str, Any]) -> str:
    return "-".join((rule["alert"], *filter(None, _key(rule["labels"]))))


def _promtool(*arguments: str | Path) -> str:
    """What promtool says; fails the test with it when promtool is not content."""
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=170
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def _key(labels: dict[str, str]) -> tuple[str, str]:
    """What tells the rules of one alert apart: severity and, of burn rates, the long window."""
    return labels["severity"], labels.get("window", "")


def _tried(alert: str) -> tuple[set[tuple[str, str]], bool]:
    """The rules that an alert's series fire, and whether there are series that fire none."""
    fired, is_silent_too = set(), False
    for test in yaml.safe_load((SERIES / f"{alert}.yaml").read_text())["tests"]:
        for one in test.get("alert_rule_test", ()):
            fired |= {_key(expected["exp_labels"]) for expected in one.get("exp_alerts", ())}
            is_silent_too |= not one.get("exp_alerts")
        for one in test.get("promql_expr_test", ()):
            for sample in one.get("exp_samples", ()):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"]))
                if sample["labels"].startswith("ALERTS{") and labels["alertname"] == alert:
                    fired.add(_key(labels))
    return fired, is_silent_too


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    """They parse, none is there twice, and lint has nothing to say."""
    assert "SUCCESS" in _promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


@pytest.mark.timeout(180)  # Hours of series.
@pytest.mark.parametrize("alert", NAMES)
def test_an_alert_fires_when_it_must_and_only_then(alert: str) -> None:
    """On its series: outages, and what only looks like one."""
    _promtool("test", "rules", SERIES / f"{alert}.yaml")


@pytest.mark.parametrize("rule", ALERTS, ids=_name)
def test_series_try_every_rule_both_ways(rule: dict[str, Any]) -> None:
    """Some series fire it, and some leave its alert silent."""
    fired, is_silent_too = _tried(rule["alert"])
    assert _key(rule["labels"]) in fired
    assert is_silent_too


def test_every_alert_has_a_runbook_and_series_and_these_have_an_alert() -> None:
    """An alert without a page helps nobody, and a page without an alert is out of date."""
    assert {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"} == set(NAMES)
    assert {series.stem for series in SERIES.iterdir()} == set(NAMES)


def test_the_index_of_runbooks_names_every_page() -> None:
    """Who opens the directory finds them all, and no link leads nowhere."""
    linked = re.findall(r"\]\((\w+)\.md\)", (RUNBOOKS / "README.md").read_text())
    assert sorted(linked) == NAMES


@pytest.mark.parametrize("alert", NAMES)
def test_a_runbook_says_what_to_do(alert: str) -> None:
    """Each page has the same five questions, in the order in which they are asked."""
    text = (RUNBOOKS / f"{alert}.md").read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    assert headings == [alert, "What it means", "What users notice", "What to look at", "What to do", "It is over when"]


@pytest.mark.parametrize("rule", ALERTS, ids=_name)
def test_an_alert_says_how_bad_it_is_since_when_and_what_to_read(rule: dict[str, Any]) -> None:
    """Severity, `for`, summary, description with values, and the runbook's path."""
    assert rule["labels"]["severity"] in SEVERITIES
    assert "for" in rule
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert annotations["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"
    assert "{{" not in annotations["summary"]


def test_alerts_depend_on_no_label_that_only_some_scrapes_have() -> None:
    """A job is named by whoever scrapes; `service` is taken by some of them, who rename ours."""
    for group in RULE_FILE["groups"]:
        for rule in group["rules"]:
            assert not re.search(r"\b(job|service|pod|instance|namespace)\s*(=|!=|=~|!~)\"", rule["expr"]), rule


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_runbook_names_only_what_is_there(page: Path) -> None:
    """Metrics and settings are in their lists, and what logs are quoted with is in the code."""
    text = page.read_text()
    metrics = {re.sub("_bucket$|_count$|_sum$", "", name) for name in re.findall(r"\bcarillon_\w+", text)}
    assert metrics - METRICS == set()
    assert set(re.findall(r"\bCARILLON_\w*[A-Z]\b", text)) - SETTINGS - {"CARILLON_INTAKE_ENDPOINT"} == set()
    quoted = {" ".join(one.split()) for one in re.findall(r'"([A-Z][^"]+\.)"', text)}
    assert {one for one in quoted if f'"{one}"' not in CODE} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_runbook_says_to_type_can_be_typed(page: Path) -> None:
    """Expressions can be read by Prometheus, and commands, with their options, by `carillon`."""
    for span in re.findall(r"`([^`\n]+)`", page.read_text()):
        if re.search(r"\b(carillon|process)[_:][\w:]+([\[{)]|$)", span):
            promql_parser.parse(span)
        if re.match(r"carillon [a-z]", span):
            _parse(span.removesuffix(" …").split()[1:])


def _parse(words: list[str]) -> None:
    """Complain of a command line that `carillon` would refuse for what it looks like."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
        context = command.context_class(command, parent=context)
    command.make_parser(context).parse_args(list(words))
