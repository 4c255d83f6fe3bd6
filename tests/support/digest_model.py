"""Digest as its README says it is, in plain Python: the naive model that a state machine compares the real one with.

One thing at a time, everything in lists and dicts that are searched from end to end; nothing is taken from the service.
Where the service works on sets, in an order of its own, the model goes through items by time and id: the README says
that what comes of it does not depend on how items came in frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, time, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

from tests.support.digest_words import (
    DAY,
    KEPT_OTHERWISE,
    KEPT_RUNS,
    Aligned,
    Cadence,
    Cancel,
    Choice,
    External,
    Item,
    ItemKey,
    Key,
    Rolling,
    Subscriber,
    Subscription,
    Told,
    Type,
    Window,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """One way in which somebody is told, with everything that was left open filled in."""

    choice: Choice
    format: str
    lead_style: str
    least: int | None


@dataclass(slots=True)
class Model:
    """Everything there is. Methods take the time; each is one frame's, call's or loop's work."""

    types: dict[str, Type] = field(default_factory=dict)
    subscribers: dict[str, Subscriber] = field(default_factory=dict)
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    cadences: dict[str, Cadence] = field(default_factory=dict)
    notifications: dict[UUID, Told] = field(default_factory=dict)
    items: dict[ItemKey, Item] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    tombstones: list[Cancel] = field(default_factory=list)
    runs: dict[tuple[str, datetime], datetime] = field(default_factory=dict)
    asked: set[tuple[Window, datetime]] = field(default_factory=set)
    """Timers that were asked for: windows, and when they want to be woken."""
    unasked: set[Window] = field(default_factory=set)
    """Windows that were opened and filled by one frame: they need no timer, and may have one."""

    def waiting_in(self, window: Window) -> list[ItemKey]:
        """The items that wait in a window."""
        return [key for key, item in self.items.items() if item.window is window and item.state == "pending"]

    # What comes

    def notify(self, frame: Sequence[Told], now: datetime) -> None:
        """Expand a frame of notifications."""
        fresh: dict[UUID, Told] = {}
        for told in frame:
            if told.id not in self.notifications:
                fresh.setdefault(told.id, told)
        self.notifications |= fresh
        before = set(self.windows)
        for told in sorted(fresh.values(), key=lambda one: (one.at, one.id)):
            for subscriber, choice, candidates in self._recipients(told):
                self._place(told, (told.id, subscriber, choice), candidates, now)
        for window in set(self.windows) - before:
            if window.kind == "rolling" and window.state == "closing":
                self.unasked.add(window)

    def _recipients(self, told: Told) -> Iterator[tuple[str, str, list[_Candidate]]]:
        """Subscriber and choice of every item, with the ways that lead to it; none: a topic nobody listens to."""
        found: dict[tuple[str, str], list[_Candidate]] = {}
        routes: list[tuple[str, Choice, int | None]] = []
        for name in set(told.subscribers):
            mine = self._most_specific(told.type, "", name)
            routes += [(name, choice, one.least) for one in mine for choice in one.choices]
            if not mine:
                routes.append((name, Choice(cadence=""), None))
        for topic in set(told.topics):
            listeners = [one.subscriber for one in self._matching(told.type, topic)]
            if not listeners:
                yield "", f"topic:{topic}", []
            for name in set(listeners):
                mine = self._most_specific(told.type, topic, name)
                routes += [(name, choice, one.least) for one in mine for choice in one.choices]
        for name, choice, least in routes:
            one = self._filled_in(told.type, choice, least)
            words = (one.choice.cadence, one.choice.channel, one.format, one.choice.style)
            found.setdefault((name, "/".join(words)), []).append(one)
        for (name, words_of_it), candidates in found.items():
            yield name, words_of_it, candidates

    def _matching(self, kind: str, topic: str) -> list[Subscription]:
        return [
            one
            for one in self.subscriptions.values()
            if one.topic == topic and (one.type == kind or (one.type.endswith("*") and kind.startswith(one.type[:-1])))
        ]

    def _most_specific(self, kind: str, topic: str, subscriber: str) -> list[Subscription]:
        mine = [one for one in self._matching(kind, topic) if one.subscriber == subscriber]
        exact = [one for one in mine if not one.type.endswith("*")]
        longest = max((len(one.type) for one in mine), default=0)
        return exact or [one for one in mine if len(one.type) == longest]

    def _filled_in(self, kind: str, choice: Choice, least: int | None) -> _Candidate:
        known = self.types.get(kind, Type(default_cadence="", default_channel=""))
        cadence = choice.cadence
        if cadence == "" or (cadence == "off" and known.is_mandatory):
            cadence = known.default_cadence
        channel = choice.channel or known.default_channel
        style = choice.style or ("full" if cadence == "immediate" else "summary")
        return _Candidate(
            choice=Choice(cadence=cadence, channel=channel, style=style),
            format={"email": "html", "webhook": "json"}.get(channel, "text"),
            lead_style=choice.style or "full",
            least=None if known.is_mandatory else least,
        )

    def _place(self, told: Told, key: ItemKey, candidates: Sequence[_Candidate], now: datetime) -> None:
        state, reason = self._verdict(told, key, candidates, now)
        if state == "pending" and not any(_wants(one, told) for one in candidates):
            state, reason = "suppressed", "filter"
        if state != "pending":
            self.items[key] = Item(state=state, reason=reason, ended_at=now)
            return
        self.items[key] = Item(state=state, window=self._window_for(told, key[1], candidates, now))

    def _verdict(self, told: Told, key: ItemKey, candidates: Sequence[_Candidate], now: datetime) -> tuple[str, str]:
        if told.sequence > 0 and told.entity and any(one.matches(told) for one in self.tombstones):
            return "cancelled", ""
        if told.expires is not None and told.expires <= now:
            return "expired", ""
        known, subscriber = self.types.get(told.type), self.subscribers.get(key[1])
        choice = candidates[0].choice if candidates else Choice(cadence="")
        reasons = [
            ("payload_invalid", known is not None and known.needs_number and told.number is None),
            ("no_subscriber", not candidates),
            ("unknown_type", known is None),
            ("unknown_subscriber", subscriber is None),
            ("off", choice.cadence == "off"),
            ("no_address", subscriber is not None and not _address(subscriber, choice.channel)),
        ]
        reason = next((reason for reason, holds in reasons if holds), "")
        return ("suppressed", reason) if reason else ("pending", "")

    def _window_for(self, told: Told, subscriber: str, candidates: Sequence[_Candidate], now: datetime) -> Window:
        one = candidates[0]
        key = (subscriber, one.choice.cadence, one.choice.channel, one.format, one.choice.style)
        if one.choice.cadence == "immediate":
            return self._alone(key, told, now)
        match self.cadences[one.choice.cadence]:
            case Aligned() as rule:
                return self._aligned(key, rule, told, now)
            case External() as rule:
                return self._open_one(key, "external") or self._opened(
                    Window(
                        key=key,
                        kind="external",
                        opened_at=min(now, told.at),
                        due_at=now + rule.fallback,
                        batch=rule.batch,
                    )
                )
            case Rolling() as rule:
                lead_style = min(candidate.lead_style for candidate in candidates)
                return self._rolling(key, rule, told, lead_style, now)

    def _alone(self, key: Key, told: Told, now: datetime) -> Window:
        window = Window(key=key, kind="alone", state="closing", opened_at=now, due_at=now, is_urgent=told.is_urgent)
        self.windows.append(window)
        return window

    def _aligned(self, key: Key, rule: Aligned, told: Told, now: datetime) -> Window:
        zone = rule.zone or self.subscribers[key[0]].zone
        end = next_hour(rule.hours, zone, told.at)
        if end <= now and self._open_one(key, "aligned", end) is None:
            end = next_hour(rule.hours, zone, now)
        return self._open_one(key, "aligned", end) or self._opened(
            Window(
                key=key,
                kind="aligned",
                opened_at=min(now, told.at),
                due_at=end,
                slot=end,
                hours=() if rule.zone else rule.hours,
            )
        )

    def _rolling(self, key: Key, rule: Rolling, told: Told, lead_style: str, now: datetime) -> Window:
        window = self._open_one(key, "rolling") or self._opened(
            Window(
                key=key,
                kind="rolling",
                opened_at=min(now, told.at),
                due_at=now + rule.duration,
                rolling=rule,
                latest_at=now + (rule.cap or 4 * rule.duration),
            )
        )
        is_lead = rule.is_leading and window.placed == 0
        if window.placed and window.rolling is not None and window.latest_at is not None:
            window.due_at = min(window.latest_at, window.due_at + window.rolling.extension)
        window.placed += 1
        if window.rolling is not None and window.placed == window.rolling.full_at:
            window.state, window.due_at = "closing", now
        if is_lead:
            return self._alone((key[0], "immediate", *key[2:4], lead_style), told, now)
        return window

    def _open_one(self, key: Key, kind: str, slot: datetime | None = None) -> Window | None:
        alike = [one for one in self.windows if one.key == key and one.kind == kind and one.slot == slot]
        found = [one for one in alike if one.state == "open"]
        assert len(found) < 2
        return found[0] if found else None

    def _opened(self, window: Window) -> Window:
        self.windows.append(window)
        self.asked.add((window, window.due_at))
        return window

    def cancel(self, cancel: Cancel) -> tuple[int, int]:
        """Take items out and forbid what comes late; returns how many, and how many had left."""
        self.tombstones.append(cancel)
        hit = [item for key, item in self.items.items() if cancel.matches(self.notifications[key[0]])]
        waiting = [item for item in hit if item.state == "pending"]
        for item in waiting:
            item.state = "cancelled"
        return len(waiting), sum(item.state in ("digested", "sent_alone") for item in hit)

    def wake(self, window: Window, due: datetime) -> None:
        """A timer has fired."""
        if window.state != "open" and not window.is_held:
            return
        if window.due_at <= due:
            window.state, window.is_held = "closing", False
        elif window.kind == "rolling" and not window.is_held:
            self.asked.add((window, window.due_at))

    def trigger(self, batch: str, end: datetime, now: datetime) -> int | None:
        """Begin to close a batch's windows; returns how many, None if it had run before."""
        if (batch, end) in self.runs:
            return None
        self.runs[batch, end] = now
        due = [one for one in self.windows if one.batch == batch and one.state == "open" and one.opened_at <= end]
        for window in due:
            window.state = "closing"
        return len(due)

    def outcome(self, window: Window, word: str, at: datetime) -> None:
        """What became of a digest's only delivery; the latest word counts."""
        if window.told_at is None or at >= window.told_at:
            window.outcome, window.told_at = ("sent" if word == "sent" else "failed"), at

    # What loops do

    def close(self, now: datetime) -> None:
        """Render everything that is closing, unless quiet hours hold it."""
        for window in self.windows:
            if window.state == "closing" and not window.is_held:
                self._close(window, now)

    def _close(self, window: Window, now: datetime) -> None:
        for key in self.waiting_in(window):
            expires = self.notifications[key[0]].expires
            if expires is not None and expires <= now:
                self.items[key].state = "expired"
        waiting = [self.items[key] for key in self.waiting_in(window)]
        subscriber = self.subscribers.get(window.key[0])
        reason = "subscriber_deleted"
        if subscriber is not None:
            reason = "" if _address(subscriber, window.key[2]) else "no_address"
        if waiting and subscriber is not None and not reason and not window.is_urgent:
            until = quiet_until(subscriber, now)
            if until > now:
                window.is_held, window.due_at = True, until
                self.asked.add((window, until))
                return
        for item in waiting:
            item.state = "suppressed" if reason else "sent_alone" if window.kind == "alone" else "digested"
            item.reason = reason
        window.state, window.closed_at = "closed", now
        window.outcome = "pending" if waiting and not reason else ""

    def forget(self, now: datetime) -> None:
        """Delete what has been kept long enough."""
        for key in [key for key, item in self.items.items() if self._is_over(key, item, now)]:
            del self.items[key]
        known = {key[0] for key in self.items}
        self.notifications = {one_id: told for one_id, told in self.notifications.items() if one_id in known}
        full = {item.window for item in self.items.values()}
        shortest = min(one.retention for one in self.types.values())
        self.windows = [
            one for one in self.windows if one in full or one.closed_at is None or one.closed_at + shortest > now
        ]
        self.runs = {run: at for run, at in self.runs.items() if at > now - KEPT_RUNS}

    def _is_over(self, key: ItemKey, item: Item, now: datetime) -> bool:
        ended = item.window.closed_at if item.window else item.ended_at
        known = self.types.get(self.notifications[key[0]].type)
        return ended is not None and ended + (known.retention if known else KEPT_OTHERWISE) <= now

    # What people change

    def put_subscriber(self, name: str, one: Subscriber, now: datetime) -> None:
        """Store a subscriber: what is held is looked at again, a new zone moves open windows."""
        before = self.subscribers.get(name)
        self.subscribers[name] = one
        mine = [window for window in self.windows if window.key[0] == name]
        for window in mine:
            window.is_held = False
        if before is None or before.zone == one.zone:
            return
        aligned = [window for window in mine if window.kind == "aligned" and window.state == "open"]
        aligned.sort(
            key=lambda window: (bool(window.hours), window.id)
        )  # Of those that fall together the oldest stays.
        kept: list[Window] = []
        for window in aligned:
            due = next_hour(window.hours, one.zone, now) if window.hours else window.due_at
            target = next((other for other in kept if (other.key, other.due_at) == (window.key, due)), None)
            if target is not None:
                self._merge(window, target, now)
                continue
            window.due_at = window.slot = due
            if window.hours:
                self.asked.add((window, due))
            kept.append(window)

    def _merge(self, window: Window, target: Window, now: datetime) -> None:
        for item in self.items.values():
            if item.window is window:
                item.window = target
        window.state, window.closed_at = "closed", now

    def delete_subscriber(self, name: str) -> None:
        """What waits is suppressed; its windows close empty in their time."""
        self.subscribers.pop(name, None)
        self.subscriptions = {key: one for key, one in self.subscriptions.items() if one.subscriber != name}
        for key, item in self.items.items():
            if key[1] == name and item.state == "pending":
                item.state, item.reason = "suppressed", "subscriber_deleted"

    def put_cadence(self, name: str, one: Cadence) -> None:
        """Open windows keep their rule."""
        self.cadences[name] = one

    def put_type(self, name: str, **changed: str | bool) -> None:
        """What waits stays."""
        self.types[name] = replace(self.types[name], **changed)  # type: ignore[arg-type]  # The caller's to get right.


def _wants(one: _Candidate, told: Told) -> bool:
    return one.least is None or told.number is None or told.number > one.least


def _address(subscriber: Subscriber, channel: str) -> bool:
    return {"email": bool(subscriber.email), "webhook": bool(subscriber.webhook_url)}.get(channel, True)


def next_hour(hours: Sequence[int], zone: str, after: datetime) -> datetime:
    """The first of these hours of any day in a zone strictly after an instant; none of them in the night of DST."""
    here = ZoneInfo(zone)
    today = after.astimezone(here).date()
    instants = [
        datetime.combine(today + number * DAY, time(hour), here).astimezone(after.tzinfo)
        for number in (0, 1, 2)
        for hour in hours
    ]
    return min(instant for instant in instants if instant > after)


def quiet_until(subscriber: Subscriber, now: datetime) -> datetime:
    """When the quiet that holds at `now` ends, minute by minute; `now` itself when none does."""
    at = now
    while any(_is_quiet(hours, at.astimezone(ZoneInfo(subscriber.zone)).hour) for hours in subscriber.quiet):
        at = at.replace(second=0, microsecond=0) + timedelta(minutes=1)
    return at


def _is_quiet(hours: tuple[int, int], hour: int) -> bool:
    start, until = hours
    return start <= hour < until if start < until else hour >= start or hour < until
