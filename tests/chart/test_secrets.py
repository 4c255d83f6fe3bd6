"""Secrets are named, never held: not in a manifest, not in a ConfigMap, not on a command line."""

import re

import pytest
import yaml

from libs.settings import groups_of
from tests.chart.objects import environment, pods, strings
from tests.chart.processes import settings_class
from tests.chart.rendering import CHART, SERVICES, Rendered

# A credential in a URL, a private key, a JSON web token, a webhook secret of Standard Webhooks.
LOOKS_SECRET = re.compile(r"://[^/\s:@]+:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY|\beyJ[\w-]{10,}\.|\bwhsec_[\w+/=]{8,}")
NAMED_SECRET = re.compile(r"password|passwd|secret|token|credential", re.IGNORECASE)
# Variables whose names speak of secrets, and whose values are paths, numbers and durations.
HARMLESS = re.compile(r"_(FILE|RELOAD|INTERVAL|LIFETIME|TTL)$")


def test_the_chart_makes_no_secret(rendered: Rendered) -> None:
    """Whoever installs it makes them; neither helm's history nor Argo CD's repository ever holds one."""
    assert [one["metadata"]["name"] for one in rendered.of("Secret")] == []


def test_nothing_rendered_looks_like_a_secret(rendered: Rendered) -> None:
    """No URL with a password, no key and no token, anywhere in any object."""
    for one in rendered.objects:
        found = [text for text in strings(one) if LOOKS_SECRET.search(text)]
        assert found == [], f"{one['kind']}/{one['metadata']['name']}"


def test_what_looks_like_a_secret_is_found() -> None:
    """The check above can fail."""
    for text in (
        "postgresql://carillon:hunter2@postgres/carillon",
        "-----BEGIN EC PRIVATE KEY-----",
        "Bearer eyJhbGciOiJSUzI1NiJ9.e30.x",
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    ):
        assert LOOKS_SECRET.search(text), text
    assert not LOOKS_SECRET.search("nats://nats.nats.svc:4222")


def test_secret_settings_come_from_secrets(rendered: Rendered) -> None:
    """Every variable that the code types as a secret has a secretKeyRef and no value; ConfigMaps have none of them."""
    secret = _secret_variables()
    assert "CARILLON_POSTGRES_URL" in secret
    for pod in pods(rendered.objects):
        for container in pod.containers:
            for one in container.get("env") or []:
                if one["name"] in secret:
                    assert "secretKeyRef" in one.get("valueFrom", {}), f"{pod.name}: {one['name']}"
    for config in rendered.of("ConfigMap"):
        assert secret & set(config.get("data") or {}) == set(), config["metadata"]["name"]


def test_no_variable_named_like_a_secret_has_a_literal_value(rendered: Rendered) -> None:
    """Whoever wrote it, users' extraEnv in our own scenarios included: examples are copied."""
    for pod in pods(rendered.objects):
        for container in pod.containers:
            for name, value in environment(container, rendered).items():
                if NAMED_SECRET.search(name) and not HARMLESS.search(name):
                    assert value is None, f"{pod.name}: {name}"


def test_command_lines_name_no_secret(rendered: Rendered) -> None:
    """Everybody on a node reads them: tokens are passed as files."""
    for pod in pods(rendered.objects):
        for container in pod.containers:
            words = [str(word) for word in [*(container.get("command") or []), *(container.get("args") or [])]]
            assert not [word for word in words if re.match(r"--(token|password)(=|$)", word)], pod.name
            assert not [word for word in words if "$(" in word and NAMED_SECRET.search(word)], pod.name


def test_secret_files_are_mounted_from_secrets_or_public(rendered: Rendered) -> None:
    """A mounted ConfigMap holds certificates of CAs and the like, never what authenticates us."""
    for pod in pods(rendered.objects):
        for volume in pod.spec.get("volumes") or []:
            if "configMap" in volume:
                assert not re.search(r"token|password|creds|key|secret", volume["name"]), (
                    f"{pod.name}: {volume['name']}"
                )


@pytest.mark.parametrize("path", ["values.yaml", *sorted(path.name for path in CHART.glob("ci/*"))])
def test_values_hold_no_secret(path: str) -> None:
    """No default password, in the chart or in its examples."""
    file = CHART / path if path == "values.yaml" else CHART / "ci" / path
    assert [text for text in strings(yaml.safe_load(file.read_text())) if LOOKS_SECRET.search(text)] == []


def _secret_variables() -> set[str]:
    return {
        group.variable_of(field)
        for service in SERVICES
        for group in groups_of(settings_class(service))
        for field, info in group.model_fields.items()
        if "SecretStr" in str(info.annotation)
    }
