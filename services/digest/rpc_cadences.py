"""Cadences between the contract's messages and the catalog's values, with every check a request needs."""

from datetime import UTC, datetime, timedelta

from carillon.digest.v1 import digest_pb2 as pb

from libs.errors import Violations
from libs.recurrence import BadRule, check_rule, next_after
from libs.wire import check_duration, check_number, check_text, check_zone, to_duration
from services.digest.catalog import IMMEDIATE, OFF, Aligned, Cadence, External, Rolling, rule_of
from services.digest.rpc_words import check_optional_line, check_type_id

_LONGEST_ROLLING = timedelta(days=30)
_MOST_ITEMS = 100_000
_FIRST_CHECKED = datetime(2026, 1, 1, tzinfo=UTC)

_BUILT_IN = (IMMEDIATE, OFF)


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
    return Cadence(id=checked_id, name=check_optional_line(v, f"{field}.name", one.name, 200), kind=kind)


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
    try:
        rule = rule_of(one.cron, one.rrule, one.zone or "UTC")
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
