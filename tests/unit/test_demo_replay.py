"""The demo's driver: what is told when, and when the clock may go on, with everything around it replaced."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from local.demo import story
from local.demo.plan import Call, Plan, Shift, Start, Stop
from local.demo.replay import Replay

BEGIN, END = story.START, story.START + story.SHIFT
JUST_BEFORE = END - timedelta(seconds=1)


class Log:
    """Clock, rest and caller in one: writes down what is asked of it. Time jumps to where it is waited for."""

    def __init__(self) -> None:
        self.lines: list[tuple[object, ...]] = []
        self._now = BEGIN

    def now(self) -> datetime:
        """Business time."""
        return self._now

    async def let_run(self, until: datetime) -> None:
        """See Pace."""
        self.lines.append(("run", until))

    async def reach(self, at: datetime) -> None:
        """See Pace."""
        self._now = max(self._now, at)

    async def wait(self, now: datetime) -> None:
        """See Rest."""
        assert self._now == now, "nobody may wait for rest while the clock runs"
        self.lines.append(("rest", now))

    async def tell(self, calls: Sequence[Call]) -> None:
        """See Caller."""
        assert all(call.at <= self._now for call in calls), "nothing is told before it has happened"
        self.lines.append(("tell", *(call.at for call in calls)))

    async def put_facts(self, flown: Mapping[str, int]) -> None:
        """See Caller."""
        self.lines.append(("facts", dict(flown)))

    async def trigger(self, end: datetime) -> None:
        """See Caller."""
        self.lines.append(("trigger", end))


def _replayed(*calls: Call, stops: Sequence[datetime] = ()) -> list[tuple[object, ...]]:
    log = Log()
    shift = Shift(begin=BEGIN, end=END, calls=list(calls), stops=list(stops), facts={"N1": 1})
    plan = Plan(shifts=[shift], carriers=[], passengers=[], flights=0)
    asyncio.run(Replay(caller=log, pace=log, rest=log, on_shift=lambda number, shift: None).run(plan))
    return log.lines


def test_digests_close_only_when_all_is_in_them() -> None:
    """The clock stops just before the end, passes it after a rest, and the trigger comes after the next one."""
    at = BEGIN + timedelta(hours=1)
    assert _replayed(Start(at=at, tail="N1")) == [
        ("run", JUST_BEFORE),
        ("tell", at),
        ("rest", JUST_BEFORE),
        ("run", END),
        ("rest", END),
        ("trigger", END),
        ("facts", {"N1": 1}),
        ("rest", END),
    ]


def test_cancel_comes_at_its_very_moment_where_a_step_is_due() -> None:
    """What is due by then has happened, what is due later has not: the clock stands still around the cancel."""
    before, moment, after = (BEGIN + timedelta(hours=hours) for hours in (1, 2, 3))
    lines = _replayed(
        Start(at=before, tail="N1"), Stop(at=moment, tail="N2"), Start(at=after, tail="N3"), stops=[moment]
    )
    assert lines[:7] == [
        ("run", moment),
        ("tell", before),
        ("rest", moment),
        ("tell", moment),
        ("rest", moment),
        ("run", JUST_BEFORE),
        ("tell", after),
    ]
