"""Who reaches whom: Services and routes lead to the pods they mean, NetworkPolicies allow that and no more."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.objects import Pod, environment, pods, runs_service, selects
from tests.chart.rendering import ROOT, SERVICES, Rendered, render, scenarios


def test_every_service_selects_one_deployments_pods(rendered: Rendered) -> None:
    """Exactly one, and no migration, batch or test: calls would go to who does not answer."""
    for service in _services(rendered):
        chosen = [pod.owner["kind"] for pod in pods(rendered.objects) if _leads_to(service, pod)]
        assert chosen == ["Deployment"], service["metadata"]["name"]


def test_every_services_ports_exist_in_its_pods(rendered: Rendered) -> None:
    """By name or number."""
    for service in _services(rendered):
        (pod,) = (pod for pod in pods(rendered.objects) if _leads_to(service, pod))
        for port in service["spec"]["ports"]:
            assert port.get("targetPort", port["port"]) in _ports(pod), service["metadata"]["name"]


def test_each_of_the_four_has_a_headless_service(rendered: Rendered) -> None:
    """A gRPC client that balances sees the pods behind it."""
    headless = [service for service in _services(rendered) if service["spec"].get("clusterIP") == "None"]
    led_to = [pod.component for one in headless for pod in pods(rendered.objects) if _leads_to(one, pod)]
    assert sorted(led_to) == sorted(SERVICES)


def test_clients_know_the_services_by_their_names(rendered: Rendered) -> None:
    """Each CARILLON_<SERVICE>_ENDPOINT is a Service of this release, with a port it has, leading to that service."""
    found = 0
    for pod in pods(rendered.objects):
        for container in pod.containers:
            for name, value in environment(container, rendered).items():
                if named := re.fullmatch(r"CARILLON_([A-Z]+)_ENDPOINT", name):
                    assert value is not None
                    _assert_leads(rendered, value, named[1].lower())
                    found += 1
    assert found or not list(rendered.of("CronJob"))


def test_the_unsubscribe_page_is_reachable_where_it_is_on(rendered: Rendered) -> None:
    """Its setting, its container port and its Service go together, and only the dispatcher has them."""
    for pod in pods(rendered.objects):
        for container in pod.containers:
            if runs_service(container):
                base_url = environment(container, rendered).get("CARILLON_DISPATCHER_UNSUBSCRIBE_BASE_URL")
                assert bool(base_url) == ("unsubscribe" in _ports(pod)), pod.name
                if base_url:
                    served = [
                        one for one in _services(rendered) if _leads_to(one, pod) and "unsubscribe" in _names(one)
                    ]
                    assert served


def test_routes_and_ingresses_lead_to_services_that_exist(rendered: Rendered) -> None:
    """Every backend is a Service of this release with that port; every gRPC service is one of the contracts."""
    contracts = {
        f"carillon.{path.parent.parent.name}.v1.{name}"
        for path in (ROOT / "proto" / "carillon").rglob("*.proto")
        for name in re.findall(r"^service (\w+)", path.read_text(), re.MULTILINE)
    }
    for one in rendered.of("GRPCRoute", "HTTPRoute"):
        for rule in one["spec"]["rules"]:
            for match in rule.get("matches") or []:
                if "method" in match:
                    assert match["method"]["service"] in contracts
            for backend in rule["backendRefs"]:
                service = rendered.named("Service", backend["name"])
                assert service is not None, backend
                assert backend["port"] in [port["port"] for port in service["spec"]["ports"]]
    for one in rendered.of("Ingress"):
        for path in [path for rule in one["spec"]["rules"] for path in rule["http"]["paths"]]:
            target = path["backend"]["service"]
            service = rendered.named("Service", target["name"])
            assert service is not None, target
            assert target["port"].get("name") in _names(service) or target["port"].get("number") in [
                port["port"] for port in service["spec"]["ports"]
            ]
            if path["path"].startswith("/carillon."):
                assert path["path"].removeprefix("/") in contracts


def test_monitors_find_every_service_once(rendered: Rendered) -> None:
    """Each ServiceMonitor and PodMonitor sees the port of each of the four exactly once: no series comes twice."""
    for monitor in rendered.of("ServiceMonitor"):
        seen = [
            pod.component
            for service in _services(rendered)
            if selects(monitor["spec"]["selector"], service["metadata"]["labels"])
            for endpoint in monitor["spec"]["endpoints"]
            if endpoint["port"] in _names(service)
            for pod in pods(rendered.objects)
            if _leads_to(service, pod)
        ]
        assert sorted(seen) == sorted(SERVICES)
        assert {endpoint["path"] for endpoint in monitor["spec"]["endpoints"]} == {"/metrics"}
    for monitor in rendered.of("PodMonitor"):
        seen = [
            pod.component
            for pod in pods(rendered.objects)
            if selects(monitor["spec"]["selector"], pod.labels)
            for endpoint in monitor["spec"]["podMetricsEndpoints"]
            if endpoint["port"] in _ports(pod)
        ]
        assert sorted(seen) == sorted(SERVICES)


@pytest.fixture
def guarded(rendered: Rendered) -> Rendered:
    """The same with NetworkPolicies, and none of the scenario's own rules."""
    return render(rendered.scenario, version=rendered.version, values=_guards())


def test_every_pod_is_guarded_both_ways(guarded: Rendered) -> None:
    """Hooks, tests and CronJobs included: a policy for each says who comes in and where it goes."""
    for pod in pods(guarded.objects):
        kinds = {kind for policy in _policies(guarded, pod) for kind in policy["spec"]["policyTypes"]}
        assert kinds == {"Ingress", "Egress"}, pod.name


def test_policies_let_in_on_ports_that_exist(guarded: Rendered) -> None:
    """Named ports are container ports of the pods selected; nobody but the four is let in to."""
    for pod in pods(guarded.objects):
        opened = {port["port"] for rule in _rules(guarded, pod, "ingress") for port in rule["ports"]}
        assert opened <= _ports(pod), pod.name
        assert bool(opened) == (pod.component in SERVICES), pod.name


def test_nobody_is_let_in_from_anywhere(guarded: Rendered) -> None:
    """Each way in says from whom."""
    for pod in pods(guarded.objects):
        for rule in _rules(guarded, pod, "ingress"):
            assert rule.get("from"), f"{pod.name}: {rule}"


def test_every_pod_can_resolve_names(guarded: Rendered) -> None:
    """DNS by UDP and, for long answers, TCP."""
    for pod in pods(guarded.objects):
        assert {("UDP", 53), ("TCP", 53)} <= _egress_ports(guarded, pod), pod.name


def test_dns_is_reached_where_clusters_have_it() -> None:
    """On a node's own address with NodeLocal DNSCache, and behind OpenShift's Service, where pods listen on 5353."""
    guarded = render("minimal", values=_guards())
    for pod in pods(guarded.objects):
        rules = [rule for rule in _rules(guarded, pod, "egress") if {"port": 53, "protocol": "UDP"} in rule["ports"]]
        assert any({"ipBlock": {"cidr": "169.254.20.10/32"}} in rule["to"] for rule in rules), pod.name
        assert {("UDP", 5353), ("TCP", 5353)} <= _egress_ports(guarded, pod), pod.name


def test_postgres_is_for_services_and_migrations_only(guarded: Rendered) -> None:
    """NATS is for the services only, SMTP and webhooks for the dispatcher."""
    for pod in pods(guarded.objects):
        ports = _egress_ports(guarded, pod)
        is_service = pod.component in SERVICES
        assert (("TCP", 5432) in ports) == (is_service or pod.component == "migrations"), pod.name
        assert (("TCP", 4222) in ports) == is_service, pod.name
        assert (("TCP", 587) in ports) == (pod.component == "dispatcher"), pod.name


def test_nobody_goes_everywhere(guarded: Rendered) -> None:
    """Each way out names its ports."""
    for pod in pods(guarded.objects):
        for rule in _rules(guarded, pod, "egress"):
            assert rule.get("ports"), f"{pod.name}: {rule}"


def test_batches_and_tests_reach_the_services_they_call(guarded: Rendered) -> None:
    """Out of the client and into the service: both sides allow the port that gRPC is on."""
    clients = [pod for pod in pods(guarded.objects) if pod.component in {"batch", "test"}]
    servers = [pod for pod in pods(guarded.objects) if pod.component in SERVICES]
    for client in clients:
        for server in servers:
            assert _may_call(guarded, client, server), f"{client.name} → {server.name}"


@pytest.mark.parametrize("scenario", scenarios())
def test_services_do_not_reach_each_other(scenario: str) -> None:
    """They meet in Postgres and NATS, so a policy that let one call another would allow what is not needed."""
    guarded = render(scenario, values=_guards(grpcFrom=[]))
    servers = [pod for pod in pods(guarded.objects) if pod.component in SERVICES]
    for one in servers:
        for other in servers:
            assert one is other or not _may_call(guarded, one, other), f"{one.name} → {other.name}"


def _guards(**policy: object) -> dict[str, Any]:
    ours: dict[str, Any] = {"networkPolicy": {"extraIngress": [], "extraEgress": []}}
    return {
        "networkPolicy": {"enabled": True, **policy},
        "defaults": ours,
        "services": dict.fromkeys(SERVICES, ours),
    }


def _may_call(guarded: Rendered, client: Pod, server: Pod) -> bool:
    """Whether both sides' policies allow a call to the gRPC port, by pod selectors."""

    def allows(rules: Iterator[dict[str, Any]], side: str, labels: dict[str, str]) -> bool:
        return any(
            any(port["port"] == "grpc" for port in rule.get("ports") or [])
            and any(
                "podSelector" in peer and "namespaceSelector" not in peer and selects(peer["podSelector"], labels)
                for peer in rule.get(side) or []
            )
            for rule in rules
        )

    return allows(_rules(guarded, client, "egress"), "to", server.labels) and allows(
        _rules(guarded, server, "ingress"), "from", client.labels
    )


def _assert_leads(rendered: Rendered, endpoint: str, component: str) -> None:
    host, _, port = endpoint.rpartition(":")
    name, *domain = host.removeprefix("dns:///").split(".")
    service = rendered.named("Service", name)
    assert service is not None, endpoint
    assert domain[:2] in ([], ["shop"], ["shop", "svc"]), endpoint
    assert int(port) in [one["port"] for one in service["spec"]["ports"] if one["name"] == "grpc"], endpoint
    assert [pod.component for pod in pods(rendered.objects) if _leads_to(service, pod)] == [component]


def _services(rendered: Rendered) -> list[dict[str, Any]]:
    return list(rendered.of("Service"))


def _names(service: dict[str, Any]) -> set[str]:
    return {port["name"] for port in service["spec"]["ports"]}


def _leads_to(service: dict[str, Any], pod: Pod) -> bool:
    selector = service["spec"]["selector"]
    return bool(selector) and selects({"matchLabels": selector}, pod.labels)


def _ports(pod: Pod) -> set[str | int]:
    every = [port for container in pod.containers for port in container.get("ports") or []]
    return {port["containerPort"] for port in every} | {port["name"] for port in every if "name" in port}


def _policies(rendered: Rendered, pod: Pod) -> list[dict[str, Any]]:
    return [one for one in rendered.of("NetworkPolicy") if selects(one["spec"]["podSelector"], pod.labels)]


def _rules(rendered: Rendered, pod: Pod, direction: str) -> Iterator[dict[str, Any]]:
    for policy in _policies(rendered, pod):
        yield from policy["spec"].get(direction) or []


def _egress_ports(rendered: Rendered, pod: Pod) -> set[tuple[str, str | int]]:
    ports = [port for rule in _rules(rendered, pod, "egress") for port in rule.get("ports") or []]
    return {(port.get("protocol", "TCP"), port["port"]) for port in ports if "port" in port}
