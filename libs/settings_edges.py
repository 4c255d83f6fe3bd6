"""The settings of a service's edges: gRPC, HTTP, authentication, telemetry. Import them from `libs.settings`."""

from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from libs.settings_base import DAY, HOUR, MILLISECOND, MINUTE, SECOND, CommaSeparated, Duration, Settings

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
    tls_cert_file: Path | None = Field(
        None,
        description="PEM with the server's certificate chain. Read anew when it was replaced, for new connections. "
        "Not set: plaintext.",
    )
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
        description="After SIGTERM: how long calls and tasks in progress may take to end before they are cancelled, "
        "drain_delay included. Below Kubernetes' default grace period of 30 s. 0s: cancel at once.",
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
        if self.drain_delay > self.drain_timeout:
            raise ValueError("drain_delay must not be longer than drain_timeout, which it is part of")
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
    jwt_operators: CommaSeparated = Field(
        (),
        description="Subjects (claim `sub`) with the role operator, comma separated: tokens of Kubernetes carry no "
        "roles, so name service accounts, `system:serviceaccount:<namespace>:<name>`.",
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
