"""Settings: typed, from the environment, every error reported at once.

Each group is a class whose fields are read from `CARILLON_<GROUP>_<FIELD>`; nothing else in Carillon reads the
environment. An empty variable counts as not set. Durations are written `30s`, `1h30m`, `250ms`, `7d` (d, h, m, s, ms,
us) or as ISO 8601 (`PT30S`); a bare number is refused, because nobody remembers its unit. Secrets are SecretStr and
never appear in a message. A service combines groups in a frozen dataclass and gets it whole from `load`.

docs/settings.md is generated from the descriptions here by `libs.settings_doc`.
"""

from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from libs.settings_base import (
    CommaSeparated,
    Duration,
    Settings,
    format_duration,
    groups_of,
    load,
    load_or_exit,
    parse_duration,
)

__all__ = [
    "AuthMode",
    "AuthSettings",
    "ClockSettings",
    "CommaSeparated",
    "Duration",
    "GrpcSettings",
    "HttpSettings",
    "LinkSettings",
    "LogFormat",
    "LogLevel",
    "NatsSettings",
    "PostgresSettings",
    "ReflectionMode",
    "Settings",
    "ShardSettings",
    "TelemetrySettings",
    "TlsMode",
    "format_duration",
    "groups_of",
    "load",
    "load_or_exit",
    "parse_duration",
]

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MILLISECOND = timedelta(milliseconds=1)


class PostgresSettings(Settings):
    """Postgres: where the truth is (rule R1)."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_POSTGRES_")

    url: SecretStr = Field(
        description="Where Postgres is: `postgresql://user:password@host:port/database`. No default: a service must "
        "not start on a database nobody chose. May be the same for all services; each uses its own schema."
    )
    pool_size: int = Field(
        8,
        ge=1,
        le=200,
        description="Connections each process holds at most. A process commits in groups, so a few are enough; more "
        "connections over all processes than Postgres's max_connections makes start-up fail.",
    )
    pool_timeout: Duration = Field(
        10 * SECOND,
        ge=10 * MILLISECOND,
        le=5 * MINUTE,
        description="How long a transaction waits for a free connection before it is refused as UNAVAILABLE.",
    )
    connect_timeout: Duration = Field(
        10 * SECOND,
        ge=SECOND,
        le=5 * MINUTE,
        description="How long one attempt to connect may take, in whole seconds. Long enough for a failover's DNS.",
    )
    statement_timeout: Duration = Field(
        30 * SECOND,
        ge=timedelta(0),
        le=HOUR,
        description="Postgres cancels a statement that runs longer. Far above every statement we know; it stops what "
        "went wrong. 0s: no limit.",
    )
    lock_timeout: Duration = Field(
        5 * SECOND,
        ge=timedelta(0),
        le=HOUR,
        description="Postgres gives up waiting for a lock after this, in migrations too, so that a migration never "
        "queues the whole service behind itself. 0s: wait until statement_timeout.",
    )
    idle_in_transaction_timeout: Duration = Field(
        MINUTE,
        ge=timedelta(0),
        le=HOUR,
        description="Postgres ends a session that holds a transaction open and does nothing; a paused process must not "
        "hold locks for ever. 0s: no limit.",
    )
    migration_timeout: Duration = Field(
        10 * MINUTE,
        ge=SECOND,
        le=DAY,
        description="statement_timeout while migrating, and how long a process waits for another one's migration.",
    )

    @field_validator("url")
    @classmethod
    def _is_postgres(cls, url: SecretStr) -> SecretStr:
        if urlsplit(url.get_secret_value()).scheme not in {"postgresql", "postgres"}:
            raise ValueError("must be a postgresql:// URL without a driver name")
        return url


class NatsSettings(Settings):
    """NATS with JetStream: what carries frames between services. It may lose everything at any time (rule R1)."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_NATS_")

    url: CommaSeparated = Field(
        ("nats://127.0.0.1:4222",),
        min_length=1,
        description="NATS servers, comma separated: `nats://host:port` or `tls://host:port`. Credentials do not belong "
        "here, because addresses are logged; use the settings below.",
    )
    user: str | None = Field(None, description="User name, with password. Not set: none is sent.")
    password: SecretStr | None = Field(None, description="Password of user.")
    token: SecretStr | None = Field(None, description="Token, instead of user and password.")
    creds_file: Path | None = Field(None, description="A .creds file (JWT and nkey seed), instead of user or token.")
    tls_ca_file: Path | None = Field(None, description="PEM with the CAs that may sign NATS. Not set: the system's.")
    tls_cert_file: Path | None = Field(None, description="PEM with our client certificate, where NATS asks for one.")
    tls_key_file: Path | None = Field(None, description="PEM with the key of tls_cert_file.")
    connect_timeout: Duration = Field(
        5 * SECOND, ge=SECOND, le=MINUTE, description="How long one attempt to connect may take; attempts never end."
    )
    publish_timeout: Duration = Field(
        5 * SECOND,
        ge=100 * MILLISECOND,
        le=MINUTE,
        description="How long to wait for JetStream's acknowledgement. Then the sweeper takes over; nothing is lost.",
    )
    stream_max_age: Duration = Field(
        DAY,
        ge=MINUTE,
        le=30 * DAY,
        description="JetStream drops frames older than this. Postgres still has them and republishes, so it only "
        "bounds the disk. Must stay below CARILLON_LINK_INBOX_RETENTION, or a frame could be applied twice.",
    )
    stream_max_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        le=1 << 44,
        description="Size limit of each stream, in bytes. At the limit frames wait in the outbox.",
    )
    stream_replicas: int = Field(
        1,
        ge=1,
        le=5,
        description="Copies JetStream keeps of each stream. 1, because nothing depends on it; 3 in a cluster saves the "
        "republishing after a node's loss.",
    )

    @field_validator("url")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in {"nats", "tls", "ws", "wss"} or not parts.hostname:
                raise ValueError("each must look like nats://host:port or tls://host:port")
            if parts.username or parts.password:
                raise ValueError("must not hold credentials; use the user, password, token or creds_file setting")
        return urls


# What a tenant may be called: it is part of keys, labels of log lines and file names, so nothing needs escaping.
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class TlsMode(StrEnum):
    """How a gRPC server is protected on the wire."""

    PLAINTEXT = "plaintext"
    TLS = "tls"
    MUTUAL = "mutual"


class ReflectionMode(StrEnum):
    """Who may ask a server what it can do."""

    OFF = "off"
    OPEN = "open"
    AUTHENTICATED = "authenticated"


class GrpcSettings(Settings):
    """The gRPC server of each service."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_GRPC_")

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Loopback, so that nothing is open by accident; `0.0.0.0` or `::` in a "
        "container, which needs CARILLON_AUTH_MODE other than none.",
    )
    port: int = Field(0, ge=0, le=65535, description="Port to listen on. 0: a free one, which is logged.")
    tls_cert_file: Path | None = Field(None, description="PEM with the server's certificate chain. Not set: plaintext.")
    tls_key_file: Path | None = Field(None, description="PEM with the key of tls_cert_file.")
    tls_client_ca_file: Path | None = Field(
        None,
        description="PEM with the CAs that sign client certificates; then a client without one is refused (mTLS). "
        "Not set: clients need no certificate.",
    )
    reflection: ReflectionMode = Field(
        ReflectionMode.OPEN,
        description="Server reflection (grpcurl): `off`, `open` (without credentials; it shows contracts, no data), or "
        "`authenticated`.",
    )
    max_message_bytes: int = Field(
        4 << 20,
        ge=64 << 10,
        le=256 << 20,
        description="Largest request or answer in bytes; larger ones are RESOURCE_EXHAUSTED. 4 MiB holds 1,000 items "
        "of 4 KiB.",
    )
    max_concurrent_rpcs: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Calls in progress at once; further ones are RESOURCE_EXHAUSTED at once (INV-9).",
    )
    default_deadline: Duration = Field(
        30 * SECOND,
        ge=100 * MILLISECOND,
        le=HOUR,
        description="Deadline of a unary call whose caller gave none, so that every wait ends.",
    )
    max_deadline: Duration = Field(
        5 * MINUTE,
        ge=SECOND,
        le=DAY,
        description="A unary caller's longer deadline is cut to this, so that no caller holds resources for ever.",
    )
    max_stream_duration: Duration = Field(
        HOUR, ge=SECOND, le=7 * DAY, description="A streaming call ends with DEADLINE_EXCEEDED after this."
    )
    drain_delay: Duration = Field(
        timedelta(0),
        ge=timedelta(0),
        le=MINUTE,
        description="After SIGTERM: how long new calls are still answered while health already says NOT_SERVING, so "
        "that load balancers stop choosing this process first. 0s: not at all; 5s behind a Kubernetes Service.",
    )
    drain_timeout: Duration = Field(
        20 * SECOND,
        ge=timedelta(0),
        le=10 * MINUTE,
        description="After SIGTERM: how long calls and tasks in progress may take to end before they are cancelled. "
        "Below Kubernetes' default grace period of 30 s. 0s: cancel at once.",
    )

    @property
    def tls(self) -> TlsMode:
        """What the certificate settings amount to."""
        if self.tls_cert_file is None:
            return TlsMode.PLAINTEXT
        return TlsMode.TLS if self.tls_client_ca_file is None else TlsMode.MUTUAL

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file must be set together")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        if self.default_deadline > self.max_deadline:
            raise ValueError("default_deadline must not be longer than max_deadline")
        return self


class HttpSettings(Settings):
    """The HTTP port with /metrics, /livez and /readyz."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_HTTP_")

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. It has no authentication; keep it inside the cluster.",
    )
    port: int = Field(0, ge=0, le=65535, description="Port to listen on. 0: a free one, which is logged.")
    readiness_timeout: Duration = Field(
        2 * SECOND,
        ge=50 * MILLISECOND,
        le=MINUTE,
        description="How long /readyz waits for the service's checks before it answers 503.",
    )


class AuthMode(StrEnum):
    """How callers prove who they are."""

    NONE = "none"
    TOKENS = "tokens"
    JWT = "jwt"


_JWT_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})


class AuthSettings(Settings):
    """Who may call, and for which tenant."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_AUTH_")

    mode: AuthMode = Field(
        AuthMode.NONE,
        description="`none`: anybody, tenant from the `carillon-tenant` metadata; refused on any address that is not "
        "loopback. `tokens`: static tokens from tokens_file. `jwt`: signed tokens, checked against a JWKS.",
    )
    default_tenant: str = Field(
        "default", pattern=TENANT_PATTERN, description="Tenant of a caller that names none, in mode none only."
    )
    tokens_file: Path | None = Field(
        None, description="Mode tokens: YAML or JSON with hashed tokens. Read again when it changes."
    )
    tokens_reload: Duration = Field(
        5 * SECOND,
        ge=100 * MILLISECOND,
        le=HOUR,
        description="How long a change of tokens_file may go unnoticed; a look costs one stat().",
    )
    jwks_url: str | None = Field(None, description="Mode jwt: where the issuer's keys are. Or use jwks_file.")
    jwks_file: Path | None = Field(
        None,
        description="Mode jwt: a file with the issuer's keys, instead of jwks_url; read "
        "as often as that would be fetched.",
    )
    jwks_ca_file: Path | None = Field(
        None, description="PEM with the CAs that may sign jwks_url's server. Not set: the system's."
    )
    jwks_token_file: Path | None = Field(
        None,
        description="A file whose content is sent as bearer token when fetching jwks_url, read each time; the "
        "Kubernetes API server wants its pod's service-account token. Not set: none.",
    )
    jwks_lifetime: Duration = Field(
        10 * MINUTE, ge=SECOND, le=DAY, description="Fetched keys are used this long, then fetched again."
    )
    jwks_min_interval: Duration = Field(
        10 * SECOND,
        ge=100 * MILLISECOND,
        le=HOUR,
        description="An unknown key id causes a fetch at most this often, so forged tokens cannot flood the issuer.",
    )
    jwks_max_stale: Duration = Field(
        DAY,
        ge=timedelta(0),
        le=30 * DAY,
        description="How long keys stay in use past jwks_lifetime while the issuer cannot be reached. Longer survives "
        "longer outages, and trusts a withdrawn key longer. 0s: not at all.",
    )
    jwt_issuer: str | None = Field(None, description="Mode jwt, required: the `iss` claim a token must have.")
    jwt_audience: str | None = Field(None, description="Mode jwt, required: the audience a token must be for.")
    jwt_algorithms: CommaSeparated = Field(
        ("RS256", "ES256"),
        min_length=1,
        description="Signature algorithms accepted, comma separated. Asymmetric ones only: with HS256 the public key "
        "would sign.",
    )
    jwt_tenant_claim: str = Field(
        "kubernetes.io/namespace",
        min_length=1,
        description="Path of the claim that names the tenant, `/` between levels. The default is the namespace of a "
        "Kubernetes service account.",
    )
    jwt_roles_claim: str | None = Field(
        None,
        description="Path of a claim with a list of roles (or one, space separated). Not set: tokens carry no roles.",
    )
    jwt_leeway: Duration = Field(
        10 * SECOND,
        ge=timedelta(0),
        le=5 * MINUTE,
        description="Clock difference allowed when checking exp, nbf and iat.",
    )

    @field_validator("jwt_algorithms")
    @classmethod
    def _are_asymmetric(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(algorithms) - _JWT_ALGORITHMS:
            raise ValueError(
                f"{', '.join(sorted(unknown))} not allowed; choose from {', '.join(sorted(_JWT_ALGORITHMS))}"
            )
        return algorithms

    @model_validator(mode="after")
    def _mode_is_whole(self) -> Self:
        missing = []
        if self.mode is AuthMode.TOKENS and self.tokens_file is None:
            missing.append("tokens_file")
        if self.mode is AuthMode.JWT:
            missing += [name for name in ("jwt_issuer", "jwt_audience") if getattr(self, name) is None]
            if (self.jwks_url is None) == (self.jwks_file is None):
                missing.append("exactly one of jwks_url and jwks_file")
        if missing:
            raise ValueError(f"mode {self.mode.value} needs {', '.join(missing)}")
        return self


class LogFormat(StrEnum):
    """How log lines look."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


class LogLevel(StrEnum):
    """From which severity on lines are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TelemetrySettings(Settings):
    """Logs and traces. Metrics are always there, see CARILLON_HTTP_*."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_TELEMETRY_")

    log_level: LogLevel = Field(LogLevel.INFO, description="`debug`, `info`, `warning` or `error`.")
    log_format: LogFormat = Field(
        LogFormat.AUTO,
        description="`json`, one object per line; `console`, coloured; `auto`: console on a terminal only.",
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Where traces go: an OTLP/gRPC collector, `http://host:4317` or `https://…`. Not set: no traces "
        "are made, but a caller's trace context is still passed on.",
    )
    trace_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of new traces that are kept; a caller's own decision always wins. 0: none."
    )


class ClockSettings(Settings):
    """Business time (rule R3)."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_CLOCK_")

    test: bool = Field(
        False,
        validation_alias="CARILLON_TEST_CLOCK",
        description="`on`: the test clock's row in Postgres (origin and rate) drives business time, for trials and "
        "demos. `off`: the database's clock does. All services must agree.",
    )
    resync: Duration = Field(
        10 * SECOND,
        ge=100 * MILLISECOND,
        le=10 * MINUTE,
        description="How often the offset to the database's clock is measured again; quartz drifts under 1 ms in 10 s.",
    )


class LinkSettings(Settings):
    """The links between services (rule R2). Frames are up to 1,000 entries and 512 KiB; that is fixed."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_LINK_")

    sweep_interval: Duration = Field(
        SECOND, ge=10 * MILLISECOND, le=MINUTE, description="How often each process looks for frames without a receipt."
    )
    sweep_frames: int = Field(500, ge=1, le=10_000, description="Frames republished in one sweep at most (INV-9).")
    republish_after: Duration = Field(
        2 * SECOND,
        ge=50 * MILLISECOND,
        le=HOUR,
        description="How long a frame waits for its receipt before it is published again; doubled each time. Well "
        "above a normal round trip, which is milliseconds.",
    )
    republish_max: Duration = Field(
        MINUTE, ge=50 * MILLISECOND, le=DAY, description="The longest wait between two publications of one frame."
    )
    receipt_timeout: Duration = Field(
        10 * SECOND,
        ge=10 * MILLISECOND,
        le=10 * MINUTE,
        description="How long a caller waits for APPLIED at most, within its own deadline; then the answer is "
        "`accepted, not yet applied`.",
    )
    fetch_frames: int = Field(
        64, ge=1, le=1000, description="Frames a receiver takes at once, and applies in one transaction where it can."
    )
    max_unconfirmed_frames: int = Field(
        100_000,
        ge=1,
        le=100_000_000,
        description="Frames one link may hold without a receipt; then new commands are RESOURCE_EXHAUSTED (INV-9). At "
        "512 KiB each that is 50 GB at the very worst, and normally far below 1 GB.",
    )
    inbox_retention: Duration = Field(
        7 * DAY,
        ge=HOUR,
        le=365 * DAY,
        description="How long a receiver remembers the ids of frames it has applied. Must exceed any time after which "
        "a frame could still arrive: CARILLON_NATS_STREAM_MAX_AGE and restores of old backups.",
    )

    @model_validator(mode="after")
    def _backoff_grows(self) -> Self:
        if self.republish_after > self.republish_max:
            raise ValueError("republish_after must not be longer than republish_max")
        return self


class ShardSettings(Settings):
    """How the scheduler's entities are sliced."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_SHARD_")

    count: int = Field(
        64,
        ge=1,
        le=1024,
        validation_alias="CARILLON_SHARDS",
        description="Shards the entities are spread over, fixed at install and the same for all services. The upper limit "
        "of useful scheduler replicas; more shards mean smaller frames.",
    )
