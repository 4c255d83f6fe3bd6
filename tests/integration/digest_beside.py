"""Digest and its naive model side by side: what is done to both, and how they are compared; see digest_machine."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

from carillon.digest.v1 import digest_pb2 as pb
from carillon.link.v1 import link_pb2
from carillon.scheduler.v1 import timer_pb2

from libs.ids import derived_id
from libs.links.frames import decoded
from libs.links.receiver import Applied
from libs.wire import to_duration, to_timestamp
from tests.integration.digest_rig import START, Rig
from tests.support.digest_model import Model
from tests.support.digest_words import (
    Aligned,
    Cadence,
    Cancel,
    External,
    ItemKey,
    Rolling,
    Subscriber,
    Subscription,
    Told,
    Window,
)

STATES = dict(enumerate(["pending", "digested", "sent_alone", "suppressed", "cancelled", "expired", "dead"], start=1))
KINDS = {1: "alone", 2: "aligned", 3: "external", 4: "rolling"}
CHANNELS = {"": 0, "email": pb.CHANNEL_EMAIL, "webhook": pb.CHANNEL_WEBHOOK, "log": pb.CHANNEL_LOG}
STYLES = {"": 0, "full": pb.STYLE_FULL, "summary": pb.STYLE_SUMMARY}
WINDOW_STATES = {1: "open", 2: "closing", 3: "closed"}
TABLES = (
    *("notification_type", "subscriber", "subscription", "choice", "cadence", "notification", "item", "digest_window"),
    *("digest", "delivery", "tombstone", "batch_run", "ended", "outbox"),
)

T = TypeVar("T")


class World:
    """One replica that all histories of a run share, and the loop it lives on."""

    def __init__(self, runner: asyncio.Runner, rig: Rig) -> None:
        self._runner, self.rig = runner, rig

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it now."""
        return self._runner.run(work)

    async def empty(self) -> None:
        """As after the migration."""
        self.rig.clock.at, self.rig.sequence = START, 0
        async with self.rig.db.transaction() as tx:
            for table in TABLES:
                await tx.raw.execute(f"DELETE FROM {table}")


class Beside:
    """One history's digest and model. Every method does the same to both."""

    def __init__(self, world: World) -> None:
        self.world, self.rig, self.run = world, world.rig, world.run
        self.model = Model()
        self.told: list[Told] = []
        self.known: dict[UUID, Window] = {}
        self.timers: list[tuple[UUID, datetime]] = []
        self.fired: set[tuple[UUID, datetime]] = set()
        self.left: dict[UUID, frozenset[ItemKey]] = {}
        self.delivered: set[UUID] = set()

    @property
    def now(self) -> datetime:
        """Business time."""
        return self.rig.clock.at

    # What must hold

    async def compare(self) -> None:
        await self.collect()
        rows = await self.rows("SELECT notification_id, subscriber, choice, window_id, state, reason FROM item")
        await self._agree_on_windows({row[3]: row[:3] for row in rows})
        real = {row[:3]: (STATES[row[4]], row[5], self.known.get(row[3])) for row in rows}
        wanted = {key: (one.state, one.reason, one.window) for key, one in self.model.items.items()}
        _check_same(real, wanted)
        self._check_that_nothing_joins(rows)
        await self._agree_on_the_ledger()
        asked = {(self.known[window], due) for window, due in self.timers if window in self.known}
        there = {(window, due) for window, due in self.model.asked if window in self.model.windows}
        assert asked <= there, asked - there
        missing = {one for one in there - asked if one[0] not in self.model.unasked}
        assert not missing, missing

    async def _agree_on_the_ledger(self) -> None:
        ledger = await self.rig.call("GetLedger")
        assert (ledger.unaccounted, ledger.notifications) == (0, len(self.model.notifications)), ledger
        items = {(STATES[one.state], one.suppressed_reason): one.items for one in ledger.items}
        _check_same(items, Counter((one.state, one.reason) for one in self.model.items.values()))
        digests = {one.outcome: one.digests for one in ledger.digests}
        _check_same(digests, Counter(window.outcome for window in self.model.windows if window.outcome))

    async def _agree_on_windows(self, members: Mapping[UUID, ItemKey]) -> None:
        """`members` are windows' items, one of each."""
        rows = await self.rows(
            "SELECT id, subscriber, cadence, channel, format, style, kind, state, due_at, is_held, batch, opened_at"
            " FROM digest_window ORDER BY id"
        )
        for one_id, *key, kind, state, _, _, _, _ in rows:
            if one_id not in self.known:
                self._recognise(one_id, tuple(key), KINDS[kind], WINDOW_STATES[state], members.get(one_id))
        real = {
            self.known[row[0]]: (WINDOW_STATES[row[7]], row[8], row[9], row[10], row[11] if row[6] == 3 else None)
            for row in rows
        }
        wanted = {
            one: (one.state, one.due_at, one.is_held, one.batch, one.opened_at if one.kind == "external" else None)
            for one in self.model.windows
        }
        _check_same(real, wanted)

    def _recognise(self, one_id: UUID, key: tuple[str, ...], kind: str, state: str, member: ItemKey | None) -> None:
        """Find out which of the model's windows a new row is: by an item, or, empty, by its key."""
        if member is not None:
            item = self.model.items.get(member)
            assert item is not None, f"an item nobody expected: {member}"
            found = [item.window] if item.window is not None else []
        else:
            full = {item.window for item in self.model.items.values()}
            found = [one for one in self.model.windows if one.key == key and one.id is None and one not in full]
        assert [(one.key, one.kind, one.state, one.id) for one in found] == [(key, kind, state, None)]
        found[0].id = one_id
        self.known[one_id] = found[0]

    def _check_that_nothing_joins(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """INV-7, without asking the model: what has begun to close has got its items."""
        for one_id, window in self.known.items():
            if window.state != "open":
                items = frozenset(row[:3] for row in rows if row[3] == one_id)
                assert items <= self.left.get(one_id, items)
                self.left[one_id] = items

    # How it is done

    async def collect(self) -> None:
        """Take what was sent out of the outbox: timers to fire later, messages to compare with their windows."""
        async with self.rig.db.transaction() as tx:
            cursor = await tx.raw.execute("DELETE FROM outbox RETURNING receiver, payload")
            sent = [(receiver, decoded(data)) for receiver, data in await cursor.fetchall()]
        for receiver, frame in sent:
            for entry in frame.entries:
                if receiver == "scheduler":
                    target = entry.schedule_timer.target.close_window
                    one = UUID(bytes=target.window_id), target.due_time.ToDatetime(tzinfo=UTC)
                    assert entry.schedule_timer.due_time == target.due_time
                    if one not in self.timers:
                        self.timers.append(one)
                else:
                    self._check_message(entry.delivery)

    def _check_message(self, message: link_pb2.Delivery) -> None:
        """INV-7: the message names exactly the items of its window, and is the only one of it."""
        digest = UUID(bytes=message.digest_id)
        assert digest not in self.delivered
        self.delivered.add(digest)
        window = self.known[digest]
        wanted = sorted(
            str(key[0])
            for key, item in self.model.items.items()
            if item.window is window and item.state in ("digested", "sent_alone")
        )
        if message.json:
            assert sorted(one["notification_id"] for one in json.loads(message.json)["items"]) == wanted
        else:
            for body in [message.text, *([message.html] if message.html else [])]:
                assert sorted(set(re.findall(r"=([0-9a-f-]{36})=", body))) == wanted
        assert (message.subscriber, message.channel) == (window.key[0], window.key[2])

    def apply(
        self,
        *,
        notifications: Sequence[Told] = (),
        cancels: Sequence[Cancel] = (),
        triggers: Sequence[tuple[str, datetime]] = (),
    ) -> None:
        """One frame, to both; compares what is answered."""
        self.told += notifications
        entries = [
            *[self._notification(one) for one in notifications],
            *[self._cancel(one) for one in cancels],
            *[self.rig.trigger(batch, end) for batch, end in triggers],
        ]
        applied = self.run(self.rig.apply(*entries))
        self.model.notify(notifications, self.now)
        hits = [self.model.cancel(one) for one in cancels]
        runs = [self.model.trigger(batch, end, self.now) for batch, end in triggers]
        found = _results(applied, len(notifications))
        assert [(one.changed, one.already_left) for one in found[: len(hits)]] == hits
        assert [None if one.is_repeated else one.changed for one in found[len(hits) :]] == runs

    def fire(self, timers: Sequence[tuple[UUID, datetime]]) -> None:
        tenant = self.rig.tenant
        closes = [link_pb2.CloseWindow(window_id=one.bytes, due_time=to_timestamp(due)) for one, due in timers]
        self.run(self.rig.apply(*[link_pb2.Entry(tenant=tenant, close_window=one) for one in closes]))
        self.fired |= set(timers)
        for one, due in timers:
            if one in self.known:
                self.model.wake(self.known[one], due)
        self.run(self.collect())

    def next_sequence(self, lag: int | None) -> int:
        """The next one; or one from before; or none."""
        if lag is None:
            return 0
        self.rig.sequence += 1
        return max(1, self.rig.sequence - lag)

    def telling(self, one: dict[str, Any]) -> Told:
        one = dict(one)
        ago, lives, lag = one.pop("ago"), one.pop("lives"), one.pop("lag")
        # On the hour sharp, where windows end.
        at = self.now.replace(minute=0, second=0, microsecond=0) if ago is None else self.now - ago
        return Told(
            id=derived_id("told", len(self.told), self.rig.sequence, str(sorted(one.items(), key=str))),
            at=at,
            expires=None if lives is None else self.now + lives,
            sequence=self.next_sequence(lag),
            **one,
        )

    def _notification(self, one: Told) -> link_pb2.Entry:
        payload: dict[str, Any] = {"title": f"={one.id}="} | ({} if one.number is None else {"n": one.number})
        return self.rig.notification(
            *one.subscribers,
            topics=one.topics,
            type=one.type,
            entity=one.entity,
            payload=payload,
            at=one.at,
            expires=one.expires,
            one_id=one.id,
            sequence=one.sequence,
            priority=timer_pb2.PRIORITY_HIGH if one.is_urgent else timer_pb2.PRIORITY_NORMAL,
            timeline=one.timeline,
        )

    def _cancel(self, one: Cancel) -> link_pb2.Entry:
        return self.rig.cancel(one.entity, sequence=one.sequence, type=one.type, timeline=one.timeline)

    def put_subscriber(self, name: str, one: Subscriber) -> None:
        quiet = [
            pb.QuietHours(from_time_of_day=f"{start:02}:00", until_time_of_day=f"{until:02}:00")
            for start, until in one.quiet
        ]
        fields = {"email": one.email, "webhook_url": one.webhook_url, "quiet_hours": quiet}
        self.run(self.rig.put_subscriber(name, one.zone, **fields))
        self.model.put_subscriber(name, one, self.now)

    def put_subscription(self, number: int, one: Subscription) -> None:
        message = pb.Subscription(
            id=f"s{number}",
            subscriber=one.subscriber,
            type=one.type,
            topic=one.topic,
            filter="" if one.least is None else f"payload.n > {one.least}",
            choices=[
                pb.Choice(cadence=choice.cadence, channel=CHANNELS[choice.channel], style=STYLES[choice.style])  # type: ignore[arg-type]
                for choice in one.choices
            ],
        )
        self.run(self.rig.call("PutSubscriptions", subscriptions=[message]))
        self.model.subscriptions[f"s{number}"] = one

    def put_type(self, name: str) -> None:
        one = self.model.types[name]
        self.run(
            self.rig.put_type(
                name,
                default_cadence=one.default_cadence,
                default_channel=CHANNELS[one.default_channel],
                is_mandatory=one.is_mandatory,
                retention=to_duration(one.retention),
                payload_schema='{"required": ["n"]}' if one.needs_number else "",
            )
        )

    def put_cadence(self, name: str, one: Cadence) -> None:
        match one:
            case Aligned():
                hours = ",".join(map(str, one.hours))
                self.run(self.rig.put_daily(name, cron=f"0 {hours} * * *", zone=one.zone))
            case External():
                external = pb.ExternalCadence(batch=one.batch, fallback_after=to_duration(one.fallback))
                self.run(self.rig.call("PutCadence", cadence=pb.Cadence(id=name, external=external)))
            case Rolling():
                self.run(
                    self.rig.put_rolling(
                        name,
                        duration=one.duration,
                        extension=one.extension or None,
                        cap=one.cap,
                        maximum_items=one.maximum,
                        is_leading=one.is_leading,
                    )
                )
        self.model.put_cadence(name, one)

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        async with self.rig.db.read() as tx:
            return await (await tx.raw.execute(query)).fetchall()


def _results(applied: Applied, first: int) -> list[link_pb2.EntryResult]:
    """The answers to entries from `first` on, in their order."""
    ((*results,),) = applied.results.values() if applied.results else ((),)
    return sorted((one for one in results if one.index >= first), key=lambda one: one.index)


def _check_same(real: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    """Tell what is not the same: key, real value, wanted value."""
    differences = [
        (key, real.get(key), wanted.get(key))
        for key in [*wanted, *(real.keys() - wanted.keys())]
        if real.get(key) != wanted.get(key)
    ]
    assert not differences, differences
