"""The dispatcher's settings."""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from throttled.exceptions import BaseThrottledError
from throttled.rate_limiter.quota_parser import parse as parse_quota

from libs.service import BaseSettings
from libs.settings import CommaSeparated, Duration, Settings

MILLISECOND = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def _one_rate(value: str) -> str:
    """A rate as `throttled` reads it; ValueError for anything else, and for several."""
    try:
        is_rate = len(parse_quota(value)) == 1
    except BaseThrottledError:
        is_rate = False
    if not is_rate:
        raise ValueError("must be one rate, such as 14/s, 600/m or 14/s burst 50")
    return value


class DoubtPolicy(StrEnum):
    """What becomes of an attempt of which nobody knows whether it arrived."""

    RESEND = "resend"
    HOLD = "hold"


class DispatchSettings(Settings):
    """Deliveries: how many at once, how often, for how long."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_DISPATCHER_")

    claim_time: Duration = Field(
        30 * SECOND,
        ge=SECOND,
        le=HOUR,
        description="How long a process that was killed keeps what it was sending from the others, on the database's "
        "clock; then its attempts are in doubt. A living process renews its claims, so sending may take longer.",
    )
    claim_deliveries: int = Field(
        500, ge=1, le=5_000, description="Deliveries of one channel claimed in one transaction at most."
    )
    poll_interval: Duration = Field(
        250 * MILLISECOND,
        ge=MILLISECOND,
        le=250 * MILLISECOND,
        description="How often to look for deliveries that another replica took in; what this one took in is sent at "
        "once. Also how soon claims that ran out are noticed.",
    )
    record_linger: Duration = Field(
        5 * MILLISECOND,
        ge=timedelta(0),
        le=SECOND,
        description="How long a finished attempt waits for others to be recorded in the same transaction.",
    )
    drain_timeout: Duration = Field(
        15 * SECOND,
        ge=timedelta(0),
        le=10 * MINUTE,
        description="After SIGTERM: how long what is being sent may take to end and be recorded; the rest is in doubt. "
        "Below CARILLON_GRPC_DRAIN_TIMEOUT, which bounds the whole.",
    )
    max_attempts: int = Field(
        80,
        ge=1,
        le=1_000,
        description="Attempts before a delivery is dead. Redriving it allows as many again. Ordinary retries end by "
        "max_age before: two days hold 58 on average, and hardly ever 75. This ends what takes the process down each "
        "time.",
    )
    max_age: Duration = Field(
        2 * DAY,
        ge=SECOND,
        le=30 * DAY,
        description="A delivery is dead when its next attempt would be later than this.",
    )
    history_retention: Duration = Field(
        90 * DAY,
        ge=DAY,
        le=3650 * DAY,
        description="How long deliveries that were sent or ended otherwise are kept, with content and attempts, in "
        "business time; dead letters can be redriven for as long. What waits, is being sent or is held stays. Longer "
        "than CARILLON_LINK_INBOX_RETENTION: what is forgotten and comes in again would be sent again.",
    )
    backoff_first: Duration = Field(
        5 * SECOND,
        ge=MILLISECOND,
        le=DAY,
        description="Bound of the wait after the first failed attempt; it doubles with each. The wait itself is drawn "
        "at random below the bound (full jitter).",
    )
    backoff_longest: Duration = Field(
        2 * HOUR, ge=MILLISECOND, le=7 * DAY, description="Where the bound stops growing."
    )
    max_retry_after: Duration = Field(
        6 * HOUR, ge=timedelta(0), le=7 * DAY, description="A receiver's longer Retry-After is cut to this."
    )
    destination_concurrency: int = Field(
        32,
        ge=1,
        le=10_000,
        description="Attempts under way to one webhook host and port at once, so that a slow one holds up no other.",
    )
    email_concurrency: int = Field(
        32, ge=1, le=1_000, description="Mails under way at once, and so connections to the SMTP server, per process."
    )
    webhook_concurrency: int = Field(128, ge=1, le=10_000, description="Webhooks under way at once, per process.")
    email_in_doubt: DoubtPolicy = Field(
        DoubtPolicy.RESEND,
        description="A mail that may have gone out before a crash: `resend` it under the same Message-ID, by which "
        "most receivers drop the second copy, or `hold` it until somebody redrives it.",
    )
    webhook_in_doubt: DoubtPolicy = Field(
        DoubtPolicy.RESEND,
        description="The same for webhooks; their webhook-id is what receivers drop duplicates by.",
    )
    apprise_in_doubt: DoubtPolicy = Field(
        DoubtPolicy.RESEND,
        description="The same for Apprise, whose services have nothing to tell a second copy by: people see two.",
    )
    email_bounces: int = Field(
        1,
        ge=0,
        le=1_000,
        description="How often in a row the mail server must say that an address does not exist (5.1.0, 5.1.1, 5.1.2, "
        "5.1.3, 5.1.6, 5.1.10, 5.2.1; never 4xx, policy, or a 5xx without such a code) before it is suppressed as "
        "`bounced`, for mandatory mails too. A mail that is taken starts the count again. 0: never.",
    )

    @model_validator(mode="after")
    def _backoff_grows(self) -> Self:
        if self.backoff_first > self.backoff_longest:
            raise ValueError("backoff_first must not be longer than backoff_longest")
        return self


class TrafficSettings(Settings):
    """Deliveries: how fast, and when a destination is left alone. Every replica keeps its own books."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_DISPATCHER_TRAFFIC_")

    email_rate: str = Field(
        "",
        description="Mails a process may send: `14/s`, `600/m`, `10000/h`, `14/s burst 50`. Empty: as fast as it goes. "
        "N replicas send N times as many. What is above it waits in the queue, in its order.",
    )
    webhook_rate: str = Field("", description="The same for all webhooks together.")
    apprise_rate: str = Field("", description="The same for everything that leaves through Apprise.")
    destination_rate: str = Field(
        "",
        description="The same for each webhook host and port, and each Apprise address. What is above it is put off "
        "until its turn, which costs no attempt; HIGH priority does not stand in line.",
    )
    breaker_failures: int = Field(
        5,
        ge=0,
        le=10_000,
        description="Failures in a row of one destination (the SMTP server, a webhook's host and port, an Apprise "
        "address) after which it is left alone: connections, TLS and passwords that fail, timeouts, 5xx of webhooks; "
        "never what it says of one message. What is queued for it is parked and costs no attempts. 0: never.",
    )
    breaker_open: Duration = Field(
        30 * SECOND,
        ge=10 * MILLISECOND,
        le=DAY,
        description="For how long; then one attempt decides. Each failure of that one doubles it. Longer where the "
        "destination asks for it (Retry-After), up to breaker_open_longest.",
    )
    breaker_open_longest: Duration = Field(
        10 * MINUTE,
        ge=10 * MILLISECOND,
        le=DAY,
        description="Where doubling stops: how long a destination that works again may go unnoticed.",
    )
    destinations: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Destinations with a rate or with failures that a process remembers; of more, the least recent "
        "are forgotten.",
    )

    @field_validator("email_rate", "webhook_rate", "apprise_rate", "destination_rate")
    @classmethod
    def _is_one_rate(cls, value: str) -> str:
        return value and _one_rate(value)


class SmtpTls(StrEnum):
    """How the way to the SMTP server is protected."""

    NONE = "none"
    OPPORTUNISTIC = "opportunistic"
    STARTTLS = "starttls"
    TLS = "tls"


class SmtpSettings(Settings):
    """The SMTP server that mails leave through."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_DISPATCHER_SMTP_")

    host: str = Field("127.0.0.1", min_length=1, description="Where it is.")
    port: int = Field(587, ge=1, le=65535, description="Its port: 587 with starttls, 465 with tls, 25 for relays.")
    tls: SmtpTls = Field(
        SmtpTls.STARTTLS,
        description="`starttls`: upgrade or fail; `tls`: from the first byte; `opportunistic`: upgrade where offered; "
        "`none`: plaintext.",
    )
    ca_file: Path | None = Field(
        None, description="PEM with the CAs that may sign its certificate. Not set: the system's."
    )
    username: str | None = Field(None, min_length=1, description="User name, where it asks for one.")
    password_file: Path | None = Field(
        None, description="A file with the password; read for each connection, so it can be replaced."
    )
    from_address: str = Field(
        "carillon@localhost",
        pattern=r"^[^@\s<>\"]+@[^@\s<>\"]+$",
        description="Sender of all mails: a bare address. Its domain is also that of Message-IDs and EHLO.",
    )
    from_name: str = Field("", max_length=100, description="Name shown with from_address.")
    timeout: Duration = Field(
        30 * SECOND,
        ge=100 * MILLISECOND,
        le=10 * MINUTE,
        description="How long one mail may take, connecting included. After it the attempt is over, and in doubt when "
        "the mail had been handed over already.",
    )
    connection_idle: Duration = Field(
        30 * SECOND,
        ge=timedelta(0),
        le=10 * MINUTE,
        description="An unused connection is closed after this. Below the server's own limit, commonly minutes.",
    )
    connection_mails: int = Field(
        100,
        ge=1,
        le=100_000,
        description="Mails sent over one connection before it is replaced; many servers limit it.",
    )

    @model_validator(mode="after")
    def _password_is_protected(self) -> Self:
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file must be set together")
        if self.username is not None and self.tls in (SmtpTls.NONE, SmtpTls.OPPORTUNISTIC):
            raise ValueError("a password is only sent over tls or starttls")
        return self


class WebhookSettings(Settings):
    """Webhooks: who may be called, and how we sign."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_DISPATCHER_WEBHOOK_")

    secret_file: Path | None = Field(
        None,
        description="A file with the signing secrets of Standard Webhooks: YAML or JSON with a list of `whsec_…` for "
        "each tenant (`shop: [whsec_…]`), where `'*'` stands for all that it does not name; or, where there is one "
        "tenant or all trust each other, one `whsec_…` a line for everybody. Every secret of a tenant signs, so a new "
        "one can be added before the old one is taken away. Read again when it changes. Not set, or nothing for a "
        "tenant: its webhooks are not signed, and receivers cannot know whom they are from.",
    )
    allow_private: bool = Field(
        False,
        description="`on`: loopback, private and link-local addresses may be called. Off, because whoever subscribes a "
        "webhook would otherwise reach into this network; `on` for trials on one machine.",
    )
    ca_file: Path | None = Field(
        None, description="PEM with the CAs that may sign receivers' certificates. Not set: the system's."
    )
    timeout: Duration = Field(
        15 * SECOND,
        ge=100 * MILLISECOND,
        le=10 * MINUTE,
        description="How long one call may take, connecting and reading the answer included.",
    )
    connect_timeout: Duration = Field(
        5 * SECOND, ge=50 * MILLISECOND, le=MINUTE, description="How long connecting may take, TLS included."
    )
    connection_idle: Duration = Field(
        15 * SECOND, ge=timedelta(0), le=10 * MINUTE, description="An unused connection is closed after this."
    )


class AppriseSettings(Settings):
    """Everything else: chats, pushes and texts through Apprise (https://github.com/caronc/apprise)."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_DISPATCHER_APPRISE_")

    schemas: CommaSeparated = Field(
        ("discord", "gchat", "opsgenie", "pagerduty", "pover", "slack", "tgram", "twilio", "webex"),
        description="Which of Apprise's services may be used, by the schema of their URLs. Those here lead to fixed "
        "hosts on the public internet. Ones with a host in the URL (json, gotify, ntfy, mailto, …) let whoever chooses "
        "an address reach into this network, and local ones (syslog, dbus, …) this machine: allow them only where "
        "you trust everybody who may put a subscriber. Empty: the channel is off.",
    )
    timeout: Duration = Field(
        30 * SECOND,
        ge=100 * MILLISECOND,
        le=10 * MINUTE,
        description="How long one notification may take; after it the attempt is over, and in doubt.",
    )
    concurrency: int = Field(
        16, ge=1, le=256, description="Notifications under way at once, and so threads, per process."
    )


class UnsubscribeSettings(Settings):
    """One-click unsubscribe (RFC 8058): a public page, and headers that lead there."""

    model_config = SettingsConfigDict(env_prefix="CARILLON_DISPATCHER_UNSUBSCRIBE_")

    base_url: str = Field(
        "",
        max_length=160,
        pattern=r"^(https://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?)?$",
        description="Where readers reach the page: https, as RFC 8058 asks for. Something in front of it ends TLS and "
        "passes requests on to host and port. Empty: off; mails have no List-Unsubscribe.",
    )
    secret_file: Path | None = Field(
        None,
        description="A file with the secrets that tokens are signed with, one a line, at least 32 bytes each. The "
        "first signs, all are believed; put a new one in front, and leave the old ones for as long as their mails "
        "should work: a year at least. Read again when it changes. Needed where base_url is set.",
    )
    mailto: str = Field(
        "",
        max_length=254,
        pattern=r"^([^@\s<>\",?&]+@[^@\s<>\",?&]+)?$",
        description="A mailbox that readers may write to instead, as List-Unsubscribe's second way. Nobody here reads "
        "it: whoever does puts suppressions. Empty: none.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address that the page listens on.")
    port: int = Field(
        8080, ge=0, le=65535, description="Port that the page listens on. 0: a free one, which is logged."
    )
    rate: str = Field(
        "100/s burst 200",
        description="Requests that a process answers, whoever they come from: `100/s burst 200`. Those above get 429. "
        "Limits for each client are for what stands in front.",
    )
    timeout: Duration = Field(
        5 * SECOND,
        ge=50 * MILLISECOND,
        le=MINUTE,
        description="How long one unsubscribe may take, reading it included.",
    )

    @field_validator("rate")
    @classmethod
    def _is_one_rate(cls, value: str) -> str:
        return _one_rate(value)

    @model_validator(mode="after")
    def _can_sign(self) -> Self:
        if self.base_url and self.secret_file is None:
            raise ValueError("secret_file must be set together with base_url")
        return self


@dataclass(frozen=True)
class DispatcherSettings(BaseSettings):
    """Everything the dispatcher reads from the environment."""

    dispatch: DispatchSettings
    traffic: TrafficSettings
    smtp: SmtpSettings
    webhook: WebhookSettings
    apprise: AppriseSettings
    unsubscribe: UnsubscribeSettings
