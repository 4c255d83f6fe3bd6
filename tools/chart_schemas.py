"""Writes tests/chart/schemas/: what `make chart-test` validates with and no installed package holds.

    python tools/chart_schemas.py

- Custom resources: npm's @kubernetes-models/* declare them as TypeScript, generated from the operators' own sources;
  ts-json-schema-generator makes JSON Schemas of that, in which unknown fields are refused. Types, required fields and
  choices survive the way; patterns and bounds do not.
- Kubernetes 1.24: kubernetes-validate carries thirteen versions, and 1.24 is no longer among them. The kinds that the
  chart may use are taken out of the last release that had it.

Needs node and npm. It is run by hand, when a version below is raised or a kind is added, and the result is committed.
Status is left out: nobody renders it.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "tests" / "chart" / "schemas"
GENERATOR = "ts-json-schema-generator@2.9.0"
PACKAGES = {
    "cert-manager": "6.0.0",
    "gateway-api": "2.0.0",
    "keda": "2.0.0",
    "prometheus-operator": "6.0.0",
}
CUSTOM = {
    "Certificate": "cert-manager/cert-manager.io/v1",
    "GRPCRoute": "gateway-api/gateway.networking.k8s.io/v1",
    "HTTPRoute": "gateway-api/gateway.networking.k8s.io/v1",
    "PodMonitor": "prometheus-operator/monitoring.coreos.com/v1",
    "PrometheusRule": "prometheus-operator/monitoring.coreos.com/v1",
    "ScaledObject": "keda/keda.sh/v1alpha1",
    "ServiceMonitor": "prometheus-operator/monitoring.coreos.com/v1",
    "TriggerAuthentication": "keda/keda.sh/v1alpha1",
}
OLD_RELEASE = "1.30.0"
OLD_VERSION = "1.24.0"
OLD_KINDS = {
    "v1": ("ConfigMap", "Namespace", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "batch/v1": ("CronJob", "Job"),
    "networking.k8s.io/v1": ("Ingress", "NetworkPolicy"),
    "policy/v1": ("PodDisruptionBudget",),
    "rbac.authorization.k8s.io/v1": ("Role", "RoleBinding"),
}
README = """# Schemas

Written by `tools/chart_schemas.py`; do not edit. The test suite validates rendered manifests with them.

| file | made from | licence |
|---|---|---|
"""


def main() -> int:
    TARGET.mkdir(parents=True, exist_ok=True)
    for old in TARGET.glob("*.json"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        custom_resources(Path(scratch))
        old_kubernetes(Path(scratch))
    (TARGET / "README.md").write_text(README + "".join(_credits()))
    return 0


def custom_resources(scratch: Path) -> None:
    """One file each, named group_version_Kind.json."""
    packages = [f"@kubernetes-models/{name}@{version}" for name, version in PACKAGES.items()]
    (scratch / "package.json").write_text("{}")
    (scratch / "tsconfig.json").write_text('{"compilerOptions": {"moduleResolution": "bundler", "module": "esnext"}}')
    _run(["npm", "install", "--silent", "--ignore-scripts", GENERATOR, *packages], scratch)
    for kind, place in CUSTOM.items():
        source = f"node_modules/@kubernetes-models/{place}/{kind}.d.ts"
        options = ["--tsconfig", "tsconfig.json", "--no-type-check", "--jsDoc", "none", "--no-top-ref"]
        command = ["npx", "ts-json-schema-generator", *options, "--path", source, "--type", f"I{kind}"]
        schema = json.loads(_run(command, scratch))
        schema["properties"].pop("status", None)
        _, group, version = place.split("/")
        used = _reachable(schema["definitions"], _references(schema["properties"]))
        kept = {name: schema["definitions"][name] for name in used}
        _write(f"{group}_{version}_{kind}.json", {**schema, "definitions": kept})


def old_kubernetes(scratch: Path) -> None:
    """One file, in the form of kubernetes-validate's own: definitions that say whose they are."""
    release = f"kubernetes-validate=={OLD_RELEASE}"
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", release], scratch)
    (wheel,) = scratch.glob("kubernetes_validate-*.whl")
    name = f"kubernetes_validate/kubernetes-json-schema/v{OLD_VERSION}-local-strict/_definitions.json"
    with zipfile.ZipFile(wheel) as archive:
        whole = json.loads(archive.read(name))
    found = {f"{group} {kind}": full for full, one in whole["$defs"].items() for group, kind in _names(one)}
    kinds = {f"{group} {kind}" for group, of_it in OLD_KINDS.items() for kind in of_it}
    if missing := kinds - set(found):
        raise SystemExit(f"Kubernetes {OLD_VERSION} has no {', '.join(sorted(missing))}.")
    used = _reachable(whole["$defs"], {found[one] for one in kinds})
    kept = {full: whole["$defs"][full] for full in used}
    _write(f"kubernetes-{OLD_VERSION}.json", _without_prose({**whole, "$defs": kept}))


def _names(definition: dict[str, Any]) -> list[tuple[str, str]]:
    """What a definition is called in manifests: apiVersion and kind."""
    names = definition.get("x-kubernetes-group-version-kind", [])
    return [(f"{one['group']}/{one['version']}".removeprefix("/"), one["kind"]) for one in names]


def _without_prose(node: Any) -> Any:
    """Descriptions are nine tenths of the size."""
    if isinstance(node, list):
        return [_without_prose(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_prose(one) for key, one in node.items() if key != "description" or not isinstance(one, str)}


def _reachable(definitions: dict[str, Any], names: set[str]) -> list[str]:
    """`names` and every definition that one of them leads to, sorted."""
    used: set[str] = set()
    while names:
        used |= names
        names = set().union(*(_references(definitions[name]) for name in names)) - used
    return sorted(used)


def _references(node: Any) -> set[str]:
    return set(re.findall(r'"\$ref": "[^"#]*#/(?:definitions|\$defs)/([^"]+)"', json.dumps(node)))


def _write(name: str, schema: dict[str, Any]) -> None:
    (TARGET / name).write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")


def _credits() -> list[str]:
    rows = []
    for kind, place in CUSTOM.items():
        package, group, version = place.split("/")
        made_from = f"npm @kubernetes-models/{package} {PACKAGES[package]}"
        rows.append(f"| {group}_{version}_{kind}.json | {made_from} | MIT (the package), Apache-2.0 (its sources) |\n")
    rows.append(f"| kubernetes-{OLD_VERSION}.json | PyPI kubernetes-validate {OLD_RELEASE} | Apache-2.0 |\n")
    return rows


def _run(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr or done.stdout}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
