"""Checks of what only schedules hold: events, conditions, retry policies, recurrences. As in rpc_checks."""

from datetime import datetime, timedelta

from carillon.scheduler.v1 import timer_pb2

from libs.conditions import BadCondition, compile_condition
from libs.errors import FieldViolation
from libs.recurrence import BadRule, Fold, Gap, Rule, next_after, whole_second
from libs.recurrence_cost import check_cost
from libs.wire import LATEST, from_timestamp
from services.intake.rpc_checks import (
    Found,
    check_duration,
    check_enum,
    check_instant,
    check_object,
    is_notification_type,
    is_short_name,
    microseconds,
    microseconds_of,
)

MAX_EXCLUSIONS = 366
NEVER = "has no occurrence any more, to the year 2199; look at its dates, end_time, count and exclusions"


def check_event(found: Found, field: str, event: timer_pb2.EventContent) -> None:
    """An event's content."""
    if not is_notification_type(event.type):
        found.append(FieldViolation(f"{field}.type", "must be 1-128 characters of [a-z0-9._/-]"))
    if event.payload:
        check_object(found, f"{field}.payload", event.payload)
    else:
        event.payload = "{}"
    if event.HasField("report_within"):
        most = timedelta(days=7)
        check_duration(found, f"{field}.report_within", event.report_within, least=timedelta(0), most=most)


def check_condition(found: Found, field: str, condition: timer_pb2.Condition) -> None:
    """A condition that is set: an expression, or a service that decides."""
    if condition.HasField("service"):
        if condition.cel:
            found.append(FieldViolation(f"{field}.cel", "must be absent where service is given"))
        _check_service(found, f"{field}.service", condition.service)
    elif not condition.cel:
        found.append(FieldViolation(f"{field}.cel", "must be given, or service"))
    else:
        try:
            compile_condition(condition.cel)
        except BadCondition as error:
            found.append(FieldViolation(f"{field}.cel", str(error)))


def _check_service(found: Found, field: str, asked: timer_pb2.ServiceCondition) -> None:
    """Whether a service of that name is registered only the scheduler knows."""
    if not is_short_name(asked.service):
        found.append(FieldViolation(f"{field}.service", "must be 1-64 characters of [a-z0-9._-]"))
    if asked.HasField("timeout"):
        least, most = timedelta(milliseconds=100), timedelta(seconds=30)
        check_duration(found, f"{field}.timeout", asked.timeout, least=least, most=most)
    check_enum(found, f"{field}.no_answer_policy", asked.no_answer_policy, timer_pb2.NoAnswerPolicy)


def check_retry_policy(found: Found, field: str, policy: timer_pb2.RetryPolicy) -> None:
    """A retry policy that is set; the delays' defaults are 30 s and 1 hour."""
    second, day = timedelta(seconds=1), timedelta(days=1)
    initial: timedelta | None = 30 * second
    longest: timedelta | None = timedelta(hours=1)
    if policy.HasField("initial_delay"):
        initial = check_duration(found, f"{field}.initial_delay", policy.initial_delay, least=second, most=day)
    if policy.HasField("maximum_delay"):
        longest = check_duration(found, f"{field}.maximum_delay", policy.maximum_delay, least=second, most=7 * day)
    if initial is not None and longest is not None and longest < initial:
        what = "must not be shorter than initial_delay; where it is absent it is 1 hour"
        found.append(FieldViolation(f"{field}.maximum_delay", what))
    if policy.multiplier and not 1.0 <= policy.multiplier <= 10.0:
        found.append(FieldViolation(f"{field}.multiplier", f"must be 1.0 to 10.0, got {policy.multiplier:g}"))
    if policy.maximum_attempts > 100:
        found.append(FieldViolation(f"{field}.maximum_attempts", f"must be 1-100, got {policy.maximum_attempts}"))
    if policy.HasField("maximum_age"):
        check_duration(found, f"{field}.maximum_age", policy.maximum_age, least=second, most=30 * day)


def check_rule(found: Found, field: str, recurrence: timer_pb2.Recurrence, now: datetime) -> None:
    """A recurrence that is set: every bound, and that it has an occurrence after `now`."""
    before = len(found)
    if not recurrence.cron and not recurrence.rrule:
        found.append(FieldViolation(f"{field}.cron", "one of cron and rrule must be given"))
    for name, longest in (("cron", 256), ("rrule", 256), ("zone", 64)):
        if (size := len(getattr(recurrence, name))) > longest:
            found.append(FieldViolation(f"{field}.{name}", f"must be at most {longest} characters, got {size:,}"))
    _check_range(found, field, recurrence, now)
    _check_exclusions(found, field, recurrence)
    _check_policies(found, field, recurrence)
    if len(found) == before:
        try:
            rule = _rule_of(recurrence, now)
            check_cost(rule)  # The scheduler reads the rule at each firing, while the whole shard waits.
            first = next_after(rule, now)
            if first is None or first >= LATEST:
                found.append(FieldViolation(f"{field}.{recurrence.WhichOneof('rule')}", NEVER))
        except BadRule as error:
            found.append(FieldViolation(f"{field}.{error.field}", str(error)))


def _check_range(found: Found, field: str, recurrence: timer_pb2.Recurrence, now: datetime) -> None:
    start_us = microseconds_of(now)
    if recurrence.HasField("start_time"):
        start_us = check_instant(found, f"{field}.start_time", recurrence.start_time)
    if recurrence.HasField("end_time"):
        after_us = max(start_us, microseconds_of(now))
        check_instant(found, f"{field}.end_time", recurrence.end_time, after_us=after_us)


def _check_exclusions(found: Found, field: str, recurrence: timer_pb2.Recurrence) -> None:
    if len(recurrence.exclusions) > MAX_EXCLUSIONS:
        count = len(recurrence.exclusions)
        found.append(FieldViolation(f"{field}.exclusions", f"must have 0-{MAX_EXCLUSIONS} entries, got {count:,}"))
    elif any(microseconds(one) < 0 for one in recurrence.exclusions):
        found.append(FieldViolation(f"{field}.exclusions", "each must be a valid time, year 1970 to 2199"))


def _check_policies(found: Found, field: str, recurrence: timer_pb2.Recurrence) -> None:
    if recurrence.HasField("jitter"):
        most = timedelta(hours=1)
        check_duration(found, f"{field}.jitter", recurrence.jitter, least=timedelta(0), most=most)
    if recurrence.HasField("catch_up_window"):
        most = timedelta(days=30)
        window = check_duration(
            found, f"{field}.catch_up_window", recurrence.catch_up_window, least=timedelta(0), most=most
        )
        if window and recurrence.misfire_policy == timer_pb2.MISFIRE_POLICY_SKIP:
            what = "must be absent with MISFIRE_POLICY_SKIP, which makes up for nothing"
            found.append(FieldViolation(f"{field}.catch_up_window", what))
    check_enum(found, f"{field}.gap_policy", recurrence.gap_policy, timer_pb2.GapPolicy)
    check_enum(found, f"{field}.fold_policy", recurrence.fold_policy, timer_pb2.FoldPolicy)
    check_enum(found, f"{field}.misfire_policy", recurrence.misfire_policy, timer_pb2.MisfirePolicy)
    check_enum(found, f"{field}.overlap_policy", recurrence.overlap_policy, timer_pb2.OverlapPolicy)


def check_overlap(found: Found, field: str, recurrence: timer_pb2.Recurrence, target: timer_pb2.Target) -> None:
    """Whoever waits for an outcome must get one: only events with report_within have outcomes."""
    if recurrence.overlap_policy in (timer_pb2.OVERLAP_POLICY_UNSPECIFIED, timer_pb2.OVERLAP_POLICY_ALLOW):
        return
    if recurrence.overlap_policy in timer_pb2.OverlapPolicy.values() and not _is_reported(target):
        what = "must be OVERLAP_POLICY_ALLOW, unless the target is an event with report_within"
        found.append(FieldViolation(f"{field}.overlap_policy", what))


def _is_reported(target: timer_pb2.Target) -> bool:
    within = target.event.report_within  # As it came: it may be out of any range.
    return target.HasField("event") and (within.seconds > 0 or within.nanos >= 1_000)


def _rule_of(recurrence: timer_pb2.Recurrence, now: datetime) -> Rule:
    return Rule(
        cron=recurrence.cron,
        rrule=recurrence.rrule,
        zone=recurrence.zone or "UTC",
        start=whole_second(from_timestamp(recurrence.start_time)) if recurrence.HasField("start_time") else now,
        end=from_timestamp(recurrence.end_time) if recurrence.HasField("end_time") else None,
        count=recurrence.count,
        exclusions=frozenset(map(from_timestamp, recurrence.exclusions)),
        gap=Gap.SKIP if recurrence.gap_policy == timer_pb2.GAP_POLICY_SKIP else Gap.SHIFT,
        fold=Fold.BOTH if recurrence.fold_policy == timer_pb2.FOLD_POLICY_BOTH else Fold.FIRST,
    )
