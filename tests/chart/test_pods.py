"""Every pod, those of hooks, tests and CronJobs included, is safe, reachable and allowed to end in peace."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from libs.rpc_client import _options
from libs.settings import AuthMode
from services.dispatcher.settings import DispatcherSettings
from tests.chart.objects import Pod, environment, pods, runs_service, selects, service_of
from tests.chart.pod_security import violations
from tests.chart.processes import command_variables, http_paths, running, variables_of
from tests.chart.rendering import SERVICES, Rendered, render, scenarios


def test_every_pod_passes_the_restricted_profile(rendered: Rendered) -> None:
    """A namespace that enforces it takes them all."""
    assert [f"{pod.name}: {problem}" for pod in pods(rendered.objects) for problem in violations(pod)] == []


def test_every_container_has_a_read_only_root(rendered: Rendered) -> None:
    """Nothing of ours writes but to volumes."""
    for pod, container in _containers(rendered):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, f"{pod.name}: {container['name']}"


def test_no_pod_is_given_the_addresses_of_services(rendered: Rendered) -> None:
    """A Service called carillon-grpc would set CARILLON_GRPC_PORT=tcp://…, and the process refuse to start."""
    for pod in pods(rendered.objects):
        assert pod.spec.get("enableServiceLinks") is False, pod.name


def test_no_pod_is_given_a_token_for_the_api_server(rendered: Rendered) -> None:
    """Nothing of ours asks it anything. A projected token for another audience is no such token."""
    for pod in pods(rendered.objects):
        assert pod.spec.get("automountServiceAccountToken") is False, pod.name


@pytest.mark.parametrize("scenario", scenarios())
def test_every_pod_has_the_image_pull_secrets(scenario: str) -> None:
    """Those of hooks, tests and CronJobs too, where other charts forget them."""
    batches = [{"name": "flights", "schedule": "0 */4 * * *"}]
    values = {"imagePullSecrets": [{"name": "registry"}], "global": {"imagePullSecrets": [{"name": "mirror"}]}}
    found = list(pods(render(scenario, values={**values, "batches": batches}).objects))
    assert {pod.owner["kind"] for pod in found} >= {"Deployment", "Job", "CronJob"}
    for pod in found:
        names = [one["name"] for one in pod.spec.get("imagePullSecrets") or []]
        assert {"registry", "mirror"} <= set(names), pod.name


def test_every_variable_is_one_that_the_process_reads(rendered: Rendered) -> None:
    """A misspelt setting would be without effect, and nobody would notice."""
    for pod, container in _containers(rendered):
        known = variables_of(service) if (service := service_of(container)) else command_variables()
        ours = {name for name in environment(container, rendered) if name.startswith("CARILLON_")}
        assert ours <= known, f"{pod.name}: {container['name']}: {ours - known}"


def test_every_service_would_start_with_its_variables(rendered: Rendered) -> None:
    """The service's own code reads them and finds nothing wrong, nor a server that is open to everybody."""
    for _, _, settings in (started := list(running(rendered))):
        assert settings.auth.mode is not AuthMode.NONE
        assert settings.grpc.port
        assert settings.http.port
    assert sorted(pod.component for pod, _, _ in started) == sorted(SERVICES)


def test_files_that_settings_name_are_mounted(rendered: Rendered) -> None:
    """Whatever names a file below one of the container's mounts, and a volume stands behind each mount."""
    for pod, container in _containers(rendered):
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts") or []}
        volumes = {volume["name"] for volume in pod.spec.get("volumes") or []}
        assert set(mounts) <= volumes, f"{pod.name}: {set(mounts) - volumes}"
        for name, value in environment(container, rendered).items():
            if name.endswith("_FILE") and value:
                is_mounted = any(Path(value).is_relative_to(path) for path in mounts.values())
                assert is_mounted, f"{pod.name}: {name}={value}, and mounted are {sorted(mounts.values())}"


def test_the_drain_ends_before_the_grace_period(rendered: Rendered) -> None:
    """preStop and the drain setting together leave time over; SIGKILL finds nobody at work."""
    for pod, container, settings in running(rendered):
        grace = timedelta(seconds=pod.spec["terminationGracePeriodSeconds"])
        assert grace > settings.grpc.drain_timeout + _pre_stop(container), pod.name
        if isinstance(settings, DispatcherSettings):
            assert settings.dispatch.drain_timeout < settings.grpc.drain_timeout


def test_calls_stop_coming_before_the_server_stops(rendered: Rendered) -> None:
    """After SIGTERM endpoints are still believed for some seconds: preStop or the drain delay bridges them."""
    for pod, container, settings in running(rendered):
        assert settings.grpc.drain_delay + _pre_stop(container) >= timedelta(seconds=2), pod.name


def test_probes_ask_what_is_there(rendered: Rendered) -> None:
    """Paths that the HTTP port answers, ports that the container has; liveness asks the process alone."""
    for pod, container in _containers(rendered):
        if not runs_service(container):
            continue
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in http_paths(), f"{pod.name}: {probe}"
            assert asked["port"] in {"http", ports["http"]}, f"{pod.name}: {probe}"
        assert container["livenessProbe"]["httpGet"]["path"] == "/livez", f"{pod.name} restarts when Postgres is away"
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_ports_are_those_that_the_process_listens_on(rendered: Rendered) -> None:
    """By name, as the settings have them."""
    for pod, container in _containers(rendered):
        if runs_service(container):
            found = environment(container, rendered)
            ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
            assert (ports["grpc"], ports["http"]) == (found["CARILLON_GRPC_PORT"], found["CARILLON_HTTP_PORT"]), (
                pod.name
            )


def test_our_pods_run_our_one_image(rendered: Rendered) -> None:
    """With a tag or a digest, and never `latest`."""
    images = {container["image"] for _, container in _containers(rendered) if service_of(container)}
    assert len(images) == 1
    (image,) = images
    assert "@sha256:" in image or ":" in image.rpartition("/")[2], image
    assert not image.endswith(":latest")


def test_every_service_runs(rendered: Rendered) -> None:
    """One Deployment each."""
    running = [service_of(container) for pod, container in _containers(rendered) if runs_service(container)]
    assert sorted(map(str, running)) == sorted(SERVICES)


def test_the_scheduler_hands_over_before_it_goes(rendered: Rendered) -> None:
    """A new replica is there before an old one is told to go, and preStop gives clients time."""
    (scheduler,) = (pod for pod in pods(rendered.objects) if pod.component == "scheduler")
    strategy = scheduler.owner["spec"]["strategy"]
    assert strategy["type"] == "RollingUpdate"
    assert strategy["rollingUpdate"]["maxUnavailable"] == 0
    assert strategy["rollingUpdate"]["maxSurge"] not in (0, "0", "0%")
    (container,) = filter(runs_service, scheduler.containers)
    assert _pre_stop(container) > timedelta(0)


def test_the_next_replica_goes_after_clients_have_come_back_to_the_last(rendered: Rendered) -> None:
    """They may wait with it for as long as they ever wait between two attempts to connect."""
    longest_ms = dict(_options(0, {}))["grpc.max_reconnect_backoff_ms"]
    for deployment in rendered.of("Deployment"):
        assert deployment["spec"]["minReadySeconds"] * 1000 >= longest_ms, deployment["metadata"]["name"]


def test_deployments_select_their_own_pods(rendered: Rendered) -> None:
    """Each its own, and nobody else's: a ReplicaSet would otherwise adopt or delete them."""
    every = list(pods(rendered.objects))
    for deployment in rendered.of("Deployment"):
        chosen = [pod.name for pod in every if selects(deployment["spec"]["selector"], pod.labels)]
        assert chosen == [f"Deployment/{deployment['metadata']['name']}"]


def test_a_changed_setting_restarts_the_pods() -> None:
    """Variables from a ConfigMap are read at start only, so its contents are part of the template."""
    scenario = scenarios()[0]
    before, after = (
        {pod.component: pod.template for pod in pods(render(scenario, values=values).of("Deployment"))}
        for values in ({}, {"services": {"digest": {"config": {"CARILLON_DIGEST_POLL_INTERVAL": "123ms"}}}})
    )
    assert {name for name, template in before.items() if after[name] != template} == {"digest"}


def _containers(rendered: Rendered) -> list[tuple[Pod, dict[str, Any]]]:
    """Those with our image: what users add are their own."""
    every = [(pod, container) for pod in pods(rendered.objects) for container in pod.containers]
    ours = {container["image"] for _, container in every if service_of(container)}
    return [(pod, container) for pod, container in every if container["image"] in ours]


def _pre_stop(container: dict[str, Any]) -> timedelta:
    """How long the preStop hook takes: `sleep: {seconds: 5}`, or a command with `sleep 5` in it."""
    how = (container.get("lifecycle") or {}).get("preStop") or {}
    if "sleep" in how:
        return timedelta(seconds=how["sleep"]["seconds"])
    words = " ".join(how.get("exec", {}).get("command", [])).replace("(", " ").replace(")", " ").split()
    after = [words[index + 1] for index, word in enumerate(words[:-1]) if word.endswith("sleep")]
    return timedelta(seconds=float(after[0])) if after else timedelta(0)
