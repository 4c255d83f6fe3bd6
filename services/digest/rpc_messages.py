"""Types, subscribers, subscriptions and templates between the contract's messages and the catalog's values, checked.

What a later release builds is refused here by name, never taken and ignored.
"""

from datetime import timedelta

from carillon.digest.v1 import digest_pb2 as pb

from libs.conditions import BadCondition
from libs.errors import Violations
from libs.wire import check_count, check_duration, check_text, check_zone, to_duration
from services.digest.catalog import (
    DEFAULT_RETENTION,
    IMMEDIATE,
    OFF,
    Channel,
    Choice,
    Format,
    NotificationType,
    Style,
    Subscriber,
    Subscription,
    Template,
)
from services.digest.filters import compile_filter
from services.digest.payload_schemas import BadSchema, compiled
from services.digest.rpc_quiet import from_quiet_hours, quiet_hours
from services.digest.rpc_words import (
    ID,
    ID_WORDS,
    check_channel,
    check_format,
    check_locale,
    check_name,
    check_optional_line,
    check_style,
    check_type_id,
    to_channel,
    to_format,
    to_style,
)

_MAX_BODY_BYTES = 256 * 1024


# Notification types


def notification_type(
    v: Violations, field: str, one: pb.NotificationType, *, services: frozenset[str]
) -> NotificationType:
    """A checked type; `services` are those that may format its items."""
    default = one.default_cadence or IMMEDIATE
    if one.is_mandatory and default == OFF:
        v.add(f"{field}.default_cadence", "must not be off for a mandatory type")
    return NotificationType(
        id=check_type_id(v, f"{field}.id", one.id),
        name=check_name(v, f"{field}.name", one.name, longest=200),
        description=check_text(v, f"{field}.description", one.description, shortest=0, longest=1000),
        default_cadence=check_type_id(v, f"{field}.default_cadence", default),
        default_channel=check_channel(v, f"{field}.default_channel", one.default_channel) or Channel.EMAIL,
        is_mandatory=one.is_mandatory,
        payload_schema=_payload_schema(v, f"{field}.payload_schema", one.payload_schema),
        retention=_retention(v, f"{field}.retention", one) or DEFAULT_RETENTION,
        formatting_service=_service(v, f"{field}.formatting_service", one.formatting_service, services),
    )


def _service(v: Violations, field: str, name: str, services: frozenset[str]) -> str:
    if name and name not in services:
        known = ", ".join(sorted(services)) or "none is"
        v.add(field, f"{name[:64]!r} is not registered with digest ({known})")
    return name


def _retention(v: Violations, field: str, one: pb.NotificationType) -> timedelta | None:
    if not one.HasField("retention"):
        return None
    return check_duration(v, field, one.retention, least=timedelta(days=1), most=timedelta(days=3650))


def _payload_schema(v: Violations, field: str, text: str) -> str:
    if text:
        try:
            compiled(text)
        except BadSchema as err:
            v.add(field, str(err))
    return text


def from_type(one: NotificationType) -> pb.NotificationType:
    """As the contract has it."""
    return pb.NotificationType(
        id=one.id,
        name=one.name,
        description=one.description,
        default_cadence=one.default_cadence,
        default_channel=to_channel(one.default_channel),
        is_mandatory=one.is_mandatory,
        payload_schema=one.payload_schema,
        retention=to_duration(one.retention),
        formatting_service=one.formatting_service,
    )


# Subscribers


def subscriber(v: Violations, field: str, one: pb.Subscriber) -> Subscriber:
    """A checked subscriber."""
    zone, locale = one.zone or "UTC", one.locale or "en"
    check_zone(v, f"{field}.zone", zone)
    addresses = {
        "email": (254, r"[^@\s]+@[^@\s]+", "an email address"),
        "webhook_url": (2048, r"https?://\S+", "an http(s) URL"),
        "apprise_url": (2048, r"[a-zA-Z][a-zA-Z0-9+.-]*://\S+", "an Apprise URL"),
    }
    checked = {
        name: check_text(
            v, f"{field}.{name}", getattr(one, name), shortest=0, longest=longest, pattern=pattern, described_as=words
        )
        for name, (longest, pattern, words) in addresses.items()
    }
    return Subscriber(
        id=check_name(v, f"{field}.id", one.id),
        zone=zone,
        locale=check_locale(v, f"{field}.locale", locale),
        quiet_hours=quiet_hours(v, f"{field}.quiet_hours", one.quiet_hours, channel=check_channel),
        **checked,
    )


def from_subscriber(one: Subscriber) -> pb.Subscriber:
    """As the contract has it."""
    return pb.Subscriber(
        id=one.id,
        zone=one.zone,
        locale=one.locale,
        email=one.email,
        webhook_url=one.webhook_url,
        apprise_url=one.apprise_url,
        quiet_hours=map(from_quiet_hours, one.quiet_hours),
    )


# Subscriptions


def subscription(v: Violations, field: str, one: pb.Subscription) -> Subscription:
    """A checked subscription; whether subscriber and cadences exist is the store's to say."""
    if one.filter:
        _check_filter(v, f"{field}.filter", one.filter)
    check_count(v, f"{field}.choices", one.choices, most=8)
    choices = [_choice(v, f"{field}.choices[{number}]", choice) for number, choice in enumerate(one.choices[:8])]
    if len(set(choices)) < len(choices):
        v.add(f"{field}.choices", "must not name the same choice twice")
    return Subscription(
        id=check_name(v, f"{field}.id", one.id),
        subscriber=check_name(v, f"{field}.subscriber", one.subscriber),
        type=check_text(
            v,
            f"{field}.type",
            one.type,
            longest=128,
            pattern=r"[a-z0-9._/-]+\*?|\*",
            described_as="a type id, or a prefix with * at its end",
        ),
        topic=check_text(
            v, f"{field}.topic", one.topic, shortest=0, longest=256, pattern=r"[^\t\r\n]+", described_as="one line"
        ),
        choices=tuple(choices),
        filter=one.filter,
    )


def _check_filter(v: Violations, field: str, text: str) -> None:
    if "\x00" in text:
        v.add(field, "must not hold NUL")
        return
    try:
        compile_filter(text)
    except BadCondition as err:
        v.add(field, str(err))


def _choice(v: Violations, field: str, one: pb.Choice) -> Choice:
    channel = check_channel(v, f"{field}.channel", one.channel)
    text_format = check_format(v, f"{field}.format", one.format)
    # Otherwise the dispatcher could find nothing in the message that it can send.
    if text_format and not one.channel:
        v.add(f"{field}.channel", "must be given together with format")
    if channel is Channel.WEBHOOK and text_format not in (None, Format.JSON):
        v.add(f"{field}.format", "must be FORMAT_JSON or unspecified for CHANNEL_WEBHOOK")
    if channel is Channel.APPRISE and text_format not in (None, Format.TEXT):
        v.add(f"{field}.format", "must be FORMAT_TEXT or unspecified for CHANNEL_APPRISE")
    if channel is Channel.EMAIL and text_format is Format.JSON:
        v.add(f"{field}.format", "must be FORMAT_HTML, FORMAT_TEXT or unspecified for CHANNEL_EMAIL")
    return Choice(
        cadence=check_type_id(v, f"{field}.cadence", one.cadence),
        channel=channel,
        format=text_format,
        style=check_style(v, f"{field}.style", one.style),
    )


def from_subscription(one: Subscription) -> pb.Subscription:
    """As the contract has it."""
    choices = [
        pb.Choice(
            cadence=choice.cadence,
            channel=to_channel(choice.channel) if choice.channel else pb.CHANNEL_UNSPECIFIED,
            format=to_format(choice.format) if choice.format else pb.FORMAT_UNSPECIFIED,
            style=to_style(choice.style) if choice.style else pb.STYLE_UNSPECIFIED,
        )
        for choice in one.choices
    ]
    return pb.Subscription(
        id=one.id,
        subscriber=one.subscriber,
        type=one.type,
        topic=one.topic,
        choices=choices,
        filter=one.filter,
    )


# Templates


def template(v: Violations, field: str, one: pb.Template) -> Template:
    """A checked template; whether it compiles is the press's to say."""
    body_bytes = len(one.body.encode())
    if not 0 < body_bytes <= _MAX_BODY_BYTES:
        v.add(f"{field}.body", f"must be 1-{_MAX_BODY_BYTES:,} bytes, got {body_bytes:,}")
    if "\x00" in one.body:
        v.add(f"{field}.body", "must not hold NUL")
    one_id, text_format, style, locale = template_key(v, f"{field}.", one)
    return Template(
        id=one_id,
        format=Format(text_format),
        style=Style(style),
        locale=locale,
        subject=check_optional_line(v, f"{field}.subject", one.subject, 1000),
        body=one.body,
    )


def template_key(
    v: Violations, prefix: str, one: pb.Template | pb.GetTemplateRequest | pb.DeleteTemplateRequest
) -> tuple[str, str, str, str]:
    """What a template is found by; unspecified means HTML and full."""
    one_id = check_text(v, f"{prefix}id", one.id, longest=256, pattern=ID, described_as=ID_WORDS)
    text_format = check_format(v, f"{prefix}format", one.format) or Format.HTML
    style = check_style(v, f"{prefix}style", one.style) or Style.FULL
    locale = check_locale(v, f"{prefix}locale", one.locale) if one.locale else ""
    return one_id, text_format.value, style.value, locale


def from_template(one: Template) -> pb.Template:
    """As the contract has it."""
    return pb.Template(
        id=one.id,
        format=to_format(one.format),
        style=to_style(one.style),
        locale=one.locale,
        subject=one.subject,
        body=one.body,
    )
