"""Compares what must have come of the replay with what the services say and with what really arrived."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Any

from carillon.digest.v1 import digest_pb2 as digest
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.scheduler.v1 import timer_pb2 as timer

from local.demo import story
from local.demo.answers import Answers, Arrival
from local.demo.oracle import Expected, Message

_AIRCRAFT = story.aircraft("")
_HALF_A_MINUTE = timedelta(seconds=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Where Carillon and the oracle disagree."""

    what: str
    expected: object
    actual: object


def differences(
    expected: Expected, accepted: Mapping[str, int], answers: Answers, arrivals: Sequence[Arrival]
) -> list[Difference]:
    """Every disagreement; empty when all is exact."""
    return [
        *_compare("accepted", _accepted(expected), {name: accepted.get(name, 0) for name in _accepted(expected)}),
        *_compare("timers of trials", _trial_timers(expected), count_timers(answers.timers)),
        *_compare("reports and remarks", _scheduled(expected), _fired_schedules(answers.timers)),
        *_compare("digests (subscriber, cadence, local close, items)", _digests(expected), _listed(answers)),
        *_compare_items(expected.messages, list(arrived(answers, arrivals).elements())),
        *_compare("deliveries that are not sent", {}, _unsent(answers)),
    ]


def arrived(answers: Answers, arrivals: Sequence[Arrival]) -> Counter[Message]:
    """What arrived, put together from the parts of each digest; what was resent counts once."""
    digests = {one.id: one for one in answers.digests}
    digest_of = {delivery.id: delivery.digest_id for delivery in answers.deliveries}
    once = {arrival.key: arrival for arrival in arrivals}
    items: defaultdict[str, list[str]] = defaultdict(list)
    for key, arrival in once.items():
        items[digest_of.get(key, f"unknown delivery {key} to {arrival.to}")] += arrival.items
    return Counter(_message(digests.get(digest_id), digest_id, found) for digest_id, found in items.items())


def resent(arrivals: Sequence[Arrival]) -> int:
    """How many mails and webhooks came more than once under the same id, as they may after a crash."""
    return len(arrivals) - len({arrival.key for arrival in arrivals})


def count_timers(timers: Sequence[timer.Timer]) -> Counter[str]:
    """The trials' timers by state."""
    names = {
        timer.TIMER_STATE_SCHEDULED: "timers_scheduled",
        timer.TIMER_STATE_FIRED: "timers_fired",
        timer.TIMER_STATE_DONE: "timers_fired",
        timer.TIMER_STATE_SKIPPED: "timers_skipped",
        timer.TIMER_STATE_CANCELLED: "timers_cancelled",
    }
    return Counter(
        names.get(one.state, timer.TimerState.Name(one.state)) for one in timers if one.entity.startswith(_AIRCRAFT)
    )


def local_close(one: digest.Digest) -> str:
    """When a digest closed, New York time, as the oracle writes it; empty for what was sent alone.

    To the nearest minute: the clock stops a second before the hour, and a process may hear a moment later than another
    that it goes on.
    """
    if one.cadence == story.IMMEDIATE:
        return ""
    return f"{(one.close_time.ToDatetime(UTC) + _HALF_A_MINUTE).astimezone(story.NEW_YORK):%Y-%m-%d %H:%M}"


def _message(one: digest.Digest | None, digest_id: str, items: Sequence[str]) -> Message:
    if one is None:
        return Message(subscriber=digest_id, cadence="unknown", closes="", items=tuple(sorted(items)))
    return Message(subscriber=one.subscriber, cadence=one.cadence, closes=local_close(one), items=tuple(sorted(items)))


def _accepted(expected: Expected) -> dict[str, int]:
    names = ("delays", "requests", "requests_refused", "responses", "timelines", "cancels")
    return {name: expected.counts[name] for name in names}


def _trial_timers(expected: Expected) -> dict[str, int]:
    names = ("timers_scheduled", "timers_fired", "timers_skipped", "timers_cancelled")
    return {name: expected.counts[name] for name in names}


def _scheduled(expected: Expected) -> dict[str, int]:
    return {story.REPORT: expected.counts["reports"], story.REMARK: expected.counts["remarks"]}


def _fired_schedules(timers: Sequence[timer.Timer]) -> Counter[str]:
    fired = (timer.TIMER_STATE_FIRED, timer.TIMER_STATE_DONE)
    return Counter(one.type for one in timers if one.type in (story.REPORT, story.REMARK) and one.state in fired)


def _digests(expected: Expected) -> Counter[Any]:
    return Counter((one.subscriber, one.cadence, one.closes, len(one.items)) for one in expected.messages)


def _listed(answers: Answers) -> Counter[Any]:
    return Counter((one.subscriber, one.cadence, local_close(one), one.item_count) for one in answers.digests)


def _unsent(answers: Answers) -> Counter[str]:
    return Counter(
        f"{dispatcher.DeliveryState.Name(one.state)} {one.last_error}"
        for one in answers.deliveries
        if one.state != dispatcher.DELIVERY_STATE_SENT
    )


def _compare_items(expected: Sequence[Message], actual: Sequence[Message]) -> Iterator[Difference]:
    """Which items are missing in which message, or there without reason."""
    wanted, found = _by_window(expected), _by_window(actual)
    for window in sorted(wanted.keys() | found.keys()):
        missing, needless = wanted[window] - found[window], found[window] - wanted[window]
        if missing or needless:
            what = f"items that arrived {window}"
            yield Difference(what=what, expected=sorted(missing.elements()), actual=sorted(needless.elements()))


def _by_window(messages: Sequence[Message]) -> defaultdict[tuple[str, str, str], Counter[str]]:
    found: defaultdict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for message in messages:
        found[message.subscriber, message.cadence, message.closes].update(message.items)
    return found


def _compare(what: str, expected: Mapping[Any, int], actual: Mapping[Any, int]) -> Iterator[Difference]:
    for key in sorted(expected.keys() | actual.keys(), key=str):
        if expected.get(key, 0) != actual.get(key, 0):
            yield Difference(what=f"{what}: {key}", expected=expected.get(key, 0), actual=actual.get(key, 0))
