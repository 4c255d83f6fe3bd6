"""Validates objects against the schemas of a Kubernetes version, strictly: an unknown field is an error.

The schemas of 1.25 and newer are kubernetes-validate's, those of 1.24 and of custom resources lie in schemas/. They are
asked through jsonschema-rs, because kubernetes-validate itself reads its megabyte anew for each object.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from jsonschema_rs import Draft202012Validator, Registry
from kubernetes_validate.utils import schema_contents

from tests.chart.rendering import ROOT, Object

SCHEMAS = ROOT / "tests" / "chart" / "schemas"

# What kubernetes-validate leaves to the caller: kustomize's own files and lists are not validated here.
Names = dict[tuple[str, str], str]


def problems(one: Object, version: str) -> Iterator[str]:
    """What is wrong with an object on a cluster of `version` (`1.30.0`), as `Kind/name: path: message`."""
    label = f"{one['kind']}/{one['metadata']['name']}"
    validator = _validator(one["apiVersion"], one["kind"], version)
    if validator is None:
        yield f"{label}: Kubernetes {version} has no {one['apiVersion']} {one['kind']}"
        return
    for error in validator.iter_errors(one):
        yield f"{label}: {'.'.join(map(str, error.instance_path))}: {error.message}"


@cache
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator | None:
    custom = SCHEMAS / f"{api_version.replace('/', '_')}_{kind}.json"
    if custom.exists():
        return Draft202012Validator(json.loads(custom.read_text()) | {"$schema": _DRAFT})
    registry, identity, names = _kubernetes(version)
    name = names.get((api_version, kind))
    if name is None:
        return None
    return Draft202012Validator({"$ref": f"{identity}#/$defs/{name}"}, registry=registry)


_DRAFT = "https://json-schema.org/draft/2020-12/schema"


@cache
def _kubernetes(version: str) -> tuple[Registry, str, Names]:
    definitions = _definitions(version)
    names: Names = {}
    for full, definition in definitions["$defs"].items():
        for one in definition.get("x-kubernetes-group-version-kind", []):
            names[f"{one['group']}/{one['version']}".removeprefix("/"), one["kind"]] = full
    return Registry([(definitions["$id"], definitions)]), definitions["$id"], names


def _definitions(version: str) -> dict[str, Any]:
    ours = SCHEMAS / f"kubernetes-{version}.json"
    if ours.exists():
        contents: dict[str, Any] = json.loads(ours.read_text())
    else:
        contents = schema_contents(f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version)
    return contents
