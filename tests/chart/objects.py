"""What the tests ask of rendered objects: their pods, their containers, and who selects whom."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chart.rendering import Object, Rendered

WORKLOADS = {
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Deployment": ("spec", "template"),
    "Job": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
}
HOOK = "helm.sh/hook"
WEIGHT = "helm.sh/hook-weight"


@dataclass(frozen=True)
class Pod:
    """A pod, or the template of one, with the object that it stands in."""

    owner: Object = field(repr=False)
    template: Object = field(repr=False)
    name: str

    @property
    def spec(self) -> dict[str, Any]:
        """Its PodSpec."""
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """What selectors see."""
        return self.template.get("metadata", {}).get("labels") or {}

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All of them, those that run first in front."""
        return [*(self.spec.get("initContainers") or []), *self.spec["containers"]]

    @property
    def component(self) -> str:
        """Its label app.kubernetes.io/component."""
        return self.labels.get("app.kubernetes.io/component", "")


def pods(objects: Iterable[Object]) -> Iterator[Pod]:
    """Every pod that these objects are or make, hooks and tests included."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] == "Pod":
            yield Pod(one, one, name)
        elif path := WORKLOADS.get(one["kind"]):
            template = one
            for step in path:
                template = template[step]
            yield Pod(one, template, name)


def service_of(container: Mapping[str, Any]) -> str | None:
    """Which of our services it runs or migrates; None for another program."""
    words = [*(container.get("command") or []), *(container.get("args") or [])]
    return next((word.removeprefix("services.") for word in words if str(word).startswith("services.")), None)


def runs_service(container: Mapping[str, Any]) -> bool:
    """Whether it serves, rather than migrates."""
    words = [*(container.get("command") or []), *(container.get("args") or [])]
    return service_of(container) is not None and "migrate" not in words


def environment(container: Mapping[str, Any], rendered: Rendered) -> dict[str, str | None]:
    """Variables by name: those of ConfigMaps and literals with their values, those from elsewhere with None."""
    found: dict[str, str | None] = {}
    for source in container.get("envFrom") or []:
        if reference := source.get("configMapRef"):
            config = rendered.named("ConfigMap", reference["name"])
            assert config is not None or reference.get("optional"), f"no ConfigMap {reference['name']}"
            prefix = source.get("prefix", "")
            found |= {f"{prefix}{name}": value for name, value in ((config or {}).get("data") or {}).items()}
    return found | {one["name"]: one.get("value") for one in container.get("env") or []}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector chooses something with these labels; an empty one chooses everything."""
    if any(labels.get(name) != value for name, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_meets(one, labels) for one in selector.get("matchExpressions") or [])


def _meets(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value = labels.get(expression["key"])
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    raise AssertionError(f"no such operator: {expression}")


def annotation(one: Object, name: str) -> str | None:
    """An annotation's value."""
    return (one["metadata"].get("annotations") or {}).get(name)


def hooks_of(one: Object) -> set[str]:
    """When helm runs it; empty for what is simply applied."""
    return {when.strip() for when in (annotation(one, HOOK) or "").split(",") if when.strip()}


def weight_of(one: Object) -> int:
    """Lower ones are there first."""
    return int(annotation(one, WEIGHT) or 0)


def strings(node: object) -> Iterator[str]:
    """Every string in a tree, keys left out."""
    if isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node
