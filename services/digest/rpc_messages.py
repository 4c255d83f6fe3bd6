"""Between the contract's messages and the catalog's values, with every check a request needs.

What a later release builds is refused here by name, never taken and ignored.
"""

from datetime import UTC, datetime, timedelta

from carillon.digest.v1 import digest_pb2 as pb

from libs.conditions import BadCondition
from libs.errors import Violations
from libs.recurrence import BadRule, check_rule, next_after
from libs.wire import check_count, check_duration, check_enum, check_number, check_text, check_zone, to_duration
from services.digest.catalog import (
    DEFAULT_RETENTION,
    IMMEDIATE,
    OFF,
    Aligned,
    Cadence,
    Channel,
    Choice,
    External,
    Format,
    NotificationType,
    Rolling,
    Style,
    Subscriber,
    Subscription,
    Template,
    rule_of,
)
from services.digest.filters import compile_filter
from services.digest.payload_schemas import BadSchema, compiled
from services.digest.rpc_quiet import from_quiet_hours, quiet_hours

_ID = r"[a-z0-9._/-]+"
_ID_WORDS = "lower-case letters, digits and . _ / -"
_LATER = "is not built yet; leave it empty"
_MAX_BODY_BYTES = 256 * 1024
_LONGEST_ROLLING = timedelta(days=30)
_MOST_ITEMS = 100_000
_FIRST_CHECKED = datetime(2026, 1, 1, tzinfo=UTC)

_BUILT_IN = (IMMEDIATE, OFF)


def check_type_id(v: Violations, field: str, value: str) -> str:
    """A notification type's id."""
    return check_text(v, field, value, longest=128, pattern=_ID, described_as=_ID_WORDS)


def check_name(v: Violations, field: str, value: str, *, longest: int = 256) -> str:
    """Any one-line id that callers choose, such as a subscriber's."""
    return check_text(v, field, value, longest=longest, pattern=r"[^\t\r\n]+", described_as="one line")


# Notification types


def notification_type(v: Violations, field: str, one: pb.NotificationType) -> NotificationType:
    """A checked type."""
    default = one.default_cadence or IMMEDIATE
    if one.is_mandatory and default == OFF:
        v.add(f"{field}.default_cadence", "must not be off for a mandatory type")
    return NotificationType(
        id=check_type_id(v, f"{field}.id", one.id),
        name=check_name(v, f"{field}.name", one.name, longest=200),
        description=check_text(v, f"{field}.description", one.description, shortest=0, longest=1000),
        default_cadence=check_type_id(v, f"{field}.default_cadence", default),
        default_channel=_channel(v, f"{field}.default_channel", one.default_channel) or Channel.EMAIL,
        is_mandatory=one.is_mandatory,
        payload_schema=_payload_schema(v, f"{field}.payload_schema", one.payload_schema),
        retention=_retention(v, f"{field}.retention", one) or DEFAULT_RETENTION,
    )


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
    )


# Subscribers


def subscriber(v: Violations, field: str, one: pb.Subscriber) -> Subscriber:
    """A checked subscriber."""
    if one.apprise_url:
        v.add(f"{field}.apprise_url", _LATER)
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
        quiet_hours=quiet_hours(v, f"{field}.quiet_hours", one.quiet_hours, channel=_channel),
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
    channel = _channel(v, f"{field}.channel", one.channel)
    text_format = _format(v, f"{field}.format", one.format)
    # Otherwise the dispatcher could find nothing in the message that it can send.
    if text_format and not one.channel:
        v.add(f"{field}.channel", "must be given together with format")
    if channel is Channel.WEBHOOK and text_format not in (None, Format.JSON):
        v.add(f"{field}.format", "must be FORMAT_JSON or unspecified for CHANNEL_WEBHOOK")
    if channel is Channel.EMAIL and text_format is Format.JSON:
        v.add(f"{field}.format", "must be FORMAT_HTML, FORMAT_TEXT or unspecified for CHANNEL_EMAIL")
    return Choice(
        cadence=check_type_id(v, f"{field}.cadence", one.cadence),
        channel=channel,
        format=text_format,
        style=_style(v, f"{field}.style", one.style),
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


# Cadences


def cadence(v: Violations, field: str, one: pb.Cadence) -> Cadence:
    """A checked cadence. Whether an aligned one ever occurs takes a while to find out: `check_occurs`."""
    checked_id = check_type_id(v, f"{field}.id", one.id)
    if checked_id in _BUILT_IN:
        v.add(f"{field}.id", f"must not be {checked_id}, which always exists")
    kind: Aligned | Rolling | External = External(batch="")
    match one.WhichOneof("kind"):
        case "aligned":
            kind = _aligned(v, f"{field}.aligned", one.aligned)
        case "external":
            kind = _external(v, f"{field}.external", one.external)
        case "rolling":
            kind = _rolling(v, f"{field}.rolling", one.rolling)
        case _:
            v.add(field, "must have exactly one of aligned, rolling, external")
    return Cadence(id=checked_id, name=_optional_line(v, f"{field}.name", one.name, 200), kind=kind)


def _aligned(v: Violations, field: str, one: pb.AlignedCadence) -> Aligned:
    if one.zone:
        check_zone(v, f"{field}.zone", one.zone)
    if one.WhichOneof("rule") is None:
        v.add(field, "must have exactly one of cron and rrule")
    elif one.WhichOneof("rule") == "cron":
        check_text(v, f"{field}.cron", one.cron, longest=256)
    else:
        check_text(v, f"{field}.rrule", one.rrule, longest=256)
        _check_endless(v, f"{field}.rrule", one.rrule)
    return Aligned(cron=one.cron, rrule=one.rrule, zone=one.zone)


def _check_endless(v: Violations, field: str, rrule: str) -> None:
    parts = dict(part.partition("=")[::2] for part in rrule.upper().removeprefix("RRULE:").split(";"))
    if parts.keys() & {"UNTIL", "COUNT"}:
        v.add(field, "must not end: UNTIL and COUNT are for schedules, not for cadences")
    if parts.get("FREQ", "").strip() in {"HOURLY", "MINUTELY", "SECONDLY"}:
        v.add(field, "must not repeat more often than DAILY; use cron")


def check_occurs(v: Violations, field: str, one: Aligned) -> None:
    """Record a rule that cannot be read, or has no next time. May take a second for one that never has."""
    rule = rule_of(one.cron, one.rrule, one.zone or "UTC")
    try:
        check_rule(rule)
        if next_after(rule, _FIRST_CHECKED) is None:
            v.add(f"{field}.{'cron' if one.cron else 'rrule'}", "never occurs")
    except BadRule as err:
        v.add(f"{field}.{err.field}", str(err))


def _rolling(v: Violations, field: str, one: pb.RollingCadence) -> Rolling:
    bounds = {"least": timedelta(seconds=1), "most": _LONGEST_ROLLING}
    duration = check_duration(v, f"{field}.duration", one.duration, **bounds) or timedelta(seconds=1)
    extension = check_duration(v, f"{field}.extension", one.extension, **bounds) if one.HasField("extension") else None
    cap: timedelta | None = None
    if one.HasField("cap"):
        cap = check_duration(v, f"{field}.cap", one.cap, least=duration, most=4 * _LONGEST_ROLLING)
    return Rolling(
        duration=duration,
        extension=extension,
        cap=cap,
        maximum_items=check_number(v, f"{field}.maximum_items", one.maximum_items, least=0, most=_MOST_ITEMS),
        is_leading=one.is_leading,
    )


def _external(v: Violations, field: str, one: pb.ExternalCadence) -> External:
    fallback: timedelta | None = None
    if one.HasField("fallback_after"):
        bounds = {"least": timedelta(minutes=1), "most": timedelta(days=90)}
        fallback = check_duration(v, f"{field}.fallback_after", one.fallback_after, **bounds)
    return External(
        batch=check_text(
            v,
            f"{field}.batch",
            one.batch,
            longest=64,
            pattern=r"[a-z0-9._-]+",
            described_as="lower-case letters, digits and . _ -",
        ),
        fallback_after=fallback or timedelta(days=2),
    )


def from_cadence(one: Cadence) -> pb.Cadence:
    """As the contract has it."""
    match one.kind:
        case Aligned(cron=cron, rrule=rrule, zone=zone):
            aligned = pb.AlignedCadence(cron=cron, zone=zone) if cron else pb.AlignedCadence(rrule=rrule, zone=zone)
            return pb.Cadence(id=one.id, name=one.name, aligned=aligned)
        case External(batch=batch, fallback_after=fallback_after):
            external = pb.ExternalCadence(batch=batch, fallback_after=to_duration(fallback_after))
            return pb.Cadence(id=one.id, name=one.name, external=external)
        case Rolling(duration=duration, extension=extension, cap=cap):
            rolling = pb.RollingCadence(
                duration=to_duration(duration),
                extension=to_duration(extension) if extension else None,
                cap=to_duration(cap) if cap else None,
                maximum_items=one.kind.maximum_items,
                is_leading=one.kind.is_leading,
            )
            return pb.Cadence(id=one.id, name=one.name, rolling=rolling)


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
        subject=_optional_line(v, f"{field}.subject", one.subject, 1000),
        body=one.body,
    )


def template_key(
    v: Violations, prefix: str, one: pb.Template | pb.GetTemplateRequest | pb.DeleteTemplateRequest
) -> tuple[str, str, str, str]:
    """What a template is found by; unspecified means HTML and full."""
    one_id = check_text(v, f"{prefix}id", one.id, longest=256, pattern=_ID, described_as=_ID_WORDS)
    text_format = _format(v, f"{prefix}format", one.format) or Format.HTML
    style = _style(v, f"{prefix}style", one.style) or Style.FULL
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


# Words


def to_channel(channel: Channel) -> pb.Channel.ValueType:
    """As the contract has it."""
    return pb.Channel.Value(f"CHANNEL_{channel.name}")


def to_format(text_format: Format) -> pb.Format.ValueType:
    """As the contract has it."""
    return pb.Format.Value(f"FORMAT_{text_format.name}")


def to_style(style: Style) -> pb.Style.ValueType:
    """As the contract has it."""
    return pb.Style.Value(f"STYLE_{style.name}")


def _channel(v: Violations, field: str, value: int) -> Channel | None:
    if value == pb.CHANNEL_APPRISE:
        v.add(field, "cannot be CHANNEL_APPRISE, which is not built yet")
        return None
    name = _enum_name(v, field, value, pb.Channel)
    return Channel[name] if name else None


def _format(v: Violations, field: str, value: int) -> Format | None:
    name = _enum_name(v, field, value, pb.Format)
    return Format[name] if name else None


def _style(v: Violations, field: str, value: int) -> Style | None:
    name = _enum_name(v, field, value, pb.Style)
    return Style[name] if name else None


def _enum_name(
    v: Violations, field: str, value: int, enum: "type[pb.Channel] | type[pb.Format] | type[pb.Style]"
) -> str:
    """The value's name without its prefix; empty for unspecified and for what is no value, which is recorded."""
    if value == 0 or check_enum(v, field, value, enum, default=-1) == -1:
        return ""
    return enum.Name(value).partition("_")[2]  # type: ignore[arg-type]  # It is one of the values: just checked.


def check_locale(v: Violations, field: str, value: str) -> str:
    pattern = r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*"
    return check_text(v, field, value, longest=35, pattern=pattern, described_as="a BCP 47 tag such as en or de-AT")


def _optional_line(v: Violations, field: str, value: str, longest: int) -> str:
    return check_text(v, field, value, shortest=0, longest=longest, pattern=r"[^\t\r\n]+", described_as="one line")
