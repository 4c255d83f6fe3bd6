"""`carillon explain ID`: what all services know of an id, as one story, oldest first.

A story goes from service to service: digest knows a notification and names its delivery, of which the dispatcher knows
more. So an id that one service names is asked of the others, and of theirs in turn, a few steps far. It is not asked of
those who named it: their part of it they have told, and a digest's other items are another story.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import grpc
import typer
from carillon.digest.v1 import digest_pb2, digest_pb2_grpc
from carillon.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from carillon.explain.v1 import explain_pb2
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from carillon.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from rich.markup import escape
from rich.table import Table

from cli.connection import refusal_text
from cli.output import as_json, moment, new_console, show_json
from cli.session import SERVICES, Exit, Session, command

_STUBS: Final[dict[str, tuple[Any, Any]]] = {
    "intake": (intake_pb2_grpc.IntakeServiceStub, intake_pb2.ExplainRequest),
    "scheduler": (scheduler_pb2_grpc.SchedulerServiceStub, scheduler_pb2.ExplainRequest),
    "digest": (digest_pb2_grpc.DigestServiceStub, digest_pb2.ExplainRequest),
    "dispatcher": (dispatcher_pb2_grpc.DispatcherServiceStub, dispatcher_pb2.ExplainRequest),
}
_STEPS: Final = 3
_CALLS: Final = 200
_AT_ONCE: Final = 8


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "explain", services=SERVICES, at_least=1)(_explain)


async def _explain(
    session: Session,
    one_id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="Of a notification, timer, schedule, request, window, digest, delivery or subscriber; or an entity.",
            show_default=False,
        ),
    ],
    is_alone: Annotated[bool, typer.Option("--alone", help="Only what is known of this very id.")] = False,
) -> int:
    """Tell the story of an id: what happened, why, and what will, from all services that know of it.

    Exit codes: 0 told; 1 nobody knows it, or nobody could be asked; 2 usage; 3 told, but somebody has not answered.
    """
    story = await Story(session, steps=0 if is_alone else _STEPS).told(one_id)
    not_asked = [name for name in SERVICES if name not in session.connections]
    if session.is_json:
        show_json(
            {
                "id": one_id,
                "entries": [as_json(one) for one in story.entries],
                "errors": story.errors,
                "notAsked": not_asked,
                "isCut": story.is_cut,
            }
        )
    else:
        _show(one_id, story, not_asked)
    if story.errors:
        return Exit.NOT_ALL if story.entries else Exit.REFUSED
    return Exit.DONE if story.entries else Exit.REFUSED


@dataclass(slots=True)
class Told:
    """What was found: in order of time, each thing once. `errors` says why a service has not answered."""

    entries: list[explain_pb2.Entry] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False


class Story:
    """Asks the services of a session, at most 200 times."""

    def __init__(self, session: Session, *, steps: int) -> None:
        self._session, self._steps = session, steps
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._told = Told()
        self._asked: set[tuple[str, str]] = set()
        self._calls = 0

    async def told(self, one_id: str) -> Told:
        """Everything, oldest first."""
        found: dict[tuple[str, str, int, str], explain_pb2.Entry] = {}
        following = [(name, one_id) for name in self._session.connections]
        for _ in range(self._steps + 1):
            asked = self._new(following)
            answers = await asyncio.gather(*(self._ask(service, about) for service, about in asked))
            following = []
            for (service, _about), entries in zip(asked, answers, strict=True):
                for entry in entries:
                    found.setdefault((entry.service, entry.kind, entry.time.ToNanoseconds(), entry.sentence), entry)
                    self._asked.update((service, related) for related in entry.related_ids)
                    following += [
                        (other, related)
                        for related in entry.related_ids
                        for other in self._session.connections
                        if other != service
                    ]
        self._told.entries = sorted(found.values(), key=lambda one: (one.time.ToNanoseconds(), _rank(one.service)))
        return self._told

    def _new(self, wanted: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        fresh = [one for one in dict.fromkeys(wanted) if one not in self._asked and one[0] not in self._told.errors]
        room = _CALLS - self._calls
        self._told.is_cut |= len(fresh) > room
        self._asked.update(fresh[:room])
        self._calls += len(fresh[:room])
        return fresh[:room]

    async def _ask(self, service: str, about: str) -> list[explain_pb2.Entry]:
        kind, request = _STUBS[service]
        async with self._room:
            try:
                stub = self._session.stub(service, kind)
                answer = await stub.Explain(request(id=about), timeout=self._session.timeout_s)
            except grpc.aio.AioRpcError as error:
                self._told.errors[service] = refusal_text(error)
                return []
        self._told.is_cut |= answer.is_cut
        return list(answer.entries)


def _rank(service: str) -> int:
    return SERVICES.index(service) if service in SERVICES else len(SERVICES)


def _show(one_id: str, story: Told, not_asked: list[str]) -> None:
    console = new_console()
    if story.entries:
        table = Table(title=one_id, title_justify="left", box=None, pad_edge=False)
        table.add_column("when", no_wrap=True)
        table.add_column("service", no_wrap=True)
        table.add_column("what", overflow="fold")
        for entry in story.entries:
            style = "dim italic" if entry.is_expected else None
            what = f"(expected) {entry.sentence}" if entry.is_expected else entry.sentence
            table.add_row(moment(entry.time), escape(entry.service), escape(what), style=style)
        console.print(table)
    else:
        typer.echo(f"Nobody who was asked knows anything of {one_id}.")
    if story.is_cut:
        typer.echo("There is more than this; what is named here can be explained itself.", err=True)
    for service, why in story.errors.items():
        typer.echo(f"{service} has not answered: {why}", err=True)
    if not_asked:
        typer.echo(f"Not asked, because it is not known where they are: {', '.join(not_asked)}.", err=True)
