"""From a recurrence in a request to the rule it means, each field checked."""

from datetime import datetime, timedelta

from carillon.scheduler.v1 import timer_pb2

from libs.errors import Violations
from libs.recurrence import MAX_RULE_CHARACTERS, MAX_ZONE_CHARACTERS, Fold, Gap, Rule, whole_second
from libs.wire import check_count, check_duration, check_enum, check_instant, check_text

_MAX_EXCLUSIONS = 366
_MAX_JITTER = timedelta(hours=1)
_MAX_CATCH_UP = timedelta(days=30)


def read_rule(violations: Violations, field: str, message: timer_pb2.Recurrence, *, now: datetime) -> Rule:
    """The rule in a message; one without a start starts `now`. Whether it can be read shows when it is."""
    _check_policies(violations, field, message)
    check_count(violations, f"{field}.exclusions", message.exclusions, least=0, most=_MAX_EXCLUSIONS)
    exclusions = [
        check_instant(violations, f"{field}.exclusions[{index}]", one)
        for index, one in enumerate(message.exclusions[:_MAX_EXCLUSIONS])
    ]
    start, end = (
        check_instant(violations, f"{field}.{name}", getattr(message, name)) if message.HasField(name) else None
        for name in ("start_time", "end_time")
    )
    gap, fold = message.gap_policy, message.fold_policy
    return Rule(
        cron=check_text(violations, f"{field}.cron", message.cron, shortest=0, longest=MAX_RULE_CHARACTERS),
        rrule=check_text(violations, f"{field}.rrule", message.rrule, shortest=0, longest=MAX_RULE_CHARACTERS),
        zone=check_text(violations, f"{field}.zone", message.zone, shortest=0, longest=MAX_ZONE_CHARACTERS) or "UTC",
        start=now if start is None else whole_second(start),
        end=end,
        count=message.count,
        exclusions=frozenset(one for one in exclusions if one is not None),
        gap=Gap(check_enum(violations, f"{field}.gap_policy", gap, timer_pb2.GapPolicy, default=Gap.SHIFT.value)),
        fold=Fold(check_enum(violations, f"{field}.fold_policy", fold, timer_pb2.FoldPolicy, default=Fold.FIRST.value)),
    )


def _check_policies(violations: Violations, field: str, message: timer_pb2.Recurrence) -> None:
    """What decides about firing and not about times: a preview of what intake would refuse would promise too much."""
    misfire, overlap = message.misfire_policy, message.overlap_policy
    check_enum(violations, f"{field}.misfire_policy", misfire, timer_pb2.MisfirePolicy, default=1)
    check_enum(violations, f"{field}.overlap_policy", overlap, timer_pb2.OverlapPolicy, default=1)
    check_duration(violations, f"{field}.jitter", message.jitter, most=_MAX_JITTER)
    window = check_duration(violations, f"{field}.catch_up_window", message.catch_up_window, most=_MAX_CATCH_UP)
    if window and misfire == timer_pb2.MISFIRE_POLICY_SKIP:
        violations.add(
            f"{field}.catch_up_window", "must be absent with MISFIRE_POLICY_SKIP, which makes up for nothing"
        )
