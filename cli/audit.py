"""`carillon audit`: whether everything that was accepted is where it must be."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import typer
from carillon.digest.v1 import digest_pb2, digest_pb2_grpc
from carillon.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from carillon.link.v1 import backlog_pb2, backlog_pb2_grpc, dead_frame_pb2, dead_frame_pb2_grpc
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from cli.connection import refusal_text
from cli.output import new_console
from cli.session import SERVICES, Exit, Session, command, stop_for_want_of

_LEDGER_TIMEOUT_S: Final = 600.0
_LOOKS: Final = 3
_BETWEEN_LOOKS_S: Final = 2.0
_UNFINISHED: Final = frozenset(
    {
        dispatcher_pb2.DELIVERY_STATE_PENDING,
        dispatcher_pb2.DELIVERY_STATE_SENDING,
        dispatcher_pb2.DELIVERY_STATE_RETRYING,
    }
)
_PAIR: Final = {"digest", "dispatcher"}
_GAPS: Final = {
    "item_missing": "items of these notifications are gone",
    "item_unexpected": "items too many belong to these notifications",
    "notification_missing": "items are left of these notifications, which are gone",
    "window_missing": "items wait in windows that are gone or have closed without them",
    "digest_missing": "items went out in digests of which nothing is on record",
    "delivery_missing": "deliveries of these digests are gone, or too many",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "audit", services=SERVICES, at_least=1)(_audit)


@dataclass(frozen=True, slots=True)
class Links:
    """What one service knows of its links; None where it was not told, and `why` not."""

    backlogs: Sequence[backlog_pb2.Backlog] | None = None
    dead_frames: int | None = None
    why: str = ""


@dataclass(slots=True)
class Report:
    """What was found: `lost` says of deliveries, by id, what is wrong; `errors` of services why they said nothing.

    `under_way` are deliveries of which that cannot be said yet, because older frames are still on their way.
    """

    ledger: digest_pb2.GetLedgerResponse | None = None
    lost: dict[str, str] = field(default_factory=dict)
    under_way: int = 0
    links: dict[str, Links] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    not_asked: list[str] = field(default_factory=list)

    @property
    def unaccounted(self) -> int:
        """Everything that is not where it must be."""
        dead_frames = sum(one.dead_frames or 0 for one in self.links.values())
        return (self.ledger.unaccounted if self.ledger else 0) + len(self.lost) + dead_frames

    @property
    def code(self) -> int:
        """The exit code."""
        return Exit.REFUSED if self.unaccounted or self.errors else Exit.DONE


async def _audit(session: Session) -> int:
    """Check that everything that was accepted is where it must be.

    Digest adds up the tenant's ledger: each notification is, for each of its subscribers and ways to be told, in
    exactly one state. The dispatcher is asked whether it has what digest has been waiting for longest; what does not
    agree at once is looked at three times, and is no finding while frames from before that are on their way. Services
    tell what is under way between them, and what they have put aside, to callers with the role operator; for others
    that is left out. Services other than digest may be left out as well.

    Exit codes: 0 all is accounted for; 1 something is not, or a service could not be reached; 2 the command line cannot
    be used.
    """
    if "digest" not in session.connections:
        stop_for_want_of(["digest"])
    console = Console(stderr=True)
    is_watched = console.is_terminal and not session.is_json
    with Progress(console=console, transient=True) if is_watched else nullcontext() as progress:
        report = await Audit(session, progress).run()
    report.not_asked = [name for name in SERVICES if name not in session.connections]
    if session.is_json:
        typer.echo(json.dumps(_as_json(report), ensure_ascii=False, indent=2))
    else:
        _show(report)
    return report.code


class Audit:
    """One run; asks what can be reached and never changes anything."""

    def __init__(
        self, session: Session, progress: Progress | None = None, *, between_looks_s: float = _BETWEEN_LOOKS_S
    ) -> None:
        self._session, self._progress, self._between_looks_s = session, progress, between_looks_s
        self._report = Report()
        self._oldest_frame_at = float("inf")  # Of those between digest and the dispatcher, by time.monotonic().

    async def run(self) -> Report:
        """Ask; the session must be open."""
        began = time.monotonic()
        with _Step(self._progress, "Adding up the ledger", None):
            self._report.ledger = await self._ledger()
        if self._report.ledger is not None and "dispatcher" in self._session.connections:
            self._report.lost = await self._lost(self._report.ledger)
        with _Step(self._progress, "Asking for what is under way", len(self._session.connections)) as step:
            for name in self._session.connections:
                if name not in self._report.errors:
                    await self._ask_links(name)
                step.advance()
        if self._oldest_frame_at < began:
            self._report.under_way, self._report.lost = len(self._report.lost), {}
        return self._report

    async def _ledger(self) -> digest_pb2.GetLedgerResponse | None:
        stub = self._session.stub("digest", digest_pb2_grpc.DigestServiceStub)
        try:
            answer: digest_pb2.GetLedgerResponse = await stub.GetLedger(
                digest_pb2.GetLedgerRequest(), timeout=_LEDGER_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            self._report.errors["digest"] = refusal_text(error)
            return None
        return answer

    async def _lost(self, ledger: digest_pb2.GetLedgerResponse) -> dict[str, str]:
        """Deliveries that digest waits for in vain: not as long as they, or their outcomes, may be under way."""
        suspects = list(ledger.longest_pending_delivery_ids)
        found: dict[str, str] = {}
        for look in range(_LOOKS):
            if look:
                await asyncio.sleep(self._between_looks_s)
                newer = await self._ledger()
                if newer is None:
                    return {}
                pending = set(newer.longest_pending_delivery_ids)
                suspects = [one for one in found if one in pending]
            found = await self._disagreeing(suspects)
            if not found:
                break
        return found

    async def _disagreeing(self, delivery_ids: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        stub = self._session.stub("dispatcher", dispatcher_pb2_grpc.DispatcherServiceStub)
        with _Step(self._progress, "Asking the dispatcher for deliveries", len(delivery_ids)) as step:
            for one in delivery_ids:
                try:
                    request = dispatcher_pb2.GetDeliveryRequest(id=one)
                    answer = await stub.GetDelivery(request, timeout=self._session.timeout_s)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        self._report.errors["dispatcher"] = refusal_text(error)
                        return {}
                    found[one] = "the dispatcher has never heard of it"
                else:
                    if (state := answer.delivery.state) not in _UNFINISHED:
                        name = dispatcher_pb2.DeliveryState.Name(state).removeprefix("DELIVERY_STATE_").lower()
                        found[one] = f"the dispatcher has it as {name}, and digest was not told"
                step.advance()
        return found

    async def _ask_links(self, name: str) -> None:
        asked_at, timeout_s = time.monotonic(), self._session.timeout_s
        backlogs = self._session.stub(name, backlog_pb2_grpc.BacklogServiceStub)
        dead_frames = self._session.stub(name, dead_frame_pb2_grpc.DeadFrameServiceStub)
        try:
            under_way = await backlogs.ListBacklogs(backlog_pb2.ListBacklogsRequest(), timeout=timeout_s)
            aside = await dead_frames.ListDeadFrames(
                dead_frame_pb2.ListDeadFramesRequest(page_size=1), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            match error.code():
                case grpc.StatusCode.PERMISSION_DENIED:
                    self._report.links[name] = Links(why="needs the role operator")
                case grpc.StatusCode.UNIMPLEMENTED:
                    self._report.links[name] = Links(why="is of a version that does not tell")
                case _:
                    self._report.errors[name] = refusal_text(error)
        else:
            self._report.links[name] = Links(list(under_way.backlogs), aside.total)
            ages = [one.oldest_age for one in under_way.backlogs if one.frames and {name, one.receiver} == _PAIR]
            for age in ages:
                self._oldest_frame_at = min(self._oldest_frame_at, asked_at - age.seconds - age.nanos / 1e9)


class _Step:
    """A line of progress while it lasts; without a total nobody knows how long."""

    def __init__(self, progress: Progress | None, description: str, total: int | None) -> None:
        self._progress, self._description, self._total = progress, description, total

    def __enter__(self) -> "_Step":
        if self._progress is not None:
            self._task = self._progress.add_task(self._description, total=self._total)
        return self

    def advance(self) -> None:
        """One more is done."""
        if self._progress is not None:
            self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.remove_task(self._task)


# The person, or the program


def _show(report: Report) -> None:
    console = new_console()
    if report.ledger is not None:
        console.print(_items_table(report.ledger))
    console.print(_links_table(report))
    if report.under_way:
        console.print(f"{report.under_way:,} deliveries are still on their way between digest and the dispatcher.")
    for text in _findings(report):
        console.print(f"[red]{escape(text)}[/red]", highlight=False, soft_wrap=True)
    if report.code:
        count = f"{report.unaccounted:,}"
        words = (
            f"{count} unaccounted for."
            if report.unaccounted
            else "Not everybody has answered; nothing is missing so far."
        )
        console.print(f"[red]{words}[/red]", highlight=False)
    else:
        console.print("[green]Everything is accounted for.[/green]", highlight=False)


def _findings(report: Report) -> list[str]:
    gaps = report.ledger.gaps if report.ledger else ()
    found = [f"{gap.count:,} {_GAPS.get(gap.kind, gap.kind)}: {', '.join(gap.ids)}" for gap in gaps]
    found += [f"The delivery {one} is pending in digest, but {why}." for one, why in report.lost.items()]
    found += [
        f"{name} has put aside {one.dead_frames:,} frames that it could not apply."
        for name, one in report.links.items()
        if one.dead_frames
    ]
    return found + [f"{name} has not answered: {why}" for name, why in report.errors.items()]


def _items_table(ledger: digest_pb2.GetLedgerResponse) -> Table:
    title = f"{ledger.notifications:,} notifications"
    table = Table("state", "reason", title=title, title_justify="left")
    table.add_column("items", justify="right")
    for count in ledger.items:
        table.add_row(_state(count), escape(count.suppressed_reason), f"{count.items:,}")
    table.add_section()
    table.add_row("all", "", f"{sum(count.items for count in ledger.items):,}", end_section=True)
    for sent in ledger.deliveries:
        table.add_row("deliveries", escape(sent.outcome), f"{sent.deliveries:,}")
    table.add_section()
    table.add_row("unaccounted", "", f"{ledger.unaccounted:,}")
    return table


def _links_table(report: Report) -> Table:
    table = Table("service", "under way to", title="Between the services", title_justify="left")
    for name in ("frames", "oldest", "put aside"):
        table.add_column(name, justify="right")
    for name, links in report.links.items():
        if links.backlogs is None:
            table.add_row(name, links.why, "", "", "?")
            continue
        aside = f"{links.dead_frames:,}"
        for one in links.backlogs:
            table.add_row(name, one.receiver, f"{one.frames:,}", f"{one.oldest_age.seconds:,} s", aside)
        if not links.backlogs:
            table.add_row(name, "nobody", "0", "", aside)
    for name in report.not_asked:
        table.add_row(name, "not asked: no endpoint given", "", "", "?")
    return table


def _as_json(report: Report) -> dict[str, Any]:
    ledger = report.ledger or digest_pb2.GetLedgerResponse()
    return {
        "is_accounted": report.code == 0,
        "unaccounted": report.unaccounted,
        "notifications": ledger.notifications,
        "items": [{"state": _state(one), "reason": one.suppressed_reason, "items": one.items} for one in ledger.items],
        "digests": [
            {"outcome": one.outcome, "digests": one.digests, "items": one.items, "deliveries": one.deliveries}
            for one in ledger.digests
        ],
        "deliveries": {one.outcome: one.deliveries for one in ledger.deliveries},
        "gaps": [{"kind": gap.kind, "count": gap.count, "ids": list(gap.ids)} for gap in ledger.gaps],
        "lost_deliveries": report.lost,
        "deliveries_under_way": report.under_way,
        "links": {name: _links_json(one) for name, one in report.links.items()},
        "errors": report.errors,
        "not_asked": report.not_asked,
    }


def _links_json(one: Links) -> dict[str, Any]:
    if one.backlogs is None:
        return {"not_told": one.why}
    under_way = [
        {"receiver": each.receiver, "frames": each.frames, "oldest_s": each.oldest_age.seconds} for each in one.backlogs
    ]
    return {"under_way": under_way, "dead_frames": one.dead_frames}


def _state(count: digest_pb2.ItemCount) -> str:
    return digest_pb2.ItemState.Name(count.state).removeprefix("ITEM_STATE_").lower()
