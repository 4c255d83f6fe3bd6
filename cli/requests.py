"""`carillon requests`: what customers ask of providers, and what came of it."""

from typing import Annotated

import typer
from carillon.intake.v1 import intake_pb2 as pb
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub

from cli.bulk import Batch, send_file, show_results
from cli.notify import FilePath, Key, PayloadText, Waits, key_of, wait_of
from cli.output import short, show_json, show_list, show_pairs, show_table, when, word
from cli.session import Exit, Session, command
from cli.timers import Limit
from cli.values import duration_of, enums_of, json_object_of

requests = typer.Typer(help="What customers ask of providers, and what came of it.", no_args_is_help=True)
RequestId = Annotated[str, typer.Argument(metavar="ID", help="The request's id.", show_default=False)]


@command(requests, "list", services=("intake",))
async def _list(
    session: Session,
    batch: Annotated[str, typer.Option("--batch", help="Only of this batch.")] = "",
    customer: Annotated[str, typer.Option("--customer", help="Only of this customer.")] = "",
    item: Annotated[str, typer.Option("--item", help="Only for this item.")] = "",
    states: Annotated[
        list[str] | None,
        typer.Option("--state", help="open, answered, closed, expired or withdrawn; may be repeated."),
    ] = None,
    limit: Limit = 100,
) -> None:
    """List requests, newest first. With --json one object a line."""
    request = pb.ListRequestsRequest(
        batch=batch,
        customer=customer,
        item=item,
        states=enums_of(pb.RequestState, states or [], "--state"),
        page_size=min(limit, 1000) or 1000,
    )
    stub = session.stub("intake", IntakeServiceStub)
    await show_list(
        session.all_pages(stub.ListRequests, request, "requests", limit=limit),
        ("submitted", "state", "customer", "item", "answers", "answer by", "id"),
        lambda one: (
            when(one, "submit_time"),
            word(pb.RequestState, one.state),
            one.request.customer,
            one.request.item,
            f"{len(one.responses)}",
            when(one, "answer_by_time"),
            one.id,
        ),
        is_json=session.is_json,
        nothing="There are no such requests.",
    )


@command(requests, "get", services=("intake",))
async def _get(session: Session, request_id: RequestId) -> None:
    """Show one request with its answers and history."""
    stub = session.stub("intake", IntakeServiceStub)
    answer = await stub.GetRequest(pb.GetRequestRequest(id=request_id), timeout=session.timeout_s)
    found = answer.request
    if session.is_json:
        show_json(found)
        return
    show_pairs(
        [
            ("id", found.id),
            ("state", word(pb.RequestState, found.state)),
            ("batch", found.request.batch),
            ("customer", found.request.customer),
            ("item", found.request.item),
            ("providers", ", ".join(found.request.providers)),
            ("payload", found.request.payload),
            ("answer by", when(found, "answer_by_time")),
        ]
    )
    history = [(when(one, "time"), word(pb.RequestState, one.state), one.cause) for one in found.history]
    show_table(("when", "became", "why"), history)
    if found.responses:
        rows = [(when(one, "receive_time"), one.provider, short(one.payload), one.id) for one in found.responses]
        show_table(("when", "provider", "answer", "id"), rows)


@command(requests, "submit", services=("intake",))
async def _submit(
    session: Session,
    batch: Annotated[str, typer.Argument(metavar="BATCH", help="It travels with.", show_default=False)] = "",
    customer: Annotated[str, typer.Argument(metavar="CUSTOMER", help="Who asks.", show_default=False)] = "",
    item: Annotated[str, typer.Argument(metavar="ITEM", help="For what.", show_default=False)] = "",
    providers: Annotated[
        list[str] | None, typer.Option("--provider", help="May be repeated; looked up from the item without it.")
    ] = None,
    payload: PayloadText = "",
    answer_within: Annotated[str, typer.Option("--answer-within", help="7d without it.")] = "",
    file: FilePath = None,
    key: Key = "",
    waits: Waits = True,
) -> int:
    """Log a request to the providers of an item, or many with --file.

    Exit codes: as of notify.
    """
    stub = session.stub("intake", IntakeServiceStub)
    if file is not None:

        async def send(many: Batch[pb.Request]) -> pb.SubmitRequestResponse:
            request = pb.SubmitRequestRequest(
                requests=many.messages, idempotency_key=many.key, wait_for=pb.WAIT_FOR_ACCEPTED
            )
            answer: pb.SubmitRequestResponse = await stub.SubmitRequest(request, timeout=session.timeout_s)
            return answer

        return await send_file(session, file, pb.Request, send, key=key)
    if not item:
        raise typer.BadParameter("Say BATCH CUSTOMER ITEM, or --file.")
    one = pb.Request(
        batch=batch,
        customer=customer,
        item=item,
        providers=providers or [],
        payload=json_object_of(payload, "--payload"),
    )
    if answer_within:
        one.answer_within.CopyFrom(duration_of(answer_within, "--answer-within"))
    request = pb.SubmitRequestRequest(requests=[one], idempotency_key=key_of(key), wait_for=wait_of(waits))
    return show_results(session, await stub.SubmitRequest(request, timeout=session.timeout_s), "Logged")


@command(requests, "respond", services=("intake",))
async def _respond(
    session: Session,
    request_id: RequestId,
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="Who answers.", show_default=False)],
    payload: PayloadText = "",
    key: Key = "",
    waits: Waits = True,
) -> int:
    """Log a provider's answer."""
    response = pb.Response(request_id=request_id, provider=provider, payload=json_object_of(payload, "--payload"))
    request = pb.RecordResponseRequest(responses=[response], idempotency_key=key_of(key), wait_for=wait_of(waits))
    stub = session.stub("intake", IntakeServiceStub)
    return show_results(session, await stub.RecordResponse(request, timeout=session.timeout_s), "Logged")


@command(requests, "withdraw", services=("intake",))
async def _withdraw(
    session: Session,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The requests' ids.", show_default=False)],
    cause: Annotated[str, typer.Option("--cause", help="Kept with the requests.")] = "",
    key: Key = "",
    waits: Waits = True,
) -> int:
    """Take requests back: what has not left is cancelled. Exit codes: as of notify."""
    request = pb.WithdrawRequestRequest(ids=ids, cause=cause, idempotency_key=key_of(key), wait_for=wait_of(waits))
    stub = session.stub("intake", IntakeServiceStub)
    answer: pb.WithdrawRequestResponse = await stub.WithdrawRequest(request, timeout=session.timeout_s)
    code = show_results(session, answer, "Withdrawn")
    if not session.is_json and code != Exit.REFUSED and answer.is_applied:
        typer.echo(f"{answer.items:,} items taken out of digests; {answer.already_left:,} had already left.")
    return code
