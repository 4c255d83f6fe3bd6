"""The manifests for those without Helm are what the chart renders, and hold together."""

import base64
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from libs.service import BaseSettings
from services.dispatcher.settings import DispatcherSettings
from tests.chart.objects import environment, pods, runs_service, selects, service_of
from tests.chart.pod_security import violations
from tests.chart.processes import running, variables_of
from tests.chart.rendering import ROOT, SERVICES, VERSIONS, Rendered, render, scenarios
from tests.chart.validation import problems
from tools.helm import program

KUSTOMIZATIONS = ("base", "cronjobs", "monitoring", "dev", "dev-persistent", "dev/carillon")


@cache
def kustomized(name: str, root: Path = ROOT) -> Rendered:
    """What `kubectl kustomize` makes of a directory below k8s/; it asks no cluster."""
    command = [str(program("kubectl")), "kustomize", str(root / "k8s" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Rendered(name, VERSIONS[-1], tuple(one for one in yaml.safe_load_all(done.stdout) if one))


def test_the_manifests_are_fresh() -> None:
    """They are what the chart renders today."""
    check = [sys.executable, "-m", "tools.k8s_base", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_manifest_is_valid_for_every_kubernetes(name: str) -> None:
    """One set of files for all versions, so each object has to be valid for each."""
    objects = kustomized(name).objects
    assert objects
    assert [problem for version in VERSIONS for one in objects for problem in problems(one, version)] == []


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_pod_without_helm_passes_the_restricted_profile(name: str) -> None:
    """Postgres, NATS and the mailbox for trials too; none is given the addresses of services."""
    for pod in pods(kustomized(name).objects):
        assert list(violations(pod)) == [], pod.name
        assert pod.spec["enableServiceLinks"] is False, pod.name


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_nothing_of_helm_and_no_namespace_is_left(name: str) -> None:
    """Whoever applies them says where to; what says it is Helm's is Helm's."""
    for one in kustomized(name).objects:
        assert "namespace" not in one["metadata"], one["metadata"]["name"]
        assert "helm" not in yaml.safe_dump(one["metadata"]).lower(), one["metadata"]["name"]


def test_the_base_is_all_that_the_services_need() -> None:
    """Each runs, is migrated, reads nothing that is not there, and starts with its settings."""
    base = kustomized("base")
    containers = [(pod, one) for pod in pods(base.objects) for one in pod.containers]
    assert sorted(service_of(one) or "" for _, one in containers if runs_service(one)) == sorted(SERVICES)
    assert sorted(service_of(one) or "" for _, one in containers if not runs_service(one)) == sorted(SERVICES)
    accounts = {one["metadata"]["name"] for one in base.of("ServiceAccount")}
    for pod, container in containers:
        assert pod.spec["serviceAccountName"] in accounts, pod.name
        ours = {name for name in environment(container, base) if name.startswith("CARILLON_")}
        assert ours <= variables_of(service_of(container) or "")


@pytest.mark.parametrize("name", ["base", "dev/carillon"])
def test_services_without_helm_start(name: str) -> None:
    """Their own code reads their variables and finds nothing wrong."""
    assert sorted(pod.component for pod, _, _ in running(kustomized(name))) == sorted(SERVICES)


def test_a_changed_setting_restarts_the_pods_without_helm() -> None:
    """kustomize names ConfigMaps after what is in them, and pods name their ConfigMap: no change goes unnoticed."""
    for one in kustomized("base").of("ConfigMap"):
        assert re.fullmatch(r"carillon-[a-z]+-[a-z0-9]{10}", one["metadata"]["name"])


def test_the_cron_job_calls_the_services_of_the_base() -> None:
    """The names and ports that it has for them are there."""
    services = {one["metadata"]["name"]: one for one in kustomized("base").of("Service")}
    (pod,) = pods(kustomized("cronjobs").objects)
    endpoints = [
        value
        for name, value in environment(pod.containers[0], kustomized("cronjobs")).items()
        if name.endswith("ENDPOINT")
    ]
    assert len(endpoints) == len(SERVICES)
    for endpoint in endpoints:
        assert endpoint is not None
        name, _, port = endpoint.partition(":")
        assert int(port) in [one["port"] for one in services[name]["spec"]["ports"]]


def test_the_monitor_sees_the_services_of_the_base() -> None:
    """Each of the four once."""
    (monitor,) = kustomized("monitoring").of("ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    seen = [
        one["metadata"]["labels"]["app.kubernetes.io/component"]
        for one in kustomized("base").of("Service")
        if selects(monitor["spec"]["selector"], one["metadata"]["labels"])
        and endpoint["port"] in {port["name"] for port in one["spec"]["ports"]}
    ]
    assert sorted(seen) == sorted(SERVICES)


def test_monitoring_has_every_dashboard_and_the_alerts() -> None:
    """As they are in the chart."""
    files = {path.name for path in (ROOT / "deploy/helm/carillon/files/dashboards").glob("*.json")}
    maps = list(kustomized("monitoring").of("ConfigMap"))
    assert {name for one in maps for name in one["data"]} == files
    assert all(one["metadata"]["labels"]["grafana_dashboard"] == "1" for one in maps)
    (rules,) = kustomized("monitoring").of("PrometheusRule")
    assert rules["spec"] == yaml.safe_load((ROOT / "deploy/helm/carillon/files/alerts.yaml").read_text())


@pytest.mark.parametrize("name", ["dev", "dev-persistent"])
def test_dev_has_what_the_charts_dev_values_ask_for(name: str) -> None:
    """The Secret with its key, and Postgres, NATS and the mail server at the names and ports that the settings say."""
    dev, chart = kustomized(name), render("dev", namespace="default")
    secrets = {one["metadata"]["name"]: one["data"] for one in dev.of("Secret")}
    for wanted, key in _secrets(chart):
        assert key in secrets[wanted]
    url = base64.b64decode(secrets["carillon-postgres"]["url"]).decode()
    password = base64.b64decode(secrets["carillon-postgres"]["password"]).decode()
    assert url == f"postgresql://carillon:{password}@postgres:5432/carillon"
    there = {(one["metadata"]["name"], port["port"]) for one in dev.of("Service") for port in one["spec"]["ports"]}
    assert ("postgres", 5432) in there
    for _, _, settings in running(chart):
        (nats,) = settings.nats.url
        assert ("nats", 4222) in there
        assert nats == "nats://nats:4222"
        if isinstance(settings, DispatcherSettings):
            assert (settings.smtp.host, settings.smtp.port) in there


def test_devs_services_lead_to_devs_pods() -> None:
    """By label and by port name."""
    dev = kustomized("dev")
    for service in dev.of("Service"):
        (pod,) = (one for one in pods(dev.objects) if selects({"matchLabels": service["spec"]["selector"]}, one.labels))
        names = {port["name"] for container in pod.containers for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_devs_nats_writes_before_it_acknowledges() -> None:
    """NATS itself takes the configuration, and it says so."""
    (config,) = (one for one in kustomized("dev").of("ConfigMap") if one["metadata"]["name"] == "nats")
    assert "sync_interval: always" in config["data"]["nats.conf"]
    server = ROOT / ".venv" / "bin" / "nats-server"
    check = [str(server), "--config", str(ROOT / "k8s/dev/nats.conf"), "-t"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_two_commands_that_exist() -> None:
    """The directory and the values file that it names are there."""
    readme = (ROOT / "k8s" / "README.md").read_text()
    block = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)[0].splitlines()
    assert len(block) == 2
    for path in re.findall(r"(?:k8s|deploy)/[\w/.-]+", "\n".join(block)):
        assert (ROOT / path).exists(), path
    assert "dev" in scenarios()


def test_the_readmes_kustomization_does_what_it_says(tmp_path: Path) -> None:
    """Copied into this directory it renders, with its namespace, its image, its setting and its pull secret."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    shutil.copytree(ROOT / "deploy/helm/carillon/files", tmp_path / "deploy/helm/carillon/files")
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "k8s" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "k8s" / "kustomization.yaml").write_text(block)
    own = kustomized("", tmp_path)
    assert {one["metadata"]["namespace"] for one in own.objects} == {"carillon"}
    for pod in pods(own.objects):
        assert {one["image"] for one in pod.containers} == {"registry.example.org/carillon:0.1.0"}
        assert pod.spec["imagePullSecrets"] == [{"name": "registry"}]
    assert {pod.component: _smtp(settings) for pod, _, settings in running(own)} == {
        "intake": None,
        "scheduler": None,
        "digest": None,
        "dispatcher": "smtp.example.org",
    }


def _smtp(settings: BaseSettings) -> str | None:
    return settings.smtp.host if isinstance(settings, DispatcherSettings) else None


def _secrets(rendered: Rendered) -> set[tuple[str, str]]:
    """Secrets and keys that pods cannot start without."""
    references = [
        one["valueFrom"]["secretKeyRef"]
        for pod in pods(rendered.objects)
        for container in pod.containers
        for one in container.get("env") or []
        if "secretKeyRef" in one.get("valueFrom", {})
    ]
    return {(one["name"], one["key"]) for one in references if not one.get("optional")}
