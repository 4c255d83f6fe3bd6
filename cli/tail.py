"""`carillon tail`: what happens, as it happens.

Services are asked again and again for the newest of their lists: what is new there, or has another state than at the
last look, is told. What is older than the newest 200 of a list is not looked at any more, and a state that came and
went between two looks is not seen: this is for watching, `explain` and the lists are for knowing. Events are followed
on NATS, where they are published anyway, if CARILLON_NATS_URL says where that is.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import grpc
import typer
from carillon.digest.v1 import digest_pb2
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub
from carillon.dispatcher.v1 import dispatcher_pb2
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub
from carillon.intake.v1 import intake_pb2
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.link.v1 import status_pb2
from carillon.link.v1.status_pb2_grpc import StatusServiceStub
from carillon.scheduler.v1 import scheduler_pb2, timer_pb2
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub

from cli.connection import refusal_text
from cli.output import as_json, short, show_json, word
from cli.session import SERVICES, Exit, Session, command
from cli.timers import target_of
from cli.values import duration_of
from libs.wire import from_duration, from_timestamp, to_timestamp

KINDS: Final = {
    "requests": "intake",
    "timers": "scheduler",
    "digests": "digest",
    "deliveries": "dispatcher",
    "events": "NATS",
}
_NEWEST: Final = 200
_REMEMBERED: Final = 10_000
_LONGEST_LOOK_BACK: Final = timedelta(minutes=1)
_DECIDED: Final = (
    timer_pb2.TIMER_STATE_FIRED,
    timer_pb2.TIMER_STATE_SKIPPED,
    timer_pb2.TIMER_STATE_EXPIRED,
    timer_pb2.TIMER_STATE_DONE,
    timer_pb2.TIMER_STATE_FAILED,
    timer_pb2.TIMER_STATE_AWAITING,
    timer_pb2.TIMER_STATE_RETRYING,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "tail", services=SERVICES, needs_all=False)(_tail)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One thing as it was found: `state` says when it is worth telling again, `plain` is for programs."""

    kind: str
    id: str
    state: str
    time: datetime
    text: str
    plain: dict[str, Any]


async def _tail(
    session: Session,
    kinds: Annotated[
        list[str] | None, typer.Option("--only", help=f"{', '.join(KINDS)}; may be repeated. All without it.")
    ] = None,
    interval: Annotated[str, typer.Option("--interval", help="Between two looks.")] = "1s",
    lasting: Annotated[str, typer.Option("--for", help="So long; without it until Ctrl-C.")] = "",
    most: Annotated[int, typer.Option("--count", min=0, help="End after so many; 0 is no limit.")] = 0,
    nats_url: Annotated[
        str, typer.Option("--nats", envvar="CARILLON_NATS_URL", help="Where events are followed.", show_default=False)
    ] = "",
) -> int:
    """Follow what happens: requests, timers that fire, digests, deliveries and their outcomes, events.

    With --json one object a line.

    Exit codes: 0 at its end; 1 none of what is wanted can be followed; 2 usage.
    """
    unknown = sorted(set(kinds or ()) - KINDS.keys())
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there is {', '.join(KINDS)}.", param_hint="--only")
    wanted = [kind for kind in KINDS if not kinds or kind in kinds]
    looks = [look for kind in wanted if KINDS[kind] in session.connections and (look := _look(kind, session))]
    follows_events = "events" in wanted and bool(nats_url)
    if not looks and not follows_events:
        typer.echo("It is not known where what you want to follow is: give endpoints, or --nats for events.", err=True)
        return Exit.REFUSED
    pause = from_duration(duration_of(interval, "--interval"))
    limit_s = from_duration(duration_of(lasting, "--for")).total_seconds() if lasting else None
    queue: asyncio.Queue[Seen] = asyncio.Queue(maxsize=1000)
    tasks = [asyncio.create_task(_poll(looks, queue, pause))] if looks else []
    if follows_events:
        tenant = next(iter(session.connections.values())).tenant
        tasks.append(asyncio.create_task(_follow_events(nats_url, tenant, queue)))
    try:
        async with asyncio.timeout(limit_s):
            await _tell(session, queue, tasks, most)
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Exit.DONE


async def _tell(session: Session, queue: asyncio.Queue[Seen], tasks: Sequence[asyncio.Task[None]], most: int) -> None:
    told = 0
    while not most or told < most:
        getting = asyncio.create_task(queue.get())
        done, _ = await asyncio.wait([getting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if getting not in done:
            getting.cancel()
            for task in done:
                task.result()  # Nobody ends but by an error.
            return
        seen = getting.result()
        told += 1
        if session.is_json:
            head = {"kind": seen.kind, "id": seen.id, "state": seen.state, "time": seen.time.isoformat()}
            show_json({**head, "object": seen.plain}, is_line=True)
        else:
            time = seen.time.astimezone().isoformat(sep=" ", timespec="seconds")
            typer.echo(f"{time}  {seen.kind:<10} {seen.state:<10} {seen.text}")


# Lists


@dataclass(slots=True)
class Memory:
    """Which things have been told in which state; the oldest are forgotten."""

    _states: OrderedDict[tuple[str, str], str] = field(default_factory=OrderedDict)

    def is_news(self, seen: Seen) -> bool:
        """Whether it has not been told in this state; from now on it has."""
        key = (seen.kind, seen.id)
        is_news = self._states.get(key) != seen.state
        self._states[key] = seen.state
        self._states.move_to_end(key)
        while len(self._states) > _REMEMBERED:
            self._states.popitem(last=False)
        return is_news


Look = Callable[[], Awaitable[list[Seen]]]


async def _poll(looks: Sequence[Look], queue: asyncio.Queue[Seen], pause: timedelta) -> None:
    """What is there at the first look of a list has happened before, and is not told."""
    memory = Memory()
    complaints: dict[int, str] = {}
    begun: set[int] = set()
    while True:
        for number, look in enumerate(looks):
            try:
                found = await look()
            except grpc.aio.AioRpcError as error:
                text = refusal_text(error)
                if complaints.get(number) != text:
                    typer.echo(text, err=True)
                complaints[number] = text
                continue
            complaints.pop(number, None)
            news = [seen for seen in found if memory.is_news(seen)]
            if number in begun:
                for seen in sorted(news, key=lambda one: one.time):
                    await queue.put(seen)
            begun.add(number)
        await asyncio.sleep(pause.total_seconds())


def _look(kind: str, session: Session) -> Look | None:
    looks: dict[str, Callable[[Session], Look]] = {
        "requests": _requests,
        "timers": _timers,
        "digests": _digests,
        "deliveries": _deliveries,
    }
    return looks[kind](session) if kind in looks else None


def _requests(session: Session) -> Look:
    stub = session.stub("intake", IntakeServiceStub)

    async def look() -> list[Seen]:
        request = intake_pb2.ListRequestsRequest(page_size=_NEWEST)
        answer = await stub.ListRequests(request, timeout=session.timeout_s)
        return [
            Seen(
                kind="request",
                id=one.id,
                # Every answer is news.
                state=f"{word(intake_pb2.RequestState, one.state)} {len(one.responses) or ''}".strip(),
                time=from_timestamp(one.history[-1].time if one.history else one.submit_time),
                text=f"{one.request.customer} asks for {one.request.item}  {one.id}",
                plain=as_json(one),
            )
            for one in answer.requests
        ]

    return look


def _timers(session: Session) -> Look:
    stub, status = session.stub("scheduler", SchedulerServiceStub), session.stub("scheduler", StatusServiceStub)

    async def look() -> list[Seen]:
        # Business time need not be this machine's.
        now = from_timestamp((await status.GetStatus(status_pb2.GetStatusRequest(), timeout=session.timeout_s)).time)
        request = scheduler_pb2.ListTimersRequest(
            states=_DECIDED,
            from_time=to_timestamp(now - _LONGEST_LOOK_BACK),
            page_size=1000,
        )
        answer = await stub.ListTimers(request, timeout=session.timeout_s)
        return [
            Seen(
                kind="timer",
                id=one.id,
                state=word(timer_pb2.TimerState, one.state),
                time=from_timestamp(one.decided_time if one.HasField("decided_time") else one.fire_time),
                text=f"{one.entity}  {target_of(one.target)}  {one.id}",
                plain=as_json(one),
            )
            for one in answer.timers
        ]

    return look


def _digests(session: Session) -> Look:
    stub = session.stub("digest", DigestServiceStub)

    async def look() -> list[Seen]:
        request = digest_pb2.ListDigestsRequest(page_size=_NEWEST)
        answer = await stub.ListDigests(request, timeout=session.timeout_s)
        return [
            Seen(
                kind="digest",
                id=one.id,
                state=one.outcome,
                time=from_timestamp(one.close_time),
                text=f"{one.item_count} items for {one.subscriber}: {short(one.subject)}  {one.id}",
                plain=as_json(one),
            )
            for one in answer.digests
        ]

    return look


def _deliveries(session: Session) -> Look:
    stub = session.stub("dispatcher", DispatcherServiceStub)

    async def look() -> list[Seen]:
        request = dispatcher_pb2.ListDeliveriesRequest(page_size=_NEWEST)
        answer = await stub.ListDeliveries(request, timeout=session.timeout_s)
        return [
            Seen(
                kind="delivery",
                id=one.id,
                state=word(dispatcher_pb2.DeliveryState, one.state),
                time=from_timestamp(one.end_time if one.HasField("end_time") else one.create_time),
                text=f"{one.channel} to {one.subscriber}: {short(one.subject)} {one.reason}  {one.id}",
                plain=as_json(one),
            )
            for one in answer.deliveries
        ]

    return look


# Events


async def _follow_events(url: str, tenant: str, queue: asyncio.Queue[Seen]) -> None:
    """Those of one tenant, or of all that NATS's own permissions let us see, from now on."""
    async for event in _events(url, tenant):
        await queue.put(
            Seen(
                kind="event",
                id=str(event.get("id", "")),
                state="published",
                time=_time_of(event),
                text=f"{event.get('subject', '')}  {event.get('type', '')}  {event.get('carillontimerid', '')}",
                plain=event,
            )
        )


async def _events(url: str, tenant: str) -> AsyncIterator[dict[str, Any]]:
    # Hardly anybody needs a NATS client; the others need not wait for its import.
    import nats
    from nats.js.api import DeliverPolicy

    from libs.jetstream_options import connection_options
    from libs.settings import NatsSettings

    settings = NatsSettings(url=tuple(one.strip() for one in url.split(",")))
    client = await nats.connect(**connection_options(settings), name="carillon tail")
    try:
        subscription = await client.jetstream().subscribe(
            f"carillon.events.{tenant or '*'}.>",
            stream="EVENTS",
            ordered_consumer=True,
            deliver_policy=DeliverPolicy.NEW,
        )
        async for message in subscription.messages:
            with suppress(ValueError):
                yield json.loads(message.data)
    finally:
        await client.close()


def _time_of(event: dict[str, Any]) -> datetime:
    with suppress(ValueError, KeyError, TypeError):
        return datetime.fromisoformat(event["time"]).astimezone(UTC)
    return datetime.now(UTC)
