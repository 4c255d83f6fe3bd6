"""Writes deploy/helm/carillon/values.schema.json: what the chart's values may be; helm refuses everything else.

    python tools/values_schema.py            # write it
    python tools/values_schema.py --check    # exit 1 when it is not up to date

Names that do not exist are refused at every level, but where the map is Kubernetes' own (resources, affinity, …) or the
user's (labels, annotations). What may stand in `config` is in tools/values_config.py.
"""

import json
import re
import sys

from tools.values_config import (
    DURATION,
    ROOT,
    SERVICES,
    Schema,
    config_of,
    number,
    object_of,
    one_of,
    shared_config,
    text,
    texts,
)

TARGET = ROOT / "deploy" / "helm" / "carillon" / "values.schema.json"
_MAP: Schema = {"type": "object"}
_LIST: Schema = {"type": "array"}
_BOOL: Schema = {"type": "boolean"}

_PART_OF_A_NAME = r"^([a-z]([-a-z0-9]{0,61}[a-z0-9])?)?$"
_LABEL = r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$"


def schema() -> Schema:
    """The whole of it."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart carillon",
        **object_of(_top()),
        "definitions": {
            "sharedConfig": shared_config(),
            **{f"{service}Config": config_of(service) for service in SERVICES},
            "secrets": object_of({name: _ref(_reference(name)) for name in _secrets()}),
            "secret": object_of({"existingSecret": text(), "key": text(least=1)}),
            "public": object_of({"existingSecret": text(), "existingConfigMap": text(), "key": text(least=1)}),
            "serviceAccount": object_of({"create": _BOOL, "name": text(), "annotations": texts(), "automount": _BOOL}),
            "autoscaling": _autoscaling(),
            "monitor": _monitor(),
            "egress": object_of({"to": _LIST, "ports": _LIST}),
        },
    }


def main(arguments: list[str]) -> int:
    """Write or check; the exit status."""
    page = json.dumps(schema(), indent=1, sort_keys=True) + "\n"
    if "--check" not in arguments:
        TARGET.write_text(page)
        return 0
    if TARGET.exists() and TARGET.read_text() == page:
        return 0
    print(f"{TARGET.relative_to(ROOT)} is not up to date; run: python tools/values_schema.py", file=sys.stderr)
    return 1


# The values


def _top() -> dict[str, Schema]:
    return {
        # Helm passes an umbrella chart's on, whatever else is in it.
        "global": {"type": "object", "properties": {"imageRegistry": text(), "imagePullSecrets": _LIST}},
        "nameOverride": text(_PART_OF_A_NAME),
        "fullnameOverride": text(_PART_OF_A_NAME),
        "commonLabels": texts(),
        "commonAnnotations": texts(),
        "clusterDomain": text(least=1),
        "image": object_of(
            {
                "registry": text(),
                "repository": text(least=1),
                "tag": text(),
                "digest": text(r"^(sha256:[0-9a-f]{64})?$"),
                "pullPolicy": one_of("Always", "IfNotPresent", "Never"),
            }
        ),
        "imagePullSecrets": _LIST,
        "shards": number(1, 1024),
        "config": _ref("sharedConfig"),
        "listenAddress": text(least=1),
        "ports": object_of({name: number(1, 65535) for name in ("grpc", "http", "unsubscribe")}),
        "secrets": _ref("secrets"),
        "auth": object_of(
            {
                "mode": one_of("jwt", "tokens"),
                "jwt": object_of(
                    {"issuer": text(least=1), "audience": text(least=1), "jwksUrl": text(), "fromCluster": _BOOL}
                ),
            }
        ),
        "tls": _tls(),
        "defaults": object_of(_service()),
        "services": object_of(
            {
                name: object_of(
                    {**_service(), "config": _ref(f"{name}Config"), "secrets": _ref("secrets")}, or_null=True
                )
                for name in SERVICES
            }
        ),
        "unsubscribe": object_of({"baseUrl": text(r"^(https://.+)?$"), "ingress": object_of(_ingress())}),
        "migrations": object_of(_migrations()),
        "client": object_of(
            {
                **_pods(),
                **_account(),
                "token": _ref("secret"),
                "tenant": text(),
                "ca": _ref("public"),
                "certificate": object_of({"existingSecret": text()}),
            }
        ),
        "batches": {"type": "array", "items": _batch()},
        "batchDefaults": object_of(_batch_options()),
        "tests": object_of({**_pods(), "enabled": _BOOL, "activeDeadlineSeconds": number(1, 3600)}),
        "ingress": object_of({**_ingress(), "hosts": _LIST, "services": _some_services()}),
        "grpcRoute": object_of(
            {
                "enabled": _BOOL,
                "annotations": texts(),
                "parentRefs": _LIST,
                "hostnames": _LIST,
                "filters": _LIST,
                "services": _some_services(),
            }
        ),
        "networkPolicy": _network_policy(),
        "monitoring": object_of(
            {
                "serviceMonitor": _ref("monitor"),
                "podMonitor": _ref("monitor"),
                "prometheusRule": object_of(
                    {
                        **_published(),
                        "runbooks": text(r"^(https?://.+/)?$"),
                        "disabled": {"type": "array", "items": text()},
                        "extraGroups": {"type": "array", "items": _MAP},
                    }
                ),
                "dashboards": object_of(_published()),
            }
        ),
        "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
    }


def _service() -> dict[str, Schema]:
    seconds = number(0, 3600)
    budget = {"type": ["integer", "string"]}
    return {
        **_pods(),
        **_account(),
        "replicas": number(0, 1024),
        "extraEnvFrom": _LIST,
        "extraVolumes": _LIST,
        "extraVolumeMounts": _LIST,
        "extraContainers": _LIST,
        "initContainers": _LIST,
        "labels": texts(),
        "tmp": _MAP,
        "topologySpreadConstraints": _LIST,
        "startupProbe": _MAP,
        "livenessProbe": _MAP,
        "readinessProbe": _MAP,
        "drain": object_of(
            {"preStopSeconds": number(0, 600), "delaySeconds": number(0, 60), "timeoutSeconds": number(1, 600)}
        ),
        "terminationGracePeriodSeconds": {"type": ["integer", "null"], "minimum": 1},
        "lifecycle": _MAP,
        "strategy": _MAP,
        "minReadySeconds": seconds,
        "revisionHistoryLimit": number(0, 100),
        "pdb": object_of({"enabled": _BOOL, "maxUnavailable": budget, "minAvailable": budget}),
        "service": object_of(
            {
                "type": one_of("ClusterIP", "NodePort", "LoadBalancer"),
                "port": number(1, 65535),
                "annotations": texts(),
                "labels": texts(),
                "extraSpec": _MAP,
            }
        ),
        "tls": object_of({"existingSecret": text()}),
        "networkPolicy": object_of({"extraIngress": _LIST, "extraEgress": _LIST}),
        "autoscaling": _ref("autoscaling"),
    }


def _account() -> dict[str, Schema]:
    """What services, migrations and clients have: batches and tests run as the clients' account."""
    return {"serviceAccount": _ref("serviceAccount"), "annotations": texts()}


def _pods() -> dict[str, Schema]:
    """What all pods of ours have."""
    maps = ("podSecurityContext", "securityContext", "resources", "nodeSelector", "affinity", "dnsConfig")
    return {
        **dict.fromkeys(maps, _MAP),
        **dict.fromkeys(("podAnnotations", "podLabels"), texts()),
        **dict.fromkeys(("tolerations", "hostAliases", "extraEnv"), _LIST),
        **dict.fromkeys(("priorityClassName", "runtimeClassName", "schedulerName", "dnsPolicy"), text()),
    }


def _autoscaling() -> Schema:
    # KEDA takes no quantity such as 500m, and then does not scale at all; a number is a quantity for the HPA.
    share = text(r"^\d+(\.\d+)?$")
    metric = object_of({"perReplica": share, "query": text(least=1), "selector": texts()}, or_null=True)
    prometheus = {"serverAddress": text(), "selector": text(), "metadata": texts(), "authenticationRef": _MAP}
    keda = {
        "enabled": _BOOL,
        "fallback": _MAP,
        "prometheus": object_of(prometheus),
        "extraTriggers": _LIST,
        "annotations": texts(),
    }
    return object_of(
        {
            "minReplicas": number(1, 1024),  # None would stop firing and sending altogether.
            "maxReplicas": number(1, 1024),
            "metrics": {"type": "object", "additionalProperties": metric},
            "behavior": _MAP,
            "hpa": object_of({"enabled": _BOOL, "selector": texts(), "extraMetrics": _LIST}),
            "keda": object_of(keda),
        }
    )


def _tls() -> Schema:
    cert_manager = {
        "enabled": _BOOL,
        "issuerRef": object_of({"name": text(), "kind": text(), "group": text()}),
        "duration": text(least=1),
        "renewBefore": text(least=1),
        "privateKey": _MAP,
        "extraDnsNames": _LIST,
        "annotations": texts(),
    }
    return object_of(
        {
            "enabled": _BOOL,
            "existingSecret": text(),
            "clientCa": _ref("public"),
            "certManager": object_of(cert_manager),
        }
    )


def _migrations() -> dict[str, Schema]:
    return {
        **_pods(),
        **_account(),
        **_job(),
        "enabled": _BOOL,
        "extraEnvFrom": _LIST,
        "extraVolumes": _LIST,
        "extraVolumeMounts": _LIST,
        "initContainers": _LIST,
    }


def _batch() -> Schema:
    own = {
        "name": text(_LABEL),
        "batch": text(r"^[a-z0-9._-]{1,64}$"),
        "schedule": text(r"^\S+( \S+){4}$"),
    }
    return {**object_of({**_batch_options(), **own}), "required": ["name", "schedule"]}


def _batch_options() -> dict[str, Schema]:
    return {
        **_pods(),
        **_job(),
        "timeZone": text(least=1),
        "window": text(f"{DURATION}|^$"),
        "concurrencyPolicy": one_of("Allow", "Forbid", "Replace"),
        # Kubernetes looks every ten seconds: with less, runs would be left out for no reason.
        "startingDeadlineSeconds": number(10, 86400 * 31),
        "successfulJobsHistoryLimit": number(0, 100),
        "failedJobsHistoryLimit": number(0, 100),
        "suspend": _BOOL,
        "attempts": number(1, 100),
        "within": text(DURATION),
        "annotations": texts(),
        "labels": texts(),
    }


def _job() -> dict[str, Schema]:
    return {
        "backoffLimit": number(0, 100),
        "activeDeadlineSeconds": number(1, 86400),
        "ttlSecondsAfterFinished": {"type": ["integer", "null"], "minimum": 0},
    }


def _ingress() -> dict[str, Schema]:
    return {"enabled": _BOOL, "className": text(), "annotations": texts(), "tls": _LIST}


def _network_policy() -> Schema:
    peers = ("dns", "postgres", "nats", "otlp", "jwks", "businessServices", "smtp", "webhooks")
    return object_of(
        {
            "enabled": _BOOL,
            "grpcFrom": _LIST,
            "metricsFrom": _LIST,
            "unsubscribeFrom": _LIST,
            "egress": object_of(dict.fromkeys(peers, _ref("egress"))),
        }
    )


def _published() -> dict[str, Schema]:
    return {"enabled": _BOOL, "namespace": text(), "labels": texts(), "annotations": texts()}


def _monitor() -> Schema:
    how = {
        "interval": text(least=1),
        "scrapeTimeout": text(least=1),
        "relabelings": _LIST,
        "metricRelabelings": _LIST,
    }
    return object_of({**_published(), **how})


def _secrets() -> list[str]:
    """As templates/_pod.tpl lists them."""
    helper = (TARGET.parent / "templates" / "_pod.tpl").read_text()
    return re.findall(r"^(\w+): \{(?:env|file): CARILLON_\w+.*\}$", helper, re.MULTILINE)


def _reference(name: str) -> str:
    """Certificates of CAs and public keys may be in a ConfigMap."""
    return "public" if name.endswith(("Ca", "Jwks")) else "secret"


def _some_services() -> Schema:
    return {"type": "array", "items": one_of(*SERVICES), "uniqueItems": True}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
