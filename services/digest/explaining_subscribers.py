"""What somebody is told, when, and by what, in sentences for people. Pure."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from zoneinfo import ZoneInfo

from services.digest.catalog import IMMEDIATE, OFF, Channel, Subscriber, WindowKind
from services.digest.explaining_windows import ADDRESSES, quiet_words
from services.digest.quiet import quiet_until
from services.digest.stories import Facts, KnownCadence, KnownChoice, Told, counted, cut, quoted

NextClose = Callable[[KnownCadence, str], datetime | None]
"""When windows of an aligned cadence close next for somebody in a zone; None: never again."""


def of_subscriber(
    one: Subscriber, choices: Sequence[KnownChoice], facts: Facts, next_close: NextClose
) -> Iterator[Told]:
    """How somebody can be reached, when not, and what each subscription means now."""
    addresses = [what for channel, what in ADDRESSES.items() if channel != Channel.LOG and one.address(channel)]
    reached = (
        f"has {_joined(addresses)}" if addresses else "has no address, and so gets nothing but what goes to the log"
    )
    yield Told(
        at=facts.now,
        kind="subscriber",
        sentence=cut(f"{one.id} {reached}, and lives in the zone {one.zone}."),
        details={"subscriber": one.id, "zone": one.zone, "locale": one.locale},
    )
    if one.quiet_hours:
        yield _quiet(one, facts)
    for choice in choices:
        yield _of_choice(one, choice, facts, next_close)


def _quiet(one: Subscriber, facts: Facts) -> Told:
    ends = {channel: quiet_until(one.quiet_hours, ZoneInfo(one.zone), channel, facts.now) for channel in Channel}
    quiet = {channel: until for channel, until in ends.items() if until is not None and one.address(channel)}
    ends_on = "; ".join(f"{channel} until {facts.when(until, one.id)}" for channel, until in quiet.items())
    now = f"quiet now: {ends_on}" if ends_on else "not quiet now"
    return Told(
        at=facts.now,
        kind="quiet_hours",
        sentence=cut(f"Quiet hours of {one.id} are {quiet_words(one.quiet_hours)}; it is {now}."),
        details={"subscriber": one.id} | {f"quiet_until_{name}": at.isoformat() for name, at in quiet.items()},
    )


def _of_choice(one: Subscriber, choice: KnownChoice, facts: Facts, next_close: NextClose) -> Told:
    topic = f", by the topic {choice.topic}" if choice.topic else ""
    channel = f", by {choice.channel}" if choice.channel else ""
    only = f" What the filter says no to is left out: {quoted(choice.filter)}" if choice.filter else ""
    words, at = _how_often(one, choice, facts, next_close)
    return Told(
        at=at or facts.now,
        kind="subscription",
        sentence=cut(f"Of {choice.type}{topic}, {one.id} is told {words}{channel}.{only}"),
        details={"subscriber": one.id, "subscription": choice.subscription, "cadence": choice.cadence},
        is_expected=at is not None,
    )


def _how_often(
    one: Subscriber, choice: KnownChoice, facts: Facts, next_close: NextClose
) -> tuple[str, datetime | None]:
    if choice.cadence == OFF:
        return "nothing, unless the type is mandatory", None
    if choice.cadence == IMMEDIATE:
        return "at once", None
    cadence = facts.cadences.get(choice.cadence)
    if cadence is None:
        return f"nothing, because the cadence {choice.cadence} does not exist", None
    name = f"in the digest {cadence.name or cadence.id}"
    match cadence.kind:
        case WindowKind.EXTERNAL:
            return f"{name}, when the batch {cadence.batch} is triggered", None
        case WindowKind.ROLLING:
            minutes = f"{cadence.duration.total_seconds() / 60:g} minutes" if cadence.duration else "some time"
            full = f", or {counted(cadence.maximum_items, 'item')}" if cadence.maximum_items else ""
            return f"{name}, {minutes} after the first item{full}", None
    at = next_close(cadence, one.zone)
    if at is None:
        return f"nothing, because the cadence {cadence.name or cadence.id} has no next time", None
    return f"{name}, next on {facts.when(at, one.id)}", at


def _joined(names: Sequence[str]) -> str:
    named = [f"{'an' if name[0] in 'aeA' else 'a'} {name}" for name in names]
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
