"""What helm renders is valid, always the same, and gets in nobody's way."""

import re
import subprocess
import sys

import pytest

from tests.chart.objects import pods
from tests.chart.rendering import (
    CHART,
    LONGEST_RELEASE,
    NEWEST,
    ROOT,
    VERSIONS,
    Rendered,
    helm,
    render,
    scenarios,
    values_file,
)
from tests.chart.validation import problems

# Where Kubernetes makes a DNS label of a name. Everything else may have 253 characters, and has not.
LONGEST_NAME = 63
LONGEST_CRON_JOB = 52


@pytest.mark.parametrize("scenario", scenarios())
def test_helm_lint_finds_nothing(scenario: str) -> None:
    """Strictly: a warning is an error."""
    for version in VERSIONS:
        helm("lint", str(CHART), "--strict", "--kube-version", version, "--values", str(values_file(scenario)))


def test_every_object_is_valid_for_its_kubernetes(rendered: Rendered) -> None:
    """Unknown fields, wrong types and missing fields are found; so are kinds that the version does not have."""
    assert [problem for one in rendered.objects for problem in problems(one, rendered.version)] == []


def test_an_unknown_field_is_found() -> None:
    """The check above can fail, for Kubernetes' own kinds of every version and for custom resources."""
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}}
    spec = {"selector": {}, "template": {"spec": {"containers": [{"name": "b", "imagePolicy": "Never"}]}}}
    for version in VERSIONS:
        (found,) = problems({**deployment, "spec": spec}, version)
        assert "imagePolicy" in found
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "ServiceMonitor", "metadata": {"name": "a"}}
    (found,) = problems({**monitor, "spec": {"selector": {}, "endpoints": [{"prot": "http"}]}}, NEWEST)
    assert "prot" in found
    (found,) = problems({**deployment, "kind": "Deploiment"}, NEWEST)
    assert "Kubernetes 1.37.0 has no apps/v1 Deploiment" in found


def test_rendering_twice_gives_the_same() -> None:
    """No random names, passwords or times: what has not changed is not rolled out, and Argo CD sees no difference."""
    for scenario in scenarios():
        arguments = ("template", "carillon", str(CHART), "--values", str(values_file(scenario)))
        assert helm(*arguments) == helm(*arguments), scenario


@pytest.mark.parametrize("scenario", scenarios())
def test_names_are_short_enough_for_the_longest_release(scenario: str) -> None:
    """Also those that Kubernetes lengthens: a CronJob's Jobs."""
    for one in render(scenario, release=LONGEST_RELEASE).objects:
        name = one["metadata"]["name"]
        longest = LONGEST_CRON_JOB if one["kind"] == "CronJob" else LONGEST_NAME
        assert len(name) <= longest, f"{one['kind']}/{name} has {len(name)} characters"
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name), name


@pytest.mark.parametrize("scenario", scenarios())
def test_label_values_are_short_enough_for_the_longest_release(scenario: str) -> None:
    """63 characters, for objects and for pods."""
    objects = render(scenario, release=LONGEST_RELEASE).objects
    for labelled in [*(one["metadata"].get("labels") or {} for one in objects), *(pod.labels for pod in pods(objects))]:
        for name, value in labelled.items():
            assert re.fullmatch(r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]?", value), f"{name}: {value}"


@pytest.mark.parametrize("scenario", scenarios())
@pytest.mark.parametrize(
    "others", [("one", "two"), (LONGEST_RELEASE, f"{LONGEST_RELEASE[:-1]}4")], ids=["short", "long"]
)
def test_two_releases_share_a_namespace(scenario: str, others: tuple[str, str]) -> None:
    """No object of one has the name of one of the other, and nothing selects the other's pods."""
    first, second = (render(scenario, release=release) for release in others)
    assert _identities(first) & _identities(second) == set()
    for one in first.of("Service", "Deployment"):
        chosen = one["spec"]["selector"]
        wanted = chosen.get("matchLabels", chosen) if one["kind"] == "Deployment" else chosen
        assert not any(wanted.items() <= pod.labels.items() for pod in pods(second.objects)), one["metadata"]["name"]


def test_names_within_a_release_are_unique(rendered: Rendered) -> None:
    """Two objects of one kind and name would overwrite each other."""
    assert len(_identities(rendered)) == len(rendered.objects)


@pytest.fixture
def own(rendered: Rendered) -> Rendered:
    """Without what the scenario adds of its own, and with everything in the release's namespace."""
    watching = {name: {"namespace": ""} for name in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")}
    values = {"extraObjects": [], "monitoring": watching}
    return render(rendered.scenario, version=rendered.version, values=values)


def test_every_object_carries_the_standard_labels(own: Rendered) -> None:
    """What kubectl, dashboards and Argo CD find things by."""
    standard = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "version", "managed-by", "part-of")}
    for one in own.objects:
        labels = one["metadata"].get("labels") or {}
        missing = standard - set(labels)
        assert not missing, f"{one['kind']}/{one['metadata']['name']}: {missing}"
        assert labels["app.kubernetes.io/part-of"] == "carillon"


def test_every_object_is_in_the_releases_namespace(own: Rendered) -> None:
    """So that `helm template | kubectl apply` puts everything where helm would."""
    for one in own.objects:
        assert one["metadata"].get("namespace") == "shop", f"{one['kind']}/{one['metadata']['name']}"


@pytest.mark.parametrize("scenario", scenarios())
def test_the_notes_say_what_to_do_next(scenario: str) -> None:
    """They render, with nothing left out by mistake, and what they name is there."""
    printed = helm("install", "carillon", str(CHART), "--dry-run=client", "--values", str(values_file(scenario)))
    _, _, notes = printed.partition("NOTES:")
    assert re.search(r"\bhelm (-n \S+ )?test\b", notes)
    rendered = render(scenario, namespace="default")
    services = re.findall(r"\bservice/([\w-]+)|([\w-]+)\.default\.svc\b", notes)
    assert services
    others = {"kubernetes"}  # The API server's.
    assert all(rendered.named("Service", name) for pair in services for name in pair if name and name not in others)
    assert all(rendered.named("CronJob", name) for name in re.findall(r"\bcronjob/([\w-]+)", notes))
    # Given several by a label, kubectl 1.24 waits until its timeout, although all are ready.
    assert not re.search(r"rollout status.* -l\b", notes)
    assert "<no value>" not in printed
    assert "%!" not in printed, "a printf that got the wrong number of arguments"


def test_the_charts_readme_is_fresh() -> None:
    """It is generated from values.yaml."""
    checked = [sys.executable, str(ROOT / "tools" / "chart_readme.py"), "--check"]
    done = subprocess.run(checked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _identities(rendered: Rendered) -> set[tuple[str, str, str]]:
    return {(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in rendered.objects}
