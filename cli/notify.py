"""`carillon notify`: something happened."""

from pathlib import Path
from typing import Annotated, Final

import typer
from carillon.intake.v1 import intake_pb2 as pb
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import timer_pb2

from cli.bulk import Batch, send_file, show_results
from cli.session import Session, command
from cli.values import TIME_HELP, enum_of, json_object_of, time_of
from libs.ids import new_id

PayloadText = Annotated[str, typer.Option("--payload", help="A JSON object, @FILE, or @- for standard input.")]
Subscribers = Annotated[list[str] | None, typer.Option("--to", help="A subscriber; may be repeated.")]
Topics = Annotated[list[str] | None, typer.Option("--topic", help="A topic; may be repeated.")]
GroupKey = Annotated[str, typer.Option("--group-key", help="Shown together in a digest with others of this key.")]
Priority = Annotated[str, typer.Option("--priority", help="low, normal or high.")]
Key = Annotated[
    str, typer.Option("--key", help="Idempotency key: repeated within seven days, the call has no further effect.")
]
Waits = Annotated[bool, typer.Option("--wait/--no-wait", help="Until it is applied, or only until it is durable.")]
FilePath = Annotated[
    Path | None,
    typer.Option("--file", help="Many, as JSON lines with the contract's fields; - is standard input."),
]
_NOTHING_TO_TELL: Final = "Say TYPE, or --file."


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "notify", services=("intake",))(_notify)


async def _notify(
    session: Session,
    type_id: Annotated[str, typer.Argument(metavar="TYPE", help="The notification type.", show_default=False)] = "",
    subscribers: Subscribers = None,
    topics: Topics = None,
    payload: PayloadText = "",
    entity: Annotated[str, typer.Option("--entity", help="What it is about; cancel knows it by this.")] = "",
    group_key: GroupKey = "",
    priority: Priority = "normal",
    occurred: Annotated[str, typer.Option("--occurred", help=f"When it happened: {TIME_HELP}.")] = "",
    expires: Annotated[str, typer.Option("--expires", help=f"Not worth telling from then on: {TIME_HELP}.")] = "",
    file: FilePath = None,
    key: Key = "",
    waits: Waits = True,
) -> int:
    """Tell subscribers that something happened.

    Exit codes: 0 accepted; 1 refused, or intake cannot be reached; 2 the command line or the file cannot be used; 3 of
    a file, some were refused, or it stopped on the way: run it again, what is stored is not stored again.
    """
    stub = session.stub("intake", IntakeServiceStub)
    if file is not None:
        if type_id:
            raise typer.BadParameter("TYPE and --file exclude each other.")

        async def send(batch: Batch[pb.Notification]) -> pb.NotifyResponse:
            request = pb.NotifyRequest(
                notifications=batch.messages, idempotency_key=batch.key, wait_for=pb.WAIT_FOR_ACCEPTED
            )
            answer: pb.NotifyResponse = await stub.Notify(request, timeout=session.timeout_s)
            return answer

        return await send_file(session, file, pb.Notification, send, key=key)
    if not type_id:
        raise typer.BadParameter(_NOTHING_TO_TELL)
    notification = pb.Notification(
        content=content_of(type_id, subscribers, topics, payload, group_key, priority), entity=entity
    )
    if occurred:
        notification.occur_time.CopyFrom(time_of(occurred, "--occurred"))
    if expires:
        notification.expire_time.CopyFrom(time_of(expires, "--expires"))
    request = pb.NotifyRequest(notifications=[notification], idempotency_key=key_of(key), wait_for=wait_of(waits))
    return show_results(session, await stub.Notify(request, timeout=session.timeout_s), "Accepted")


def content_of(
    type_id: str, subscribers: list[str] | None, topics: list[str] | None, payload: str, group_key: str, priority: str
) -> timer_pb2.NotificationContent:
    """What is told; BadParameter."""
    return timer_pb2.NotificationContent(
        type=type_id,
        subscribers=subscribers or [],
        topics=topics or [],
        payload=json_object_of(payload, "--payload"),
        group_key=group_key,
        priority=enum_of(timer_pb2.Priority, priority, "--priority"),
    )


def key_of(given: str) -> str:
    """An idempotency key: the one given, or one of this run's own, with which gRPC may try again."""
    return given or new_id().hex


def wait_of(waits: bool) -> pb.WaitFor.ValueType:
    """What the call waits for."""
    return pb.WAIT_FOR_APPLIED if waits else pb.WAIT_FOR_ACCEPTED
