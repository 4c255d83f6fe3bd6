"""The words that the contract's messages share: ids, names, languages, channels, formats, styles."""

from carillon.digest.v1 import digest_pb2 as pb

from libs.errors import Violations
from libs.wire import check_enum, check_text
from services.digest.catalog import Channel, Format, Style

ID = r"[a-z0-9._/-]+"
ID_WORDS = "lower-case letters, digits and . _ / -"


def check_type_id(v: Violations, field: str, value: str) -> str:
    """A notification type's id."""
    return check_text(v, field, value, longest=128, pattern=ID, described_as=ID_WORDS)


def check_name(v: Violations, field: str, value: str, *, longest: int = 256) -> str:
    """Any one-line id that callers choose, such as a subscriber's."""
    return check_text(v, field, value, longest=longest, pattern=r"[^\t\r\n]+", described_as="one line")


def to_channel(channel: Channel) -> pb.Channel.ValueType:
    """As the contract has it."""
    return pb.Channel.Value(f"CHANNEL_{channel.name}")


def to_format(text_format: Format) -> pb.Format.ValueType:
    """As the contract has it."""
    return pb.Format.Value(f"FORMAT_{text_format.name}")


def to_style(style: Style) -> pb.Style.ValueType:
    """As the contract has it."""
    return pb.Style.Value(f"STYLE_{style.name}")


def check_channel(v: Violations, field: str, value: int) -> Channel | None:
    """The channel; None for unspecified, and for what cannot be, which is recorded. As are the two below."""
    name = _enum_name(v, field, value, pb.Channel)
    return Channel[name] if name else None


def check_format(v: Violations, field: str, value: int) -> Format | None:
    """See check_channel."""
    name = _enum_name(v, field, value, pb.Format)
    return Format[name] if name else None


def check_style(v: Violations, field: str, value: int) -> Style | None:
    """See check_channel."""
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
    """A language tag."""
    pattern = r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*"
    return check_text(v, field, value, longest=35, pattern=pattern, described_as="a BCP 47 tag such as en or de-AT")


def check_optional_line(v: Violations, field: str, value: str, longest: int) -> str:
    """A line for people; may be empty."""
    return check_text(v, field, value, shortest=0, longest=longest, pattern=r"[^\t\r\n]+", described_as="one line")
