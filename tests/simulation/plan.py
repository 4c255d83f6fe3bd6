"""What happens in a history: a list of timed actions drawn from a seed. Pure data, so that it can be cut short.

Times in `at_s` and `for_s` are seconds of the history; business time runs `RATE` times as fast, so that a recurrence by
the minute comes round each second. Offsets of timers (`due_in_s`) are business seconds.
"""

from dataclasses import dataclass, fields
from random import Random

RATE = 60
FAULTS_END_S = 9.0
ENTITIES = tuple(f"e{number}" for number in range(6))
TYPES = ("", "call", "mail")
TIMELINES = ("trial", "order")

PAID = "has(facts.paid) && facts.paid"
UNPAID = "!(has(facts.paid) && facts.paid)"
BROKEN = "facts.there_is_no_such_fact > 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Something that happens at a time."""

    at_s: float

    def __str__(self) -> str:
        told = [
            f"{one.name}={value!r}" for one in fields(self)[1:] if (value := getattr(self, one.name)) != one.default
        ]
        return f"{self.at_s:7.3f} s  {type(self).__name__}({', '.join(told)})"


# What callers ask for. `name` is how other actions refer to a timer.


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(Action):
    """One-shot timers, `count` of them in one frame, all due at the same instant."""

    name: str
    entity: str
    due_in_s: int
    count: int = 1
    type: str = ""
    condition: str = ""
    asks: str = ""
    sends: str = ""
    expires_in_s: int | None = None
    is_repeated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recur(Action):
    """A schedule that recurs, by a cron rule."""

    name: str
    entity: str
    cron: str
    type: str = ""
    condition: str = ""
    sends: str = ""
    count: int = 0
    misfire: str = ""
    overlap: str = ""
    jitter_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start(Action):
    """A start of a timeline."""

    timeline: str
    entity: str
    anchor_in_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(Action):
    """Whether an entity has paid is known."""

    entity: str
    is_paid: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Action):
    """A cancel of what `entity` has: of all, of a type, of a timeline, or of timers by their names."""

    entity: str
    type: str = ""
    timeline: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause(Action):
    """Hold back what `entity` has; selected as by Cancel."""

    entity: str
    type: str = ""
    timeline: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Action):
    """Let it go on."""

    entity: str
    type: str = ""
    timeline: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Move(Action):
    """Reschedule it."""

    entity: str
    due_in_s: int
    type: str = ""
    timeline: str = ""
    names: tuple[str, ...] = ()


Order = Cancel | Pause | Resume | Move


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger(Action):
    """Fire a schedule once more, now."""

    entity: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill(Action):
    """Make up for a schedule's last `for_s` business seconds."""

    entity: str
    name: str
    last_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Action):
    """What the shop says of an event; not part of a plan, it follows from what was fired."""

    entity: str
    attempt: int
    is_done: bool


# What goes wrong. `process` is a replica ("a", "b", "c"), "intake", "digest" or "shop".


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash(Action):
    """kill -9, and a new process after `for_s`; with the whole machine, Postgres does not hear of it.

    `when`: not at once, but when the process has just sent its next request of this name to Postgres.
    """

    process: str
    for_s: float
    when: str = ""
    is_machine: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Action):
    """A graceful stop, and a new process after `for_s`."""

    process: str
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Action):
    """SIGSTOP, and SIGCONT after `for_s`; `when` as in Crash."""

    process: str
    for_s: float
    when: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow(Action):
    """Each message between a process and Postgres takes `factor` times as long."""

    process: str
    for_s: float
    factor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(Action):
    """A process does not reach a server, "postgres" or "nats"; `when` as in Crash."""

    process: str
    server: str
    for_s: float
    when: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresAway(Action):
    """Postgres crashes and is back after `for_s`, with what was committed."""

    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wipe(Action):
    """NATS loses its disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise(Action):
    """This share of messages over NATS is lost, doubled, delayed or out of order."""

    for_s: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepClock(Action):
    """Business time is corrected by so many business seconds; each process notices in its own time."""

    by_s: int


Plan = tuple[Action, ...]

REPLICAS = ("a", "b", "c")
REQUESTS = (
    *("pages", "pages", "pages", "fence", "admit", "load", "write", "insert_frames", "renew", "take"),
    *("commit after insert_frames", "commit after insert_frames", "commit after write", "commit after keep_results"),
)
"""When things go wrong: the requests of a turn and of a renewal."""


def draw_plan(rng: Random) -> Plan:
    """A history's actions, in order of time. Length and mixture differ from seed to seed."""
    actions = [_command(rng, number) for number in range(rng.randint(8, 30))]
    names = [one for one in actions if isinstance(one, Schedule | Recur)]
    actions += [_order(rng, names) for _ in range(rng.randint(1, 10))]
    actions += [_once_more(rng, one) for one in names if isinstance(one, Recur) and rng.random() < 0.4]
    actions += [_fault(rng) for _ in range(rng.randint(1, 7))]
    return tuple(sorted(actions, key=lambda one: one.at_s))


def _moment(rng: Random) -> float:
    return round(rng.uniform(0.3, FAULTS_END_S), 3)


def _command(rng: Random, number: int) -> Action:
    at_s, entity, name = _moment(rng), rng.choice(ENTITIES), f"t{number}"
    match rng.choices(("one", "herd", "recur", "start", "facts"), (9, 3, 3, 3, 5))[0]:
        case "one":
            return _one(rng, at_s, entity, name)
        case "herd":
            due_in_s, count = rng.choice((0, rng.randint(1, 300))), rng.randint(20, 70)
            return Schedule(at_s=at_s, name=name, entity=entity, due_in_s=due_in_s, count=count)
        case "recur":
            return _recur(rng, at_s, entity, name)
        case "start":
            anchor_in_s = rng.choice((-60, 0, rng.randint(0, 120)))
            return Start(at_s=at_s, timeline=rng.choice(TIMELINES), entity=entity, anchor_in_s=anchor_in_s)
        case _:
            return Facts(at_s=at_s, entity=entity, is_paid=rng.choice((True, True, False, None)))


def _one(rng: Random, at_s: float, entity: str, name: str) -> Schedule:
    condition = rng.choice(("", "", "", PAID, UNPAID, BROKEN))
    return Schedule(
        at_s=at_s,
        name=name,
        entity=entity,
        type=rng.choice(TYPES),
        due_in_s=rng.choice((-100, -1, 0, 5, rng.randint(1, 120), rng.randint(1, 500))),
        condition=condition,
        asks=rng.choice(("", "", "fail", "fire", "skip")) if not condition else "",
        sends=rng.choice(("", "", "event", "report", "report")),
        expires_in_s=rng.choice((None, None, None, rng.randint(1, 300))),
        is_repeated=rng.random() < 0.1,
    )


def _recur(rng: Random, at_s: float, entity: str, name: str) -> Recur:
    sends = rng.choice(("", "", "report"))
    return Recur(
        at_s=at_s,
        name=name,
        entity=entity,
        cron=rng.choice(("* * * * *", "*/2 * * * *")),
        type=rng.choice(TYPES),
        condition=rng.choice(("", "", UNPAID)),
        sends=sends,
        count=rng.choice((0, 0, 3)),
        misfire=rng.choice(("", "all", "all", "skip")),
        overlap=rng.choice(("", "skip", "buffer")) if sends else "",
        jitter_s=rng.choice((0, 0, 30)),
    )


def _order(rng: Random, named: list[Schedule | Recur]) -> Action:
    """Most of them soon after what they are about: one that overtakes its schedule, or meets its firing."""
    entity, at_s = rng.choice(ENTITIES), _moment(rng)
    names: tuple[str, ...] = ()
    selection: dict[str, object] = {}
    if named and rng.random() < 0.6:
        target = rng.choice(named)
        until_due_s = max(0.0, target.due_in_s / RATE) if isinstance(target, Schedule) else 1.0
        later_s = rng.choice((0.002, 0.005, 0.05, rng.random(), until_due_s))
        entity, at_s, names = target.entity, round(target.at_s + later_s, 3), (target.name,)
    match rng.choice(("entity", "type", "timeline", "names")):
        case "type":
            selection["type"] = rng.choice(TYPES[1:])
        case "timeline":
            selection["timeline"] = rng.choice(TIMELINES)
        case "names" if names:
            selection["names"] = names
    what: dict[str, object] = {"at_s": at_s, "entity": entity, **selection}
    match rng.choice(("cancel", "cancel", "pause", "pause", "resume", "resume", "move")):
        case "cancel":
            return Cancel(**what)  # type: ignore[arg-type]
        case "pause":
            return Pause(**what)  # type: ignore[arg-type]
        case "move":
            return Move(**what, due_in_s=rng.choice((-10, 0, rng.randint(1, 200))))  # type: ignore[arg-type]
        case _:
            return Resume(**what)  # type: ignore[arg-type]


def _once_more(rng: Random, schedule: Recur) -> Action:
    at_s = round(schedule.at_s + rng.uniform(0.01, 5), 3)
    if rng.random() < 0.5:
        return Trigger(at_s=at_s, entity=schedule.entity, name=schedule.name)
    return Backfill(at_s=at_s, entity=schedule.entity, name=schedule.name, last_s=rng.randint(60, 400))


def _fault(rng: Random) -> Action:
    at_s, replica = _moment(rng), rng.choice(REPLICAS)
    anybody = rng.choice((*REPLICAS, *REPLICAS, "intake", "digest", "shop"))
    for_s = round(rng.choice((rng.uniform(0.1, 1), rng.uniform(1, 5))), 3)
    when = rng.choice(("", rng.choice(REQUESTS)))
    match rng.choice(
        (
            "crash",
            "crash",
            "leave",
            "pause",
            "pause",
            "pause",
            "slow",
            "cut",
            "cut",
            "away",
            "wipe",
            "noise",
            "noise",
            "clock",
        )
    ):
        case "crash":
            return Crash(
                at_s=at_s,
                process=anybody,
                for_s=for_s,
                when=when,
                is_machine=rng.random() < 0.3,
            )
        case "leave":
            return Leave(at_s=at_s, process=replica, for_s=for_s)
        case "pause":
            for_s = round(rng.choice((for_s, rng.uniform(2.2, 5))), 3)  # The latter is longer than a lease.
            when = rng.choice(("", "pages", "pages", when))  # After `pages` and before the fence it is most delicate.
            return Stop(at_s=at_s, process=replica, for_s=for_s, when=when)
        case "slow":
            return Slow(at_s=at_s, process=anybody, for_s=for_s, factor=rng.choice((20, 200, 600)))
        case "cut":
            server = rng.choice(("postgres", "postgres", "nats"))
            return Cut(at_s=at_s, process=anybody, server=server, for_s=for_s, when=when)
        case "away":
            return PostgresAway(at_s=at_s, for_s=min(for_s, 2.0))
        case "wipe":
            return Wipe(at_s=at_s)
        case "noise":
            return Noise(at_s=at_s, for_s=for_s, share=rng.choice((0.1, 0.3, 0.6)))
        case _:
            return StepClock(at_s=at_s, by_s=rng.choice((-90, -10, 30, 180)))
