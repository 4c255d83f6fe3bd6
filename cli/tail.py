"""`carillon tail`: what happens, as it happens.

Services are asked again and again for the newest of their lists: what is new there, or has another state than at the
last look, is told. What is older than the newest 200 of a list is not looked at any more, and a state that came and
went between two looks is not seen: this is for watching, `explain` and the lists are for knowing. Events are followed
on NATS, where they are published anyway, if CARILLON_NATS_URL says where that is.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
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
from pydantic import ValidationError

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
    command(app, "tail", services=SERVICES, at_least=0)(_tail)


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

    Exit codes: 0 at its end; 1 none of what is wanted can be followed, or could be until its end; 2 usage.
    """
    unknown = sorted(set(kinds or ()) - KINDS.keys())
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there is {', '.join(KINDS)}.", param_hint="--only")
    wanted = [kind for kind in KINDS if not kinds or kind in kinds]
    looks = [look for kind in wanted if KINDS[kind] in session.connections and (look := _look(kind, session))]
    options = _nats_options(nats_url) if "events" in wanted and nats_url else None
    if not looks and options is None:
        typer.echo("It is not known where what you want to follow is: give endpoints, or --nats for events.", err=True)
        return Exit.REFUSED
    pause = from_duration(duration_of(interval, "--interval"))
    limit_s = from_duration(duration_of(lasting, "--for")).total_seconds() if lasting else None
    queue: asyncio.Queue[Seen] = asyncio.Queue(maxsize=1000)
    sources = Sources()
    tasks = [asyncio.create_task(_poll(looks, queue, pause, sources))] if looks else []
    if options is not None:
        tasks.append(asyncio.create_task(_follow_events(options, session, queue, sources)))
    try:
        async with asyncio.timeout(limit_s):
            await _tell(session, queue, tasks, most)
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Exit.REFUSED if sources.are_all_away else Exit.DONE


async def _tell(session: Session, queue: asyncio.Queue[Seen], tasks: Sequence[asyncio.Task[None]], most: int) -> None:
    told, following = 0, set(tasks)
    while following and (not most or told < most):
        getting = asyncio.create_task(queue.get())
        done, _ = await asyncio.wait([getting, *following], return_when=asyncio.FIRST_COMPLETED)
        for task in following & done:
            task.result()  # It has said why it goes on no more, or this raises it.
        following -= done
        if getting not in done:
            getting.cancel()
            continue
        seen = getting.result()
        told += 1
        if session.is_json:
            head = {"kind": seen.kind, "id": seen.id, "state": seen.state, "time": seen.time.isoformat()}
            show_json({**head, "object": seen.plain}, is_line=True)
        else:
            time = seen.time.astimezone().isoformat(sep=" ", timespec="seconds")
            typer.echo(f"{time}  {seen.kind:<10} {seen.state:<10} {seen.text}")


@dataclass(slots=True)
class Sources:
    """Which have answered yet, and what has been wrong with one since it last did; a source is a name or a number."""

    _answered: set[str | int] = field(default_factory=set)
    _complaints: dict[str | int, set[str]] = field(default_factory=dict)

    @property
    def are_all_away(self) -> bool:
        """Whether something is wrong, and nothing has ever answered."""
        return bool(self._complaints) and not self._answered

    def answered(self, source: str | int) -> bool:
        """It has; whether for the first time."""
        self._complaints.pop(source, None)
        is_first = source not in self._answered
        self._answered.add(source)
        return is_first

    def complain(self, source: str | int, text: str) -> None:
        """Tell it, once until the source answers again."""
        told = self._complaints.setdefault(source, set())
        if text not in told:
            typer.echo(text, err=True)
        told.add(text)


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


async def _poll(looks: Sequence[Look], queue: asyncio.Queue[Seen], pause: timedelta, sources: Sources) -> None:
    """What is there at the first look of a list has happened before, and is not told."""
    memory = Memory()
    while True:
        for number, look in enumerate(looks):
            try:
                found = await look()
            except grpc.aio.AioRpcError as error:
                sources.complain(number, refusal_text(error))
                continue
            news = [seen for seen in found if memory.is_news(seen)]
            if not sources.answered(number):
                for seen in sorted(news, key=lambda one: one.time):
                    await queue.put(seen)
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


def _nats_options(url: str) -> dict[str, Any]:
    """How to connect; BadParameter where address, settings or certificates cannot be used."""
    # Hardly anybody needs NATS; the others need not wait for what it imports.
    from libs.jetstream_options import connection_options
    from libs.settings import NatsSettings

    try:
        return connection_options(NatsSettings(url=tuple(one.strip() for one in url.split(","))))
    except ValidationError as error:
        found = [f"{one['loc'][0]}: {one['msg'].removeprefix('Value error, ')}." for one in error.errors()]
        wrong = " ".join(found)
    except OSError as error:
        wrong = f"certificates cannot be read: {error}."
    raise typer.BadParameter(wrong, param_hint="--nats")


async def _follow_events(
    options: dict[str, Any], session: Session, queue: asyncio.Queue[Seen], sources: Sources
) -> None:
    """Those of one tenant, or of all that NATS's own permissions let us see, from now on.

    Ends, having said why, where they cannot be followed within the time that a call has; later NATS may come and go.
    """
    from nats.aio.client import Client
    from nats.errors import Error
    from nats.js.api import DeliverPolicy
    from nats.js.errors import NotFoundError

    async def complain(error: Exception | str) -> None:
        text = str(error) or "nobody answers"
        sources.complain("events", f"Events cannot be followed at {','.join(options['servers'])}: {text}")

    client = Client()
    try:
        async with asyncio.timeout(session.timeout_s):
            await client.connect(**options, name="carillon tail", error_cb=complain)
            subscription = await client.jetstream().subscribe(
                f"carillon.events.{session.tenant or '*'}.>",
                stream="EVENTS",
                ordered_consumer=True,
                deliver_policy=DeliverPolicy.NEW,
            )
        sources.answered("events")
        async for message in subscription.messages:
            sources.answered("events")
            with suppress(ValueError):
                await queue.put(_seen(json.loads(message.data)))
    except NotFoundError:
        await complain("there is no stream EVENTS; schedulers make it.")
    except (OSError, Error) as error:
        # That the time is over says less than why it was not enough.
        await complain((isinstance(error, TimeoutError) and client.last_error) or error)
    finally:
        await client.close()


def _seen(event: dict[str, Any]) -> Seen:
    return Seen(
        kind="event",
        id=str(event.get("id", "")),
        state="published",
        time=_time_of(event),
        text=f"{event.get('subject', '')}  {event.get('type', '')}  {event.get('carillontimerid', '')}",
        plain=event,
    )


def _time_of(event: dict[str, Any]) -> datetime:
    with suppress(ValueError, KeyError, TypeError):
        return datetime.fromisoformat(event["time"]).astimezone(UTC)
    return datetime.now(UTC)
