"""What happens to a release over time: migrations, batches, disruptions, scaling, and the test that helm runs."""

import json
import re
from typing import Any

import pytest
import yaml

from tests.chart.objects import annotation, environment, hooks_of, pods, service_of, strings, weight_of
from tests.chart.processes import metrics, metrics_in, parse_command
from tests.chart.rendering import CHART, OLDEST, SERVICES, Refused, Rendered, render, scenarios

BATCHES = [
    {"name": "flights", "schedule": "0 */4 * * *"},
    {"name": "mornings", "schedule": "30 7 * * 1-5", "timeZone": "Europe/Berlin"},
]


def test_one_job_migrates_all_four_schemas_before_anything_else(rendered: Rendered) -> None:
    """Before installing and before upgrading, with a deadline and a limit to retries; helm and Argo CD agree on it."""
    (job,) = (one for one in rendered.of("Job") if hooks_of(one))
    (pod,) = pods([job])
    assert hooks_of(job) == {"pre-install", "pre-upgrade"}
    assert sorted(filter(None, map(service_of, pod.containers))) == sorted(SERVICES)
    assert all("migrate" in container["command"] for container in pod.containers if service_of(container))
    assert 0 < job["spec"]["activeDeadlineSeconds"] <= 3600
    assert 0 < job["spec"]["backoffLimit"] <= 20
    assert pod.spec["restartPolicy"] in {"Never", "OnFailure"}


def test_the_migration_job_is_argo_safe(rendered: Rendered) -> None:
    """A stable name, replaced before it runs anew, left when it has failed, and no TTL that Argo CD would chase."""
    (job,) = (one for one in rendered.of("Job") if hooks_of(one))
    assert job["metadata"]["name"] in {"carillon-migrations", "bells-migrations"}
    assert "generateName" not in job["metadata"]
    if annotation(job, "argocd.argoproj.io/hook"):
        assert annotation(job, "argocd.argoproj.io/hook-delete-policy") == "BeforeHookCreation"
        assert annotation(job, "argocd.argoproj.io/sync-wave") == annotation(job, "helm.sh/hook-weight")


def test_hooks_go_when_they_have_succeeded_and_stay_when_they_have_failed(rendered: Rendered) -> None:
    """`helm uninstall` forgets hooks, so nobody would take them away; a failed Job is looked at, and then replaced."""
    hooks = [one for one in rendered.objects if hooks_of(one) & {"pre-install", "pre-upgrade"}]
    assert {one["kind"] for one in hooks} >= {"Job"}
    for one in hooks:
        assert annotation(one, "helm.sh/hook-delete-policy") == "before-hook-creation,hook-succeeded", one["kind"]


def test_what_a_hook_needs_is_there_before_it(rendered: Rendered) -> None:
    """Whatever of ours its pods name is a hook of the same moments with a lower weight; the rest is applied later."""
    for hook in rendered.of("Job"):
        if not hooks_of(hook) & {"pre-install", "pre-upgrade"}:
            continue
        (pod,) = pods([hook])
        for kind, name in _needed(pod.spec):
            needed = rendered.named(kind, name)
            if needed is not None:
                assert hooks_of(hook) <= hooks_of(needed), f"{kind}/{name} is not there yet"
                assert weight_of(needed) < weight_of(hook), f"{kind}/{name} comes too late"


@pytest.mark.parametrize("scenario", scenarios())
def test_a_hook_finds_its_service_account(scenario: str) -> None:
    """With an account of its own, the account is a hook that comes first."""
    values = {"migrations": {"serviceAccount": {"create": True}}}
    rendered = render(scenario, values=values)
    (job,) = (one for one in rendered.of("Job") if hooks_of(one))
    account = rendered.named("ServiceAccount", job["spec"]["template"]["spec"]["serviceAccountName"])
    assert account is not None
    assert hooks_of(account) == hooks_of(job)
    assert weight_of(account) < weight_of(job)


def test_pods_use_service_accounts_that_exist(rendered: Rendered) -> None:
    """One of ours, or `default`, or one that the scenario names as existing."""
    given = set(strings(yaml.safe_load((CHART / "ci" / f"{rendered.scenario}-values.yaml").read_text())))
    ours = {one["metadata"]["name"] for one in rendered.of("ServiceAccount")}
    for pod in pods(rendered.objects):
        assert pod.spec["serviceAccountName"] in ours | given | {"default"}, pod.name


@pytest.fixture
def batched(rendered: Rendered) -> Rendered:
    """The scenario with two batches, one of them in a zone where the version knows zones."""
    batches = BATCHES if rendered.version != OLDEST else BATCHES[:1]
    return render(rendered.scenario, version=rendered.version, values={"batches": batches})


def test_each_batch_is_one_cron_job(batched: Rendered) -> None:
    """At the times it says, in the zone it says."""
    found = {one["spec"]["schedule"]: one["spec"].get("timeZone", "UTC") for one in batched.of("CronJob")}
    expected = {"0 */4 * * *": "UTC", "30 7 * * 1-5": "Europe/Berlin"}
    assert found == {schedule: zone for schedule, zone in expected.items() if schedule in found}
    assert len(found) == (2 if batched.version != OLDEST else 1)


def test_zones_are_refused_where_cron_jobs_do_not_know_them() -> None:
    """1.24 would drop the field and run the batch at another hour."""
    with pytest.raises(Refused, match=r"mornings has timeZone Europe/Berlin"):
        render(_plain(), version=OLDEST, values={"batches": BATCHES})


def test_cron_jobs_are_bounded(batched: Rendered) -> None:
    """How late a run may start (else 100 missed ones stop it for good), how long it takes, how often it tries."""
    for one in batched.of("CronJob"):
        spec, job = one["spec"], one["spec"]["jobTemplate"]["spec"]
        assert spec["startingDeadlineSeconds"] >= 60
        assert spec["concurrencyPolicy"] in {"Forbid", "Allow", "Replace"}
        assert 0 <= spec["successfulJobsHistoryLimit"] <= 10
        assert 0 < spec["failedJobsHistoryLimit"] <= 10
        assert 0 < job["activeDeadlineSeconds"] <= 24 * 3600
        assert 0 <= job["backoffLimit"] <= 20
        assert job["template"]["spec"]["restartPolicy"] in {"Never", "OnFailure"}


def test_a_batch_suspended_by_hand_stays_suspended_through_an_upgrade() -> None:
    """An incident is not over because somebody upgrades; Helm 4 would refuse to, over whose the field is."""
    batch = {"name": "flights", "schedule": "0 */4 * * *"}
    (runs,) = render(_plain(), values={"batches": [batch]}).of("CronJob")
    (rests,) = render(_plain(), values={"batches": [{**batch, "suspend": True}]}).of("CronJob")
    assert "suspend" not in runs["spec"]
    assert rests["spec"]["suspend"] is True


def test_cron_jobs_run_a_command_that_exists(batched: Rendered) -> None:
    """`carillon batch trigger`, as the command itself reads it: the window comes from the CronJob's own schedule."""
    for one in batched.of("CronJob"):
        (container,) = one["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        words: list[str] = [*container["command"], *container.get("args", [])]
        assert words[0] == "carillon"
        parsed = parse_command(words[1:])
        assert parsed["command"] == "carillon batch trigger"
        assert parsed["is_from_schedule"] is True
        assert parsed["schedule"] == one["spec"]["schedule"]
        assert parsed["zone"] == one["spec"].get("timeZone", "UTC")
        assert parsed["name"] in {batch["name"] for batch in BATCHES}
        assert environment(container, batched)["CARILLON_TOKEN_FILE"]


def test_a_budget_never_blocks_a_drain(rendered: Rendered) -> None:
    """With the replicas that there are, or are at least where something scales, one pod may always be evicted."""
    for budget in rendered.of("PodDisruptionBudget"):
        (owner,) = (
            one
            for one in rendered.of("Deployment")
            if budget["spec"]["selector"]["matchLabels"] == one["spec"]["selector"]["matchLabels"]
        )
        replicas = owner["spec"].get("replicas") or _least(rendered, owner["metadata"]["name"])
        assert _may_be_evicted(budget["spec"], replicas) >= 1, f"{budget['metadata']['name']} with {replicas}"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_usual_budget_lets_few_replicas_go(replicas: int) -> None:
    """One replica may be evicted as well: better a pause of seconds than a node that cannot be drained."""
    rendered = render(_plain(), values={"defaults": {"replicas": replicas, "pdb": {"enabled": True}}})
    budgets = list(rendered.of("PodDisruptionBudget"))
    assert len(budgets) == len(SERVICES)
    assert [_may_be_evicted(one["spec"], replicas) for one in budgets] == [1, 1, 1, 1]


def test_nothing_scales_by_itself_unless_asked() -> None:
    """Autoscaling is off in values.yaml, for each of the four."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    scaling = [values["defaults"]["autoscaling"]]
    scaling += [one["autoscaling"] for one in values["services"].values() if one and "autoscaling" in one]
    for one in scaling:
        for kind in ("hpa", "keda"):
            assert one.get(kind, {}).get("enabled", False) is False


def test_keda_asks_for_metrics_that_exist() -> None:
    """Every service scales, on something the code measures; without an answer it keeps what runs."""
    rendered = render(_plain(), values=_scaling("keda"))
    scalers = list(rendered.of("ScaledObject"))
    assert len(scalers) == len(SERVICES)
    for one in scalers:
        spec = one["spec"]
        assert rendered.named("Deployment", spec["scaleTargetRef"]["name"]), spec
        assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
        assert spec["fallback"]["replicas"] >= 1
        for trigger in spec["triggers"]:
            measured = metrics_in(trigger["metadata"]["query"])
            assert measured, trigger
            assert measured <= metrics(), measured - metrics()
            assert "$" not in trigger["metadata"]["query"], "a placeholder that nobody filled"
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            assert float(trigger["metadata"]["threshold"]) > 0, "KEDA reads a number, and no quantity such as 500m"


def test_both_ways_of_scaling_go_by_the_same_metrics() -> None:
    """What an adapter has to offer for the HPA is called after what KEDA asks Prometheus for."""
    by_keda, by_hpa = (render(_plain(), values=_scaling(kind)) for kind in ("keda", "hpa"))
    asked = {
        one["metadata"]["name"]: {trigger["name"].replace("-", "_") for trigger in one["spec"]["triggers"]}
        for one in by_keda.of("ScaledObject")
    }
    offered = {
        one["metadata"]["name"]: {metric["external"]["metric"]["name"] for metric in one["spec"]["metrics"]}
        for one in by_hpa.of("HorizontalPodAutoscaler")
    }
    assert asked == offered
    for one in by_hpa.of("HorizontalPodAutoscaler"):
        assert by_hpa.named("Deployment", one["spec"]["scaleTargetRef"]["name"])
        assert 1 <= one["spec"]["minReplicas"] < one["spec"]["maxReplicas"]


def test_an_hpa_asks_for_the_series_that_keda_asks_for() -> None:
    """Its selector has the labels that the query names, beside the release's: with others it would match nothing."""
    ours = {"cluster": "a"}
    rendered = render(_plain(), values={"defaults": {"autoscaling": {"hpa": {"enabled": True, "selector": ours}}}})
    for service, metrics_of in _scaled_by().items():
        scaler = rendered.named("HorizontalPodAutoscaler", f"carillon-{service}")
        assert scaler is not None
        found = {
            one["external"]["metric"]["name"]: one["external"]["metric"]["selector"]["matchLabels"]
            for one in scaler["spec"]["metrics"]
        }
        assert found == {name: {**ours, **_labels(how["query"])} for name, how in metrics_of.items()}


def test_the_readmes_adapter_answers_what_hpas_ask() -> None:
    """A rule for each metric, with the query that values.yaml has for KEDA; labels come from the selector."""
    (block,) = re.findall(r"```yaml\n(  rules:.*?)```", (CHART / "README.in.md").read_text(), re.DOTALL)
    answered = {
        rule.get("name", {}).get("as", rule["seriesQuery"]): " ".join(rule["metricsQuery"].split())
        for rule in yaml.safe_load(block)["rules"]["external"]
    }
    assert answered == {
        name: re.sub(r'\w+="[^"]*",\$selector', "$selector", how["query"]).replace("$selector", "<<.LabelMatchers>>")
        for metrics_of in _scaled_by().values()
        for name, how in metrics_of.items()
    }


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_whoever_scales_is_alone_with_it(kind: str) -> None:
    """A Deployment that is scaled has no `replicas`: an upgrade would set them back."""
    rendered = render(_plain(), values=_scaling(kind))
    assert [one["metadata"]["name"] for one in rendered.of("Deployment") if "replicas" in one["spec"]] == []


def test_alerts_reach_prometheus_as_they_are_written(rendered: Rendered) -> None:
    """The PrometheusRule holds the groups of files/alerts.yaml, `{{ … }}` included; runbooks may be elsewhere."""
    values = yaml.safe_load((CHART / "ci" / f"{rendered.scenario}-values.yaml").read_text())
    runbooks = values.get("monitoring", {}).get("prometheusRule", {}).get("runbooks") or "docs/runbooks/"
    text = (CHART / "files" / "alerts.yaml").read_text()
    written = yaml.safe_load(text.replace("runbook_url: docs/runbooks/", f"runbook_url: {runbooks}"))
    for one in rendered.of("PrometheusRule"):
        assert one["spec"] == written


def test_alerts_can_be_left_out_and_written_anew() -> None:
    """All rules of that name are gone; groups of one's own come after those that are left."""
    own = {"name": "ours", "rules": [{"alert": "Late", "expr": "up < 1", "annotations": {"summary": "{{ $value }}"}}]}
    left_out = ["CarillonTimersLate", "CarillonTimersStuck"]
    kept = [
        {**group, "rules": [one for one in group["rules"] if one.get("alert") not in left_out]}
        for group in _rule_groups()
    ]
    assert _rule_groups(disabled=left_out, extraGroups=[own]) == [*kept, own]


def test_a_group_without_rules_is_left_out() -> None:
    """Nothing is said about nothing."""
    groups = _rule_groups()
    alerts = {group["name"]: [one.get("alert") for one in group["rules"]] for group in groups}
    left = _rule_groups(disabled=alerts["carillon-timers"])
    assert left == [group for group in groups if group["name"] != "carillon-timers"]


def test_dashboards_reach_grafana_as_they_are_written() -> None:
    """Each file in files/dashboards is in a ConfigMap that Grafana's sidecar finds, byte for byte."""
    rendered = render(_plain(), values={"monitoring": {"dashboards": {"enabled": True}}})
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "files" / "dashboards").glob("*.json")}
    found = {
        name: json.loads(text)
        for one in rendered.of("ConfigMap")
        if "grafana_dashboard" in one["metadata"]["labels"]
        for name, text in one["data"].items()
    }
    assert found == files
    assert files


def test_helm_test_schedules_a_timer() -> None:
    """A pod of its own that helm runs when asked and replaces when asked again; it can call the services."""
    with_test = [one for scenario in scenarios() for one in render(scenario).of("Pod") if "test" in hooks_of(one)]
    assert with_test
    for one in with_test:
        assert one["spec"]["restartPolicy"] == "Never"
        assert annotation(one, "helm.sh/hook-delete-policy") == "before-hook-creation"
        (container,) = one["spec"]["containers"]
        script = "\n".join(strings(container.get("args") or container["command"]))
        compile(script[script.index('"""') :], "helm-test", "exec")
        assert "schedule" in script


def _needed(spec: dict[str, Any]) -> set[tuple[str, str]]:
    """What a pod names: its account, and the ConfigMaps of its variables and volumes."""
    needed = {("ServiceAccount", spec["serviceAccountName"])}
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        for one in container.get("envFrom") or []:
            if "configMapRef" in one:
                needed.add(("ConfigMap", one["configMapRef"]["name"]))
        for one in container.get("env") or []:
            if reference := one.get("valueFrom", {}).get("configMapKeyRef"):
                needed.add(("ConfigMap", reference["name"]))
    return needed | {("ConfigMap", one["configMap"]["name"]) for one in spec.get("volumes") or [] if "configMap" in one}


def _may_be_evicted(budget: dict[str, Any], replicas: int) -> int:
    """How many pods may go at once, as the disruption controller counts: percentages are rounded up."""
    if "maxUnavailable" in budget:
        return min(_share(budget["maxUnavailable"], replicas), replicas)
    return replicas - _share(budget["minAvailable"], replicas)


def _least(rendered: Rendered, name: str) -> int:
    """The replicas that whoever scales a Deployment leaves at least."""
    for one in rendered.of("HorizontalPodAutoscaler", "ScaledObject"):
        if one["spec"]["scaleTargetRef"]["name"] == name:
            return int(one["spec"].get("minReplicas") or one["spec"]["minReplicaCount"])
    raise AssertionError(f"nobody says how many replicas {name} has")


def _share(amount: int | str, replicas: int) -> int:
    if isinstance(amount, str) and amount.endswith("%"):
        return -(-int(amount.removesuffix("%")) * replicas // 100)
    return int(amount)


def _scaling(kind: str) -> dict[str, Any]:
    how: dict[str, Any] = {"enabled": True}
    if kind == "keda":
        how["prometheus"] = {"serverAddress": "http://prometheus.monitoring:9090"}
    return {"defaults": {"autoscaling": {kind: how}}}


def _rule_groups(**values: Any) -> list[dict[str, Any]]:
    """The groups of the PrometheusRule."""
    rendered = render(_plain(), values={"monitoring": {"prometheusRule": {"enabled": True, **values}}})
    (rule,) = rendered.of("PrometheusRule")
    groups: list[dict[str, Any]] = rule["spec"]["groups"]
    return groups


def _scaled_by() -> dict[str, dict[str, Any]]:
    """What values.yaml scales each service by."""
    services = yaml.safe_load((CHART / "values.yaml").read_text())["services"]
    return {name: one["autoscaling"]["metrics"] for name, one in services.items()}


def _labels(query: str) -> dict[str, str]:
    """Those by which PromQL selects, beside $selector."""
    return dict(re.findall(r'(\w+)="([^"]*)"', query))


def _plain() -> str:
    """A scenario that neither scales nor is without anything: the one named minimal, or the first."""
    return "minimal" if "minimal" in scenarios() else scenarios()[0]
