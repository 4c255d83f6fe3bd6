"""The RPCs that show things: windows, previews, digests, the ledger."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

from carillon.digest.v1 import digest_pb2 as pb

from libs.clock import Clock
from libs.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, Violations
from libs.postgres import Database
from libs.rpc_context import Context, tenant_of
from libs.wire import (
    check_id,
    check_page_size,
    check_text,
    instant_token,
    page_token,
    read_instant_token,
    read_page_token,
    to_timestamp,
)
from services.digest.catalog import WindowState
from services.digest.rpc_stores import Formatter, Press, PreviewStore, ViewStore
from services.digest.rpc_words import to_channel
from services.digest.views import DigestView, ItemView, OutcomeCount, WindowView
from services.digest.windows import error_of, job_of, order_of, with_format

_MOST_ITEMS = 1000
_MOST_PAYLOADS_BYTES = 3 << 20
"""What the payloads of one answer add up to: clients refuse answers of more than 4 MiB by default."""


class ViewsRpc:
    """Half of DigestService; the other half is CatalogRpc."""

    def __init__(
        self,
        *,
        db: Database,
        views: ViewStore,
        previews: PreviewStore,
        formatter: Formatter,
        press: Press,
        clock: Clock,
    ) -> None:
        self._view_db, self._views, self._previews = db, views, previews
        self._view_formatter, self._view_press, self._view_clock = formatter, press, clock

    async def ListWindows(self, request: pb.ListWindowsRequest, context: Context) -> pb.ListWindowsResponse:
        """See the contract."""
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        known = [state for state in WindowState if state.value in set(map(int, request.states))]
        if len(known) < len(set(request.states)):
            violations.add("states", "must be WINDOW_STATE_OPEN, WINDOW_STATE_CLOSING or WINDOW_STATE_CLOSED")
        _check_filters(violations, request)
        violations.raise_if_any()
        query = f"{request.subscriber}\n{request.cadence}\n{known}"
        cursor = read_page_token(request.page_token, {"id": str}, query=query)
        after = None
        if cursor is not None:
            with _token_of_ours():
                after = UUID(cursor["id"])
        async with self._view_db.read() as tx:
            found = await self._views.list_windows(
                tx,
                tenant_of(context),
                subscriber=request.subscriber,
                cadence=request.cadence,
                states=known,
                after=after,
                limit=limit + 1,
            )
        token = page_token({"id": str(found[limit - 1].id)}, query=query) if len(found) > limit else ""
        return pb.ListWindowsResponse(windows=map(_window, found[:limit]), next_page_token=token)

    async def PreviewDigest(self, request: pb.PreviewDigestRequest, context: Context) -> pb.PreviewDigestResponse:
        """See the contract."""
        window_id = _checked_id("window_id", request.window_id)
        now = self._view_clock.now()
        async with self._view_db.read() as tx:
            window = await self._views.get_window(tx, tenant_of(context), window_id)
            if window is None or window.state is not WindowState.OPEN:
                raise NotFound(f"There is no open window {window_id}.", metadata={"window_id": str(window_id)})
            (closing,) = await self._previews.read_windows(tx, [window.tenant], [window_id], now=now)
            templates = await self._previews.templates_for(tx, [closing])
        if closing.subscriber is None or not closing.lines:
            return pb.PreviewDigestResponse()
        (formatted,) = await self._view_formatter.format([order_of(closing)])
        closing = with_format(closing, formatted)
        job = job_of(closing, templates.get(closing.tenant, {}), now=now)
        (rendered,) = await self._view_press.render([job])
        if not rendered.parts:
            raise FailedPrecondition(f"It cannot be rendered: {rendered.error}", reason="CANNOT_RENDER")
        part = rendered.parts[0]
        return pb.PreviewDigestResponse(
            subject=part.subject,
            html=part.html,
            text=part.text or part.json,
            item_count=len(closing.lines),
            template_error=error_of(closing, rendered),
        )

    async def ListDigests(self, request: pb.ListDigestsRequest, context: Context) -> pb.ListDigestsResponse:
        """See the contract."""
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        _check_filters(violations, request)
        violations.raise_if_any()
        query = f"{request.subscriber}\n{request.cadence}"
        after = read_instant_token(request.page_token, query=query)
        async with self._view_db.read() as tx:
            found = await self._views.list_digests(
                tx,
                tenant_of(context),
                subscriber=request.subscriber,
                cadence=request.cadence,
                after=after,
                limit=limit + 1,
            )
        token = ""
        if len(found) > limit:
            last = found[limit - 1]
            token = instant_token(last.closed_at, last.id, query=query)
        return pb.ListDigestsResponse(digests=map(_digest, found[:limit]), next_page_token=token)

    async def GetDigest(self, request: pb.GetDigestRequest, context: Context) -> pb.GetDigestResponse:
        """See the contract."""
        digest_id = _checked_id("id", request.id)
        tenant = tenant_of(context)
        async with self._view_db.read() as tx:
            digest = await self._views.get_digest(tx, tenant, digest_id)
            if digest is None:
                raise NotFound(f"There is no digest {digest_id}.", metadata={"id": str(digest_id)})
            items = await self._views.items_of_window(tx, tenant, digest_id, limit=_MOST_ITEMS)
        return pb.GetDigestResponse(digest=_digest(digest), items=_within(_MOST_PAYLOADS_BYTES, map(_item, items)))

    async def GetLedger(self, _request: pb.GetLedgerRequest, context: Context) -> pb.GetLedgerResponse:
        """See the contract."""
        async with self._view_db.read() as tx:
            ledger = await self._views.ledger(tx, tenant_of(context))
        return pb.GetLedgerResponse(
            notifications=ledger.notifications,
            items=[
                pb.ItemCount(state=state.value, suppressed_reason=reason, items=count)  # type: ignore[arg-type]
                for state, reason, count in ledger.items
            ],
            digests=map(_outcome_count, ledger.digests),
            unaccounted=ledger.unaccounted,
            gaps=[pb.Gap(kind=gap.kind, count=gap.count, ids=map(str, gap.ids)) for gap in ledger.gaps],
            deliveries=[pb.DeliveryCount(outcome=outcome, deliveries=count) for outcome, count in ledger.deliveries],
            longest_pending_delivery_ids=map(str, ledger.longest_pending),
        )


def _check_filters(violations: Violations, request: pb.ListWindowsRequest | pb.ListDigestsRequest) -> None:
    check_text(violations, "subscriber", request.subscriber, shortest=0, longest=256)
    check_text(violations, "cadence", request.cadence, shortest=0, longest=128)


@contextmanager
def _token_of_ours() -> Iterator[None]:
    """Tokens are not signed: one with anything else in our fields is the caller's mistake."""
    try:
        yield
    except ValueError as err:
        raise InvalidArgument([FieldViolation("page_token", "is not a token from an answer before")]) from err


def _within(room: int, items: Iterable[pb.Item]) -> Iterator[pb.Item]:
    """The same items, without the payloads from the first one on that goes beyond `room` bytes together."""
    for item in items:
        room -= item.ByteSize()
        if room < 0:
            item.payload = ""
        yield item


def _checked_id(field: str, value: str) -> UUID:
    violations = Violations()
    checked = check_id(violations, field, value)
    violations.raise_if_any()
    assert checked is not None
    return checked


def _window(one: WindowView) -> pb.Window:
    return pb.Window(
        id=str(one.id),
        subscriber=one.subscriber,
        cadence=one.cadence,
        channel=to_channel(one.channel),
        state=one.state.value,  # type: ignore[arg-type]  # The same numbers.
        open_time=to_timestamp(one.opened_at),
        due_time=to_timestamp(one.due_at),
        items=one.items,
    )


def _digest(one: DigestView) -> pb.Digest:
    return pb.Digest(
        id=str(one.id),
        subscriber=one.subscriber,
        cadence=one.cadence,
        channel=to_channel(one.channel),
        close_time=to_timestamp(one.closed_at),
        item_count=one.item_count,
        delivery_ids=[str(delivery.id) for delivery in one.deliveries],
        outcome=one.outcome,
        subject=one.subject,
    )


def _item(one: ItemView) -> pb.Item:
    return pb.Item(
        id=str(one.id),
        notification_id=str(one.notification_id),
        type=one.type,
        entity=one.entity,
        payload=one.payload,
        occur_time=to_timestamp(one.occurred_at),
        state=one.state.value,  # type: ignore[arg-type]  # The same numbers.
        suppressed_reason=one.reason,
    )


def _outcome_count(one: OutcomeCount) -> pb.DigestCount:
    return pb.DigestCount(outcome=one.outcome, digests=one.digests, items=one.items, deliveries=one.deliveries)
