"""The chart's values follow the services' settings: what does not exist cannot be set, nothing that exists is out of
reach, and nothing secret can be written into a ConfigMap.
"""

import re
from functools import cache

import pytest
from pydantic import SecretStr

from libs.settings import Settings
from libs.settings_doc import all_groups
from tools.chart_readme import Row, Section, rows
from tools.values_config import SERVICES, config_of, shared_config
from tools.values_schema import TARGET, schema

HELPERS = (TARGET.parent / "templates" / "_pod.tpl").read_text()
FROM_SECRETS = set(re.findall(r"^\w+: \{(?:env|file): (CARILLON_\w+)", HELPERS, re.MULTILINE))
WRITTEN = set(re.findall(r'"(CARILLON_\w+)"', HELPERS))
# `none` is not to be had in a pod, so neither is the tenant of those who need no credential.
NEVER = {"CARILLON_AUTH_DEFAULT_TENANT"}
# A user name is no secret, but those who make Secrets for NATS put it there. The other two have a default by the chart.
TWO_WAYS = {"CARILLON_NATS_USER", "CARILLON_DISPATCHER_DRAIN_TIMEOUT", "CARILLON_AUTH_JWKS_CA_FILE"}


@cache
def _settings() -> dict[str, str]:
    return {
        group.variable_of(name): str(field.annotation)
        for group in all_groups()
        for name, field in group.model_fields.items()
    }


def _configurable() -> set[str]:
    maps = [shared_config(), *map(config_of, SERVICES)]
    return {name for one in maps for name in one["properties"]}


def test_every_setting_can_be_set_in_one_way() -> None:
    """In `config`, by a Secret, or by a value of the chart that the templates turn into it; never in two."""
    ways = (_configurable(), FROM_SECRETS, WRITTEN)
    for name in _settings().keys() - NEVER:
        assert sum(name in way for way in ways) == (2 if name in TWO_WAYS else 1), name


def test_every_secret_and_file_comes_from_a_secret() -> None:
    """Also those that somebody adds: the table in the templates has to name them."""
    secret = {name for name, kind in _settings().items() if "SecretStr" in kind or name.endswith("_FILE")}
    assert "CARILLON_POSTGRES_URL" in secret
    assert secret <= FROM_SECRETS | WRITTEN


def test_nothing_secret_can_stand_in_config() -> None:
    """A ConfigMap is no place for it."""
    assert not {name for name in _configurable() if SecretStr.__name__ in _settings()[name]}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_cannot_have_what_all_must_agree_in(service: str) -> None:
    """Streams are declared by several services, and business time is one for all."""
    own = set(config_of(service)["properties"])
    assert not own & {"CARILLON_TEST_CLOCK", "CARILLON_NATS_STREAM_MAX_BYTES", "CARILLON_LINK_INBOX_RETENTION"}
    assert "CARILLON_POSTGRES_POOL_SIZE" in own
    assert {name for name in own if name.startswith(f"CARILLON_{service.upper()}_")}


def test_bounds_are_those_of_the_code() -> None:
    """A number out of bounds is refused before anything is installed."""
    lanes = config_of("scheduler")["properties"]["CARILLON_SCHEDULER_LANES"]
    assert lanes == {"type": "integer", "minimum": 1, "maximum": 16}


def test_unknown_names_are_refused_at_every_level() -> None:
    """Everywhere that properties are listed, nothing else may stand; `global` is the umbrella chart's."""
    open_ones = []

    def look(one: object, where: str) -> None:
        if isinstance(one, dict):
            if "properties" in one and one.get("additionalProperties") is not False:
                open_ones.append(where)
            for key, value in one.items():
                look(value, f"{where}/{key}")

    look(schema(), "")
    assert open_ones == ["/properties/global"]


def test_settings_are_groups_of_settings() -> None:
    """What these tests look at is what there is."""
    assert all(issubclass(group, Settings) for group in all_groups())
    assert len(_settings()) > 100


def test_a_comment_above_a_key_describes_it() -> None:
    """In the chart's README: sections, values with a comment, and values that are not divided further."""
    ports = "# == Ports\n\nports:\n  # -- For gRPC,\n  # and nothing else.\n  grpc: 1\n  # not this\n  http: 2\n"
    source = f"{ports}# -- All.\nmap:\n  a: {{}}\n"
    values = {"ports": {"grpc": 1, "http": 2}, "map": {"a": {}}}
    assert list(rows(source, values)) == [
        Section("Ports"),
        Row("ports.grpc", "`1`", "For gRPC, and nothing else."),
        Row("ports.http", "`2`", ""),
        Row("map", "", "All."),
        Row("map.a", "`{}`", ""),
    ]
