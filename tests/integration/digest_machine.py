"""Random histories of digest beside its naive model: a Hypothesis state machine over a real Postgres.

After every step the database must say what the model says: every item in its one state and window (INV-6), windows
open, held and due as they should be, timers asked for, the ledger. What went out is read from the messages themselves:
each names exactly the items that the model has in that window (INV-7), and nothing joins what has begun to close.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from carillon.link.v1 import link_pb2
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from libs.ids import derived_id
from libs.wire import to_timestamp
from services.digest import store_history
from services.digest.loops_history import History
from tests.integration.digest_beside import Beside, World
from tests.integration.digest_draws import (
    CADENCES,
    HOUR,
    MINUTE,
    NAMES,
    RULES,
    TYPES,
    cadences,
    cancels,
    frames,
    subscribers,
    subscriptions,
    tellings,
    triggers,
)
from tests.support.digest_words import DAY, Cadence, Cancel, Subscriber, Subscription


class DigestMachine(Beside, RuleBasedStateMachine):
    """Histories; each begins with an empty database, four subscribers and five cadences."""

    def __init__(self, world: World) -> None:
        RuleBasedStateMachine.__init__(self)
        Beside.__init__(self, world)

    @initialize(who=st.tuples(*[subscribers] * len(NAMES)), what=st.lists(subscriptions, min_size=2, max_size=5))
    def begin(self, who: Sequence[Subscriber], what: Sequence[Subscription]) -> None:
        """Fill the catalog."""
        self.run(self.world.empty())
        for name, cadence in CADENCES.items():
            self.put_cadence(name, cadence)
        for name, one in TYPES.items():
            self.model.types[name] = one
            self.put_type(name)
        for name, subscriber in zip(NAMES, who, strict=True):
            self.put_subscriber(name, subscriber)
        for number, subscription in enumerate(what):
            self.put_subscription(number, subscription)

    def teardown(self) -> None:
        """Whatever happened, in the end everything that waits leaves, and then everything is forgotten."""
        if not self.model.types:
            return
        for name in NAMES:  # Otherwise what they hold could come a day later again and again.
            self.put_subscriber(name, Subscriber(email="a@example.com", webhook_url="https://example.com"))
        for _ in range(4):
            self.rig.clock.at += 5 * DAY
            self.all_timers()
            self.close()
            self.agree()
        assert all(item.state != "pending" for item in self.model.items.values())
        self.rig.clock.at += 200 * DAY
        self.forget(at_once=100)
        for table in ("notification", "item", "digest_window", "digest", "delivery", "ended"):
            assert self.run(self.rows(f"SELECT FROM {table}")) == []

    # What comes

    @rule(frame=frames)
    def tell(self, frame: list[dict[str, Any]]) -> None:
        """A frame of notifications."""
        self.apply(notifications=[self.telling(one) for one in frame])

    @rule(frame=frames, subscriber=st.sampled_from(NAMES), again=st.lists(st.integers(0, 99), max_size=2))
    def tell_one_person(self, frame: list[dict[str, Any]], subscriber: str, again: list[int]) -> None:
        """A frame for one subscriber, so that windows fill; some of it has come before, or comes twice."""
        fresh = [self.telling({**one, "subscribers": (subscriber,), "topics": ()}) for one in frame]
        known = [*self.told, *fresh]
        self.apply(notifications=[*fresh, *[known[number % len(known)] for number in again]])

    @rule(one=tellings, count=st.integers(2, 9), subscriber=st.sampled_from(NAMES))
    def tell_much(self, one: dict[str, Any], count: int, subscriber: str) -> None:
        """So much of one kind that rolling windows are full, several by one frame."""
        burst = {**one, "subscribers": (subscriber,), "lag": 0, "lives": None}
        ago = one["ago"] or timedelta(0)
        self.apply(notifications=[self.telling({**burst, "ago": ago + number * MINUTE}) for number in range(count)])

    @rule(cancelled=cancels, frame=st.lists(tellings, max_size=2), late=st.lists(tellings, max_size=2))
    def cancel(self, cancelled: dict[str, Any], frame: list[dict[str, Any]], late: list[dict[str, Any]]) -> None:
        """A cancel, perhaps in one frame with what it cancels; what was accepted before it may come after it."""
        about = {"entity": cancelled["entity"]}
        overtaken = [self.telling({**one, **about}) for one in late]
        sequence = self.next_sequence(cancelled["lag"])
        self.apply(
            notifications=[self.telling({**one, **about}) for one in frame],
            cancels=[Cancel(sequence=sequence, **about, type=cancelled["type"], timeline=cancelled["timeline"])],
        )
        if overtaken:
            self.apply(notifications=overtaken)

    @rule(run=triggers, frame=st.lists(tellings, max_size=3))
    def trigger(self, run: tuple[str, timedelta], frame: list[dict[str, Any]]) -> None:
        """A batch's trigger, perhaps in one frame with what it closes."""
        for_dan = [{**one, "type": "order.made", "subscribers": (*one["subscribers"], "dan")} for one in frame]
        self.apply(notifications=[self.telling(one) for one in for_dan], triggers=[(run[0], self.now - run[1])])

    @rule()
    def all_timers(self) -> None:
        """Whatever is due fires; a timer that asks again at once fires again."""
        while due := [one for one in self.timers if one[1] <= self.now and one not in self.fired]:
            self.fire(due)

    @precondition(lambda self: self.timers)
    @rule(number=st.integers(0, 999))
    def one_timer(self, number: int) -> None:
        """One that is due, or that has fired long ago, comes; the others are late."""
        if due := [one for one in self.timers if one[1] <= self.now]:
            self.fire([due[number % len(due)]])

    @precondition(lambda self: any(window.outcome for window in self.model.windows))
    @rule(number=st.integers(0, 999), word=st.sampled_from(["sent", "dead"]), ago=st.sampled_from([0, 1]))
    def outcome(self, number: int, word: str, ago: int) -> None:
        """The dispatcher says what became of a delivery."""
        digests = [window for window in self.known.values() if window.outcome]
        window, at = digests[number % len(digests)], self.now - ago * HOUR
        assert window.id is not None
        told = link_pb2.DeliveryOutcome(
            delivery_id=derived_id("delivery", window.id, 1).bytes,
            digest_id=window.id.bytes,
            outcome=word,
            end_time=to_timestamp(at),
        )
        self.run(self.rig.apply(link_pb2.Entry(tenant=self.rig.tenant, delivery_outcome=told)))
        self.model.outcome(window, word, at)

    # What loops do

    @rule()
    def close(self) -> None:
        """Everything that is closing is rendered."""
        self.run(self.rig.close())
        self.model.close(self.now)

    @rule(at_once=st.sampled_from([1, 3, 100]))
    def forget(self, at_once: int) -> None:
        """What is over is deleted."""
        history = History(db=self.rig.db, store=store_history, clock=self.rig.clock)
        self.run(history.forget_once(at_once=at_once))
        self.model.forget(self.now)
        kept = set(self.model.windows)
        self.known = {one_id: window for one_id, window in self.known.items() if window in kept}

    @rule(passed=st.sampled_from([MINUTE, 20 * MINUTE, HOUR, 3 * HOUR, 9 * HOUR, DAY, 2 * DAY]))
    def wait(self, passed: timedelta) -> None:
        """Time passes, and timers are late."""
        self.rig.clock.at += passed

    @precondition(lambda self: any(one not in self.fired for one in self.timers))
    @rule(closes=st.booleans())
    def next_timer(self, closes: bool) -> None:
        """Time passes until the next timer, to the instant."""
        self.rig.clock.at = max(self.now, min(due for one, due in self.timers if (one, due) not in self.fired))
        self.all_timers()
        if closes:
            self.close()

    # What people change

    @rule(name=st.sampled_from(NAMES), one=st.one_of(*[subscribers] * 5, st.none()))
    def change_subscriber(self, name: str, one: Subscriber | None) -> None:
        """Another zone, address, quiet hours; or deleted; or back again."""
        if one is not None:
            self.put_subscriber(name, one)
            return
        self.run(self.rig.call("DeleteSubscriber", id=name))
        self.model.delete_subscriber(name)

    @rule(number=st.integers(0, 5), one=st.one_of(subscriptions, subscriptions, subscriptions, st.none()))
    def subscribe(self, number: int, one: Subscription | None) -> None:
        """A subscription more, another one in its place, or one less."""
        if one is None:
            self.run(self.rig.call("DeleteSubscription", id=f"s{number}"))
            self.model.subscriptions.pop(f"s{number}", None)
        elif one.subscriber in self.model.subscribers:
            self.put_subscription(number, one)

    @rule(name=st.sampled_from(list(CADENCES)), one=st.sampled_from(RULES))
    def change_cadence(self, name: str, one: Cadence) -> None:
        """Another rule, perhaps of another kind, while windows are open."""
        self.put_cadence(name, one)

    @rule(name=st.sampled_from(list(TYPES)), default=cadences, is_mandatory=st.booleans())
    def change_type(self, name: str, default: str, is_mandatory: bool) -> None:
        """What those hear who have chosen nothing, or may not choose."""
        if not (is_mandatory and default == "off"):
            self.model.put_type(name, default_cadence=default, is_mandatory=is_mandatory)
            self.put_type(name)

    # What must hold

    @invariant()
    def agree(self) -> None:
        """INV-6, INV-7: database, messages and model say the same."""
        if self.model.types:
            self.run(self.compare())
