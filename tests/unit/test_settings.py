"""Settings: read from the environment, checked, and every mistake named at once."""

import os
from dataclasses import dataclass
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import SettingsError
from libs.settings import (
    AuthMode,
    AuthSettings,
    ClockSettings,
    GrpcSettings,
    HttpSettings,
    LinkSettings,
    NatsSettings,
    PostgresSettings,
    TelemetrySettings,
    TlsMode,
    format_duration,
    load,
    load_or_exit,
    parse_duration,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Everything:
    """As a service puts its groups together."""

    postgres: PostgresSettings
    nats: NatsSettings
    grpc: GrpcSettings
    http: HttpSettings
    auth: AuthSettings
    telemetry: TelemetrySettings
    clock: ClockSettings
    link: LinkSettings


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine's reaches a test."""
    for name in [name for name in os.environ if name.startswith("CARILLON_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment, with the one setting that is required."""
    monkeypatch.setenv("CARILLON_POSTGRES_URL", "postgresql://carillon:hunter2@db/carillon")
    return monkeypatch


def problems_of(error: SettingsError) -> list[str]:
    """The variables a message names."""
    return [line.split(":")[0].strip() for line in error.message.splitlines()[1:]]


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("30s", timedelta(seconds=30)),
        ("1h30m", timedelta(hours=1, minutes=30)),
        ("250ms", timedelta(milliseconds=250)),
        ("1.5s", timedelta(seconds=1.5)),
        ("7d", timedelta(days=7)),
        ("0s", timedelta(0)),
        ("PT1M", timedelta(minutes=1)),
        ("P1DT2H", timedelta(days=1, hours=2)),
        (timedelta(seconds=3), timedelta(seconds=3)),
    ],
)
def test_durations_are_read_in_both_forms(text: object, duration: timedelta) -> None:
    """Short, and ISO 8601."""
    assert parse_duration(text) == duration


@pytest.mark.parametrize("text", ["30", 30, 1.5, "", "s", "30 s", "-1s", "1y", "1h x", None])
def test_a_duration_without_a_unit_or_of_another_form_is_refused(text: object) -> None:
    """Nobody remembers the unit of a bare number."""
    with pytest.raises(ValueError, match="30s"):
        parse_duration(text)


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=400)))
def test_a_duration_survives_being_written_and_read(duration: timedelta) -> None:
    """format_duration writes what parse_duration reads."""
    assert parse_duration(format_duration(duration)) == duration


def test_defaults_need_only_the_database(env: pytest.MonkeyPatch) -> None:
    """Everything else has a sound default."""
    settings = load(Everything)
    assert settings.postgres.pool_size == 8
    assert settings.grpc.host == "127.0.0.1"
    assert settings.auth.mode is AuthMode.NONE
    assert settings.clock.test is False
    assert settings.link.republish_after == timedelta(seconds=2)


def test_settings_come_from_the_environment(env: pytest.MonkeyPatch) -> None:
    """By group and field."""
    env.setenv("CARILLON_LINK_SWEEP_INTERVAL", "500ms")
    env.setenv("CARILLON_NATS_URL", "nats://a:4222, nats://b:4222")
    env.setenv("CARILLON_TEST_CLOCK", "on")
    settings = load(Everything)
    assert settings.link.sweep_interval == timedelta(milliseconds=500)
    assert settings.nats.url == ("nats://a:4222", "nats://b:4222")
    assert settings.clock.test is True


def test_an_empty_variable_counts_as_not_set(env: pytest.MonkeyPatch) -> None:
    """Charts render empty values."""
    env.setenv("CARILLON_GRPC_PORT", "")
    assert load(GrpcSettings).port == 0


def test_all_mistakes_of_all_groups_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start, one list."""
    monkeypatch.setenv("CARILLON_GRPC_PORT", "99999")
    monkeypatch.setenv("CARILLON_LINK_SWEEP_INTERVAL", "3")
    monkeypatch.setenv("CARILLON_TEST_CLOCK", "perhaps")
    monkeypatch.setenv("CARILLON_AUTH_MODE", "jwt")
    with pytest.raises(SettingsError) as caught:
        load(Everything)
    assert problems_of(caught.value) == [
        "CARILLON_POSTGRES_URL",
        "CARILLON_GRPC_PORT",
        "CARILLON_AUTH_*",
        "CARILLON_TEST_CLOCK",
        "CARILLON_LINK_SWEEP_INTERVAL",
    ]


def test_a_misspelt_name_is_pointed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing setting and its near miss are read together."""
    monkeypatch.setenv("CARILLON_POSTGRES_URI", "postgresql://db/carillon")
    with pytest.raises(SettingsError, match="there is CARILLON_POSTGRES_URI"):
        load(PostgresSettings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CARILLON_POSTGRES_URL", "mysql://carillon:hunter2@db/carillon"),
        ("CARILLON_NATS_URL", "nats://carillon:hunter2@nats:4222"),
    ],
)
def test_a_secret_is_never_in_a_message(env: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Neither a secret's own value nor an address with a password in it."""
    env.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load(Everything)
    assert "hunter2" not in caught.value.message
    assert problems_of(caught.value) == [name]


def test_a_secret_is_not_shown_with_the_settings(env: pytest.MonkeyPatch) -> None:
    """Settings may be logged."""
    assert "hunter2" not in repr(load(Everything))


def test_wrong_settings_end_a_process_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the list on stderr."""
    with pytest.raises(SystemExit) as caught:
        load_or_exit(PostgresSettings)
    assert caught.value.code == 2
    assert "CARILLON_POSTGRES_URL: required, and not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environment",
    [
        {"CARILLON_GRPC_TLS_CERT_FILE": "cert.pem"},
        {"CARILLON_GRPC_TLS_CLIENT_CA_FILE": "ca.pem"},
        {"CARILLON_GRPC_DEFAULT_DEADLINE": "10m"},
        {"CARILLON_AUTH_MODE": "tokens"},
        {"CARILLON_AUTH_JWT_ALGORITHMS": "HS256"},
        {"CARILLON_LINK_REPUBLISH_MAX": "1s"},
        {"CARILLON_AUTH_DEFAULT_TENANT": "a/b"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_settings_that_contradict_each_other_are_refused(env: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Half of TLS, a mode without its file, an unsafe algorithm, a backoff that shrinks."""
    for name, value in environment.items():
        env.setenv(name, value)
    with pytest.raises(SettingsError):
        load(Everything)


def test_the_certificates_decide_how_a_server_is_protected() -> None:
    """No separate switch that could contradict them."""
    cert = {"tls_cert_file": "c.pem", "tls_key_file": "k.pem"}
    assert GrpcSettings().tls is TlsMode.PLAINTEXT
    assert GrpcSettings.model_validate(cert).tls is TlsMode.TLS
    assert GrpcSettings.model_validate({**cert, "tls_client_ca_file": "ca.pem"}).tls is TlsMode.MUTUAL


def test_inv4_cancels_are_remembered_longer_than_what_they_forbid_may_come() -> None:
    """By an hour, because a frame's age is by its sender's clock."""
    links = LinkSettings(inbox_retention=timedelta(days=30))
    assert links.tombstone_retention == timedelta(days=30, hours=1)
