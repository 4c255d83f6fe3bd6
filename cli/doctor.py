"""`carillon doctor`: what is wrong, and what to do about it.

Only what services say of themselves is asked: health, status, backlogs, dead frames, shards, dead letters. What stands
on something broken is not reported as broken too: of a service that cannot be reached nothing else is asked.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

import grpc
import typer
from carillon.dispatcher.v1 import dispatcher_pb2
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub
from carillon.link.v1 import backlog_pb2, dead_frame_pb2, status_pb2
from carillon.link.v1.backlog_pb2_grpc import BacklogServiceStub
from carillon.link.v1.dead_frame_pb2_grpc import DeadFrameServiceStub
from carillon.link.v1.status_pb2_grpc import StatusServiceStub
from carillon.scheduler.v1 import scheduler_pb2
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from rich.markup import escape
from rich.table import Table

from cli.connection import refusal_text
from cli.output import new_console, show_json
from cli.session import SERVICES, Exit, Session, command
from libs.settings_base import format_duration
from libs.wire import from_duration, from_timestamp

CLOCK_TOLERANCE: Final = timedelta(seconds=2)
OLD_FRAME: Final = timedelta(minutes=1)
LATE_SHARD: Final = timedelta(minutes=1)


class Verdict(StrEnum):
    """How a check ended."""

    GOOD = "good"
    NOTE = "note"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check came to; `advice` is what to do, where there is something to do."""

    service: str
    check: str
    verdict: Verdict
    text: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "doctor", services=SERVICES, at_least=1)(_doctor)


async def _doctor(session: Session) -> int:
    """Check connection, credential, clock, versions, NATS, shards and backlogs, and say what is wrong and what to do.

    Backlogs and frames that were put aside are told to callers with the role operator; for others they are left out.

    Exit codes: 0 nothing is wrong; 1 something is; 2 usage.
    """
    findings = await examine(session)
    if session.is_json:
        is_well = not any(one.verdict is Verdict.BAD for one in findings)
        show_json({"isWell": is_well, "findings": [asdict(one) for one in findings]})
    else:
        _show(findings)
    return Exit.REFUSED if any(one.verdict is Verdict.BAD for one in findings) else Exit.DONE


async def examine(session: Session) -> list[Finding]:
    """All findings, by service."""
    found: list[Finding] = []
    versions: dict[str, str] = {}
    parts = await asyncio.gather(*(Examination(session, name, versions).run() for name in session.connections))
    for part in parts:
        found += part
    found += [
        Finding(
            name,
            "connection",
            Verdict.NOTE,
            "not asked: it is not known where it is.",
            f"Set CARILLON_{name.upper()}_ENDPOINT, or {name}_endpoint in a profile.",
        )
        for name in SERVICES
        if name not in session.connections
    ]
    if len(set(versions.values())) > 1:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        advice = "Fine during a roll-out; otherwise bring all to one version."
        found.append(Finding("all", "versions", Verdict.NOTE, f"They differ: {text}.", advice))
    return found


class Examination:
    """Of one service; enters its version in `versions`."""

    def __init__(self, session: Session, service: str, versions: dict[str, str]) -> None:
        self._session, self._service, self._versions = session, service, versions
        self._timeout_s = session.timeout_s

    async def run(self) -> list[Finding]:
        """In the order in which one stands on the other."""
        found = [one async for one in self._connection()]
        if any(one.verdict is Verdict.BAD for one in found):
            return found
        found += [one async for one in self._status()]
        if any(one.verdict is Verdict.BAD and one.check in ("credential", "Postgres") for one in found):
            return found
        checks: list[Callable[[], AsyncIterator[Finding]]] = [self._backlogs, self._dead_frames]
        if self._service == "scheduler":
            checks.append(self._shards)
        if self._service == "dispatcher":
            checks.append(self._dead_letters)
        for check in checks:
            found += [one async for one in check()]
        return found

    def _finding(self, check: str, verdict: Verdict, text: str, advice: str = "") -> Finding:
        return Finding(self._service, check, verdict, text, advice)

    async def _connection(self) -> AsyncIterator[Finding]:
        endpoint = self._session.connections[self._service].endpoint
        stub = self._session.stub(self._service, HealthStub)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            yield self._finding(
                "connection",
                Verdict.BAD,
                f"{endpoint} cannot be reached: {refusal_text(error)}",
                "Check that it runs, that host and port are right, and whether it wants --tls (or --ca-file).",
            )
            return
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            yield self._finding("connection", Verdict.GOOD, f"{endpoint} answers and serves.")
        else:
            yield self._finding(
                "connection",
                Verdict.BAD,
                f"{endpoint} answers, and does not serve: it is starting or stopping.",
                "Wait; if it stays so, look at its log.",
            )

    async def _status(self) -> AsyncIterator[Finding]:
        stub = self._session.stub(self._service, StatusServiceStub)
        asked = time.monotonic()
        try:
            status: status_pb2.GetStatusResponse = await stub.GetStatus(
                status_pb2.GetStatusRequest(), timeout=self._timeout_s
            )
        except grpc.aio.AioRpcError as error:
            yield self._no_status(error)
            return
        round_trip = timedelta(seconds=time.monotonic() - asked)
        yield self._finding("credential", Verdict.GOOD, "accepted.")
        if status.service != self._service:
            yield self._finding(
                "connection", Verdict.BAD, f"This is {status.service}, not {self._service}.", "Mend the endpoint."
            )
        self._versions[self._service] = status.version
        yield self._finding("version", Verdict.GOOD, f"{status.version}, replica {status.replica}.")
        yield self._clock(status, round_trip)
        if not status.is_postgres_alive:
            advice = "Its log says why: address, credentials, or Postgres is down. Nothing is accepted meanwhile."
            yield self._finding("Postgres", Verdict.BAD, "Postgres does not answer this process.", advice)
        if status.is_nats_connected:
            yield self._finding("NATS", Verdict.GOOD, "connected.")
        else:
            advice = "Check CARILLON_NATS_URL of the service and NATS itself. Nothing is lost: frames wait in Postgres."
            yield self._finding("NATS", Verdict.BAD, "This process has no connection to NATS.", advice)

    def _no_status(self, error: grpc.aio.AioRpcError) -> Finding:
        text = refusal_text(error)
        match error.code():
            case grpc.StatusCode.UNAUTHENTICATED:
                advice = "Set CARILLON_TOKEN or CARILLON_TOKEN_FILE to a token that it knows and that has not expired."
                return self._finding("credential", Verdict.BAD, text, advice)
            case grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.INVALID_ARGUMENT:
                return self._finding("credential", Verdict.BAD, text, "Check CARILLON_TENANT against the token.")
            case grpc.StatusCode.UNIMPLEMENTED:
                advice = "Bring it to the version of this command."
                return self._finding("version", Verdict.NOTE, "It is older and does not tell its status.", advice)
            case _:
                return self._finding("status", Verdict.BAD, text, "Look at its log.")

    def _clock(self, status: status_pb2.GetStatusResponse, round_trip: timedelta) -> Finding:
        theirs = from_timestamp(status.time)
        if status.is_test_clock:
            return self._finding("clock", Verdict.NOTE, f"Business time is a test clock, at {theirs:%Y-%m-%d %H:%M}Z.")
        difference = theirs - (datetime.now(UTC) - round_trip / 2)
        if abs(difference) <= CLOCK_TOLERANCE + round_trip / 2:
            return self._finding("clock", Verdict.GOOD, f"within {format_duration(CLOCK_TOLERANCE)} of this machine's.")
        ahead = "ahead of" if difference > timedelta(0) else "behind"
        return self._finding(
            "clock",
            Verdict.BAD,
            f"{format_duration(_rounded(abs(difference)))} {ahead} this machine's.",
            "Business time is Postgres's clock: set the time (NTP) of its machine, or of this one.",
        )

    async def _backlogs(self) -> AsyncIterator[Finding]:
        stub = self._session.stub(self._service, BacklogServiceStub)
        answer = await self._asked(stub.ListBacklogs, backlog_pb2.ListBacklogsRequest())
        if isinstance(answer, Finding):
            yield answer
            return
        for one in answer.backlogs:
            age = from_duration(one.oldest_age)
            text = f"{one.frames:,} frames to {one.receiver}, the oldest for {format_duration(_rounded(age))}."
            if age > OLD_FRAME:
                advice = f"Check that {one.receiver} runs and is connected to NATS; its log says what it cannot apply."
                yield self._finding("backlog", Verdict.BAD, text, advice)
            else:
                yield self._finding("backlog", Verdict.GOOD, text)
        if not answer.backlogs:
            yield self._finding("backlog", Verdict.GOOD, "everything it sent has its receipt.")

    async def _dead_frames(self) -> AsyncIterator[Finding]:
        stub = self._session.stub(self._service, DeadFrameServiceStub)
        answer = await self._asked(stub.ListDeadFrames, dead_frame_pb2.ListDeadFramesRequest(page_size=1))
        if isinstance(answer, Finding):
            return  # For the same reason as the backlogs, which have said it.
        if answer.total:
            yield self._finding(
                "dead frames",
                Verdict.BAD,
                f"{answer.total:,} frames were put aside, the last because: {answer.dead_frames[0].reason}",
                "`carillon dead-letters frames` lists them, `… redrive-frames` applies them once more.",
            )

    async def _shards(self) -> AsyncIterator[Finding]:
        stub = self._session.stub(self._service, SchedulerServiceStub)
        status_stub = self._session.stub(self._service, StatusServiceStub)
        status = await self._asked(status_stub.GetStatus, status_pb2.GetStatusRequest())
        answer = await self._asked(stub.ListShards, scheduler_pb2.ListShardsRequest())
        for one in (status, answer):
            if isinstance(one, Finding):
                yield one
                return
        shards = answer.shards
        free = [str(one.number) for one in shards if not one.holder]
        if free:
            advice = "A moment after a restart that is well; otherwise start more schedulers, or look at their logs."
            yield self._finding("shards", Verdict.BAD, f"Nobody holds {', '.join(free)}.", advice)
        now = from_timestamp(status.time)
        late = [one for one in shards if one.due and now - from_timestamp(one.watermark_time) > LATE_SHARD]
        if late:
            text = f"{sum(one.due for one in late):,} timers in {len(late)} shards have been due for over a minute."
            yield self._finding("shards", Verdict.BAD, text, "Look at the schedulers' load and logs; add replicas.")
        if not free and not late:
            holders = len({one.holder for one in shards})
            yield self._finding("shards", Verdict.GOOD, f"{len(shards)} shards, held by {holders}; none is late.")

    async def _dead_letters(self) -> AsyncIterator[Finding]:
        stub = self._session.stub(self._service, DispatcherServiceStub)
        answer = await self._asked(stub.CountDeadLetters, dispatcher_pb2.CountDeadLettersRequest())
        if isinstance(answer, Finding):
            yield answer
        elif answer.total:
            most = answer.counts[0]
            yield self._finding(
                "dead letters",
                Verdict.NOTE,
                f"{answer.total:,} deliveries were given up or are held, most: {most.channel} {most.reason}.",
                "`carillon dead-letters count` says why, `… redrive` sends them again.",
            )
        else:
            yield self._finding("dead letters", Verdict.GOOD, "none.")

    async def _asked(self, method: Callable[..., Awaitable[Any]], request: Any) -> Any:
        """The answer, or a finding that says why there is none."""
        try:
            return await method(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            match error.code():
                case grpc.StatusCode.PERMISSION_DENIED:
                    return self._finding("backlog", Verdict.NOTE, "not told: it needs the role operator.")
                case grpc.StatusCode.UNIMPLEMENTED:
                    return self._finding("version", Verdict.NOTE, "It is older and does not tell all.")
                case _:
                    return self._finding("status", Verdict.BAD, refusal_text(error), "Look at its log.")


def _rounded(duration: timedelta) -> timedelta:
    return timedelta(seconds=round(duration.total_seconds()))


def _show(findings: Sequence[Finding]) -> None:
    marks = {Verdict.GOOD: "[green]good[/green]", Verdict.NOTE: "[yellow]note[/yellow]", Verdict.BAD: "[red]bad[/red]"}
    table = Table("service", "check", "", "finding")
    for one in findings:
        advice = f"\n→ {escape(one.advice)}" if one.advice else ""
        table.add_row(one.service, one.check, marks[one.verdict], escape(one.text) + advice)
    new_console().print(table)
    wrong = sum(one.verdict is Verdict.BAD for one in findings)
    typer.echo("Nothing is wrong." if not wrong else f"{wrong} wrong.")
