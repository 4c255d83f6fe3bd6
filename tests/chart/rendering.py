"""Renders the chart with helm: each set of arguments once, because most tests look at the same manifests."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools.helm import program

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "carillon"
VERSIONS = ("1.24.0", "1.30.0", "1.37.0")
OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]
SERVICES = ("intake", "scheduler", "digest", "dispatcher")

# Helm allows release names of 53 characters.
LONGEST_RELEASE = "r2345678901234567890123456789012345678901234567890123"

Object = dict[str, Any]


class Refused(Exception):
    """helm would not render; the message is what it printed."""


@dataclass(frozen=True)
class Rendered:
    """One `helm template`, hooks and tests included."""

    scenario: str
    version: str
    objects: tuple[Object, ...] = field(repr=False)

    def of(self, *kinds: str) -> Iterator[Object]:
        """The objects of these kinds, in the order rendered."""
        return (one for one in self.objects if one["kind"] in kinds)

    def named(self, kind: str, name: str) -> Object | None:
        """The one object of this kind and name."""
        return next((one for one in self.of(kind) if one["metadata"]["name"] == name), None)


def scenarios() -> list[str]:
    """What stands in ci/ as <scenario>-values.yaml."""
    return sorted(path.name.removesuffix("-values.yaml") for path in CHART.glob("ci/*-values.yaml"))


def values_file(scenario: str) -> Path:
    """Where a scenario's values are."""
    return CHART / "ci" / f"{scenario}-values.yaml"


def render(
    scenario: str,
    *,
    version: str = NEWEST,
    release: str = "carillon",
    namespace: str = "shop",
    values: dict[str, Any] | None = None,
) -> Rendered:
    """The chart with a scenario's values, and `values` over them; raises Refused.

    On 1.24 a scenario's batches are in UTC: the chart refuses other zones there, because CronJobs do not know them yet.
    """
    if version == OLDEST:
        values = {**_batches_in_utc(scenario), **(values or {})}
    text = _template(scenario, version, release, namespace, json.dumps(values or {}))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Rendered(scenario, version, tuple(one for one in yaml.load_all(text, Loader=loader) if one))


def helm(*arguments: str, stdin: str = "") -> str:
    """What helm prints; raises Refused. It sees no cluster, no plugins and nobody's configuration."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": os.devnull}
    done = subprocess.run(
        [program("helm"), *arguments], input=stdin, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(done.stderr or done.stdout)
    return done.stdout


@cache
def _batches_in_utc(scenario: str) -> dict[str, Any]:
    batches = yaml.safe_load(values_file(scenario).read_text()).get("batches") or []
    return {"batches": [{**batch, "timeZone": "UTC"} for batch in batches]}


@cache
def _template(scenario: str, version: str, release: str, namespace: str, values: str) -> str:
    options = ["--kube-version", version, "--namespace", namespace, "--values", str(values_file(scenario))]
    return helm("template", release, str(CHART), *options, "--values", "-", stdin=values)
