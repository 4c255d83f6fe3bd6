"""Runs a plan: makes the world, has everything happen at its time, then lets it settle.

history = simulate(seed)            # draws the plan
history = simulate(seed, plan)      # a given one
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from random import Random
from unittest.mock import patch
from uuid import UUID

from libs.links import frames as link_frames
from services.scheduler import loops_events
from services.scheduler.timer import HAS_TURN
from tests.simulation import links, plan
from tests.simulation.broker import Broker
from tests.simulation.commands import TENANT, TIMELINES, Commands, Draft, report_of
from tests.simulation.history import History
from tests.simulation.loop import Stuck, VirtualLoop
from tests.simulation.plan import RATE, REPLICAS, Action, Plan, draw_plan
from tests.simulation.postgres import Postgres
from tests.simulation.processes import SHARDS, Digest, Intake, Machine, Place, Replica, Shop
from tests.simulation.stores import ShardRow

BEGIN = datetime(2013, 7, 1, 12, tzinfo=UTC)
SETTLE_S = 40.0
"""How long after the last fault everything must be as it should; what takes longer counts as lost."""

_MADE = {"a": Replica, "b": Replica, "c": Replica, "intake": Intake, "digest": Digest, "shop": Shop}


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    return draw_plan(Random(f"{seed} plan"))


def simulate(seed: int, actions: Plan | None = None) -> History:
    """One history. The same arguments give the same history, byte for byte."""
    world = World(seed, draw(seed) if actions is None else actions)
    was_disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with ExitStack() as stack:
            stack.enter_context(links.installed())
            for module in (link_frames, loops_events):
                stack.enter_context(patch.object(module, "new_id", world.new_id))
            try:
                world.loop.run(world.run())
            except Stuck as err:
                world.history.note(f"the history got stuck: {err}")
            world.finish()
    finally:
        logging.disable(was_disabled)
    return world.history


Fault = plan.Crash | plan.Stop | plan.Cut | plan.Leave | plan.Slow


class World:
    """Servers, processes, fate."""

    def __init__(self, seed: int, actions: Plan) -> None:
        self.loop = VirtualLoop()  # type: ignore[abstract] # What it lacks nobody uses: sockets, threads, signals.
        self.history = History(begin_at=BEGIN)
        self.actions = actions
        self.seed = seed
        self.postgres = Postgres(self.loop, self.rng_of("disk"), BEGIN)
        self.postgres.on_commit = self.history.commits.append
        self.broker = Broker(self.loop, self.rng_of("nats"))
        self.clock_steps = self.history.clock_steps
        self.machines: dict[str, Machine] = {}
        self.everybody: list[Machine] = []
        self._commands = Commands(seed, self.new_id)
        self._ids = self.rng_of("ids")
        self._noises: list[float] = []  # That go on now; the loudest counts.
        self._place = Place(
            loop=self.loop,
            postgres=self.postgres,
            broker=self.broker,
            history=self.history,
            begin_at=BEGIN,
            clock_steps=self.clock_steps,
            rng_of=self.rng_of,
            report=self._report,
        )

    def rng_of(self, what: str) -> Random:
        """Each thing draws from its own stream, so that one action less changes as little as possible elsewhere."""
        return Random(f"{self.seed} {what}")

    def new_id(self) -> UUID:
        """A UUIDv7 of this history."""
        milliseconds = (BEGIN + timedelta(seconds=self.loop.time())).timestamp() * 1000
        random_bits = self._ids.getrandbits(74)
        return UUID(
            int=int(milliseconds) << 80 | 7 << 76 | (random_bits >> 62) << 64 | 2 << 62 | random_bits & (1 << 62) - 1
        )

    def now(self) -> datetime:
        """Business time, as an ideal clock has it."""
        steps = sum((by for _, by in self.clock_steps), timedelta(0))
        return BEGIN + timedelta(seconds=RATE * self.loop.time()) + steps

    # The history

    async def run(self) -> None:
        """Everything, until it has settled."""
        for number in range(SHARDS):
            self.postgres.rows("shard")[number] = ShardRow()
        for timeline in TIMELINES:
            self.postgres.rows("timeline")[TENANT, timeline.name, 1] = timeline
        for name in ("intake", "digest", "shop", *REPLICAS):
            self._start(name)
        for action in self.actions:
            self.loop.outside(action.at_s, self._happen, action)
        ends_s = (one.at_s + getattr(one, "for_s", 0.0) for one in self.actions)
        await asyncio.sleep(max([plan.FAULTS_END_S, *ends_s]) + 0.5)
        for _ in range(int(SETTLE_S / 0.5)):
            await asyncio.sleep(0.5)
            if self._is_settled():
                break
        self.history.end_at = self.now()

    def finish(self) -> None:
        """Keep what the tables hold, and end what still runs."""
        self.history.steps = self.loop.steps
        self.postgres.on_commit = lambda _: None
        self.history.tables = {name: dict(rows) for name, rows in self.postgres._tables.items()}
        for process, error in self.loop.unhandled:
            self.history.note(f"a task of {process} ended with {error!r}")
        self.loop.bury([one.process for one in self.everybody])

    def _is_settled(self) -> bool:
        """No frame under way, and nothing due that has not had its turn."""
        if any(self.postgres.rows(table) for table in ("intake.outbox", "scheduler.outbox", "event_outbox")):
            return False
        marks = {number: row.watermark for number, row in self.postgres.rows("shard").items()}
        now = self.now()
        return not any(
            timer.state in HAS_TURN and timer.fire_at <= now and timer.mark > marks[timer.shard]
            for timer in self.postgres.rows("timer").values()
        )

    def _happen(self, action: Action) -> None:
        drafts = self._commands.drafts(action, self.now())
        if drafts is not None:
            self._send(drafts)
            return
        match action:
            case plan.Crash() | plan.Stop() | plan.Cut() | plan.Leave() | plan.Slow():
                machine = self.machines.get(action.process)
                if machine is not None:  # Otherwise it is down already.
                    self._befall(action, machine)
            case plan.PostgresAway():
                self.postgres.go_away()
                self.loop.outside(action.for_s, setattr, self.postgres, "is_up", True)
            case plan.Wipe():
                self.broker.wipe()
            case plan.Noise():
                self._noises.append(action.share)
                self.broker.noise = max(self._noises)
                self.loop.outside(action.for_s, self._calm, action.share)
            case plan.StepClock():
                self.clock_steps.append((self.loop.time(), timedelta(seconds=action.by_s)))
            case _:
                raise TypeError(f"nobody knows how {action} happens")

    def _send(self, drafts: Sequence[Draft]) -> None:
        """Call intake, where it is there to be called."""
        intake = self.machines.get("intake")
        if isinstance(intake, Intake) and not intake.process.is_buried:
            intake.spawn(lambda: intake.take(drafts))

    def _report(self, timer_id: UUID, entity: str, attempt: int, is_done: bool) -> None:
        report = plan.Report(at_s=round(self.loop.time(), 3), entity=entity, attempt=attempt, is_done=is_done)
        self._send([report_of(report, timer_id, self.now())])

    # Processes

    def _start(self, name: str) -> None:
        number = sum(one.process.name.split(".")[0] == name for one in self.everybody)
        machine = _MADE[name](self._place, f"{name}.{number}" if number else name)
        self.machines[name] = machine
        self.everybody.append(machine)
        machine.start()

    def _befall(self, fault: Fault, machine: Machine) -> None:
        """At once, or when the process has sent its next request of that name."""
        match fault:
            case plan.Slow():
                machine.postgres_line.slowness = fault.factor
                self.loop.outside(fault.for_s, setattr, machine.postgres_line, "slowness", 1.0)
            case plan.Leave():
                self._replace(fault.process, after_s=fault.for_s)
                machine.spawn(lambda: self._end(machine))
            case _ if fault.when:
                machine.postgres_line.trap(fault.when, lambda: self._befall_now(fault, machine))
            case _:
                self._befall_now(fault, machine)

    def _befall_now(self, fault: plan.Crash | plan.Stop | plan.Cut, machine: Machine) -> None:
        match fault:
            case plan.Crash() if self.machines.get(fault.process) is machine:
                machine.process.is_dead = True
                if not fault.is_machine:
                    self.loop.outside(0.02, self.postgres.end_sessions_of, machine.process)
                self._replace(fault.process, after_s=fault.for_s)
            case plan.Stop():
                self.loop.stop_process(machine.process)
                self.loop.outside(fault.for_s, self.loop.continue_process, machine.process)
            case plan.Cut():
                line = machine.postgres_line if fault.server == "postgres" else machine.nats_line
                line.is_cut = True
                self.loop.outside(fault.for_s, setattr, line, "is_cut", False)

    def _replace(self, name: str, *, after_s: float) -> None:
        del self.machines[name]
        self.loop.outside(after_s, self._start, name)

    async def _end(self, machine: Machine) -> None:
        await machine.leave()
        machine.process.is_dead = True

    def _calm(self, share: float) -> None:
        self._noises.remove(share)
        self.broker.noise = max(self._noises, default=0.0)
