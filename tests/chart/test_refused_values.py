"""Values that cannot be meant are refused before anything is installed, and the message names what is wrong."""

from typing import Any

import pytest

from tests.chart.rendering import CHART, Refused, helm, render

BATCH = {"name": "flights", "schedule": "0 */4 * * *"}
MUTUAL = {"enabled": True, "existingSecret": "tls", "clientCa": {"existingSecret": "callers-ca"}}
DUPLICATE_PORTS = {"ports": {"grpc": 8080, "http": 8080}}

# Beside each: what the message must say. A path is the schema's, a sentence the chart's own.
REFUSED: list[tuple[dict[str, Any], str]] = [
    # Misspelt, or in the wrong place.
    ({"replicaz": 1}, "replicaz"),
    ({"services": {"intak": {}}}, "intak"),
    ({"services": {"digest": {"resource": {}}}}, "resource"),
    ({"defaults": {"resource": {}}}, "resource"),
    ({"batches": [{**BATCH, "timezone": "UTC"}]}, "timezone"),
    ({"config": {"CARILLON_NATZ_URL": "nats://nats:4222"}}, "CARILLON_NATZ_URL"),
    ({"config": {"CARILLON_GRPC_PORT": 7000}}, "CARILLON_GRPC_PORT"),
    ({"services": {"digest": {"config": {"CARILLON_DISPATCHER_SMTP_HOST": "smtp"}}}}, "CARILLON_DISPATCHER_SMTP_HOST"),
    # Batches and tests are the clients' account, and a test's pod has podAnnotations.
    ({"batches": [{**BATCH, "serviceAccount": {"name": "flights"}}]}, "serviceAccount"),
    ({"batchDefaults": {"serviceAccount": {"name": "flights"}}}, "serviceAccount"),
    ({"tests": {"serviceAccount": {"name": "tests"}}}, "serviceAccount"),
    ({"tests": {"annotations": {"a": "b"}}}, "annotations"),
    # Settings in which the services have to agree.
    ({"services": {"digest": {"config": {"CARILLON_SHARDS": 8}}}}, "CARILLON_SHARDS"),
    # Secrets where they do not belong.
    ({"config": {"CARILLON_POSTGRES_URL": "postgresql://a:b@c/d"}}, "CARILLON_POSTGRES_URL"),
    ({"config": {"CARILLON_NATS_PASSWORD": "hunter2"}}, "CARILLON_NATS_PASSWORD"),
    ({"config": {"CARILLON_NATS_URL": "nats://a:b@nats:4222"}}, "CARILLON_NATS_URL"),
    ({"secrets": {"postgresUrl": {"value": "postgresql://a:b@c/d"}}}, "/secrets/postgresUrl"),
    ({"client": {"token": {"value": "hunter2"}}}, "/client/token"),
    # The wrong type, or out of bounds.
    ({"services": {"digest": {"replicas": "two"}}}, "/services/digest/replicas"),
    ({"services": {"digest": {"replicas": -1}}}, "/services/digest/replicas"),
    ({"shards": 0}, "/shards"),
    ({"shards": 2000}, "/shards"),
    ({"ports": {"grpc": 70000}}, "/ports/grpc"),
    ({"image": {"tag": 1.10}}, "/image/tag"),
    ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
    ({"image": {"digest": "sha1:abc"}}, "/image/digest"),
    ({"imagePullSecrets": "registry"}, "/imagePullSecrets"),
    ({"networkPolicy": {"enabled": "yes"}}, "/networkPolicy/enabled"),
    ({"config": {"CARILLON_NATS_CONNECT_TIMEOUT": "5"}}, "CARILLON_NATS_CONNECT_TIMEOUT"),
    ({"config": {"CARILLON_NATS_CONNECT_TIMEOUT": 5}}, "CARILLON_NATS_CONNECT_TIMEOUT"),
    ({"config": {"CARILLON_NATS_STREAM_REPLICAS": 9}}, "CARILLON_NATS_STREAM_REPLICAS"),
    ({"migrations": {"activeDeadlineSeconds": 0}}, "/migrations/activeDeadlineSeconds"),
    ({"auth": {"mode": "none"}}, "/auth/mode"),
    ({"unsubscribe": {"baseUrl": "http://mail.example.org"}}, "/unsubscribe/baseUrl"),
    ({"batches": [{"name": "flights"}]}, "schedule"),
    ({"batches": [{**BATCH, "name": "A b"}]}, "/batches/0/name"),
    ({"batches": [{**BATCH, "schedule": "often"}]}, "/batches/0/schedule"),
    ({"batches": [{**BATCH, "schedule": "CRON_TZ=Europe/Berlin 0 9 * * *"}]}, "/batches/0/schedule"),
    ({"batches": [{**BATCH, "concurrencyPolicy": "Never"}]}, "/batches/0/concurrencyPolicy"),
    # Each good by itself, and not together.
    ({"batches": [BATCH, BATCH]}, "batches: each name may be there once"),
    ({"auth": {"mode": "tokens"}}, "auth.mode tokens needs secrets.authTokens.existingSecret"),
    ({"secrets": {"postgresUrl": {"existingSecret": ""}}}, "secrets.postgresUrl.existingSecret must name a Secret"),
    ({"tls": {"enabled": True}}, "tls.enabled needs"),
    ({"unsubscribe": {"baseUrl": "https://mail.example.org"}}, "secrets.unsubscribeSecrets"),
    ({"defaults": {"drain": {"delaySeconds": 30, "timeoutSeconds": 20}}}, "drain.delaySeconds"),
    ({"defaults": {"terminationGracePeriodSeconds": 10}}, "terminationGracePeriodSeconds must be above"),
    ({"services": {"scheduler": {"replicas": 17}}}, "17 replicas, but only 16 shards"),
    ({"defaults": {"autoscaling": {"keda": {"enabled": True}}}}, "autoscaling.keda.prometheus.serverAddress"),
    ({"defaults": {"autoscaling": {"hpa": {"enabled": True}, "keda": {"enabled": True}}}}, "exclude each other"),
    ({"defaults": {"autoscaling": {"hpa": {"enabled": True}, "minReplicas": 5, "maxReplicas": 2}}}, "minReplicas"),
    # A quantity, which KEDA cannot read; it would scale by none of the metrics then.
    ({"services": {"digest": {"autoscaling": {"metrics": {"a": {"perReplica": "500m"}}}}}}, "perReplica"),
    ({"defaults": {"serviceAccount": {"name": "one"}}}, "name one would be made for digest, dispatcher, intake, sch"),
    # Its hook would take the account away from everybody.
    (
        {"migrations": {"serviceAccount": {"name": "one"}}, "client": {"serviceAccount": {"name": "one"}}},
        "name one would be made for client, migrations",
    ),
    ({"tls": MUTUAL, "batches": [BATCH]}, "client.certificate.existingSecret"),
    ({"tls": MUTUAL, "batches": [BATCH], "tests": {"enabled": False}}, "client.certificate.existingSecret"),
    ({"tls": MUTUAL}, "client.certificate.existingSecret"),
    ({"monitoring": {"prometheusRule": {"disabled": ["CarillonTimersLat"]}}}, "there is no alert CarillonTimersLat"),
    (DUPLICATE_PORTS, "ports"),
    ({"ingress": {"enabled": True}}, "ingress.hosts"),
    ({"grpcRoute": {"enabled": True}}, "grpcRoute.parentRefs"),
    # A budget that lets nobody go: nodes could never be drained.
    ({"defaults": {"pdb": {"maxUnavailable": 0}}}, "pdb"),
    ({"defaults": {"pdb": {"minAvailable": "100%"}}}, "pdb"),
    ({"defaults": {"replicas": 1, "pdb": {"minAvailable": 1}}}, "pdb"),
    ({"defaults": {"replicas": 3, "pdb": {"minAvailable": 3}}}, "pdb"),
    # Names that Kubernetes would refuse, one by one.
    ({"nameOverride": "Not A Name"}, "nameOverride"),
    ({"fullnameOverride": "Not_a_name"}, "fullnameOverride"),
]


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=lambda of: str(of)[:70] if isinstance(of, dict) else "")
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    """The message says which value it is."""
    with pytest.raises(Refused) as refused:
        render("minimal", values=values)
    assert named in str(refused.value)


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    """Nobody has to try again and again."""
    with pytest.raises(Refused) as refused:
        render("minimal", values={"auth": {"mode": "tokens"}, "tls": {"enabled": True}, "batches": [BATCH, BATCH]})
    for named in ("secrets.authTokens", "tls.existingSecret", "each name may be there once"):
        assert named in str(refused.value)


def test_the_chart_alone_says_what_it_needs() -> None:
    """Without any values it installs nothing, and names the one Secret that it cannot do without."""
    with pytest.raises(Refused, match=r"secrets\.postgresUrl\.existingSecret must name a Secret with the key url"):
        helm("template", "carillon", str(CHART))


def test_a_kubernetes_that_is_too_old_is_refused() -> None:
    """Chart.yaml says from which on."""
    with pytest.raises(Refused, match=r"chart requires kubeVersion: >=1\.24"):
        render("minimal", version="1.23.0")
