"""Suppressions over gRPC: put, lift, list."""

from typing import Protocol

import grpc
from carillon.dispatcher.v1 import dispatcher_pb2 as pb

from libs.clock import Clock
from libs.errors import Violations
from libs.postgres import Database, Transaction
from libs.rpc import tenant_of
from libs.wire import check_enum, check_page_size, check_text, page_token, read_page_token, to_timestamp
from services.dispatcher.addresses import MAX_ADDRESS, is_valid_address
from services.dispatcher.delivery import CHANNELS
from services.dispatcher.suppressions import MAX_LIST_ID, Source, Suppression

MAX_REASON = 512
LIST_ID = r"(type|cadence):[a-z0-9._/-]+"

Context = grpc.aio.ServicerContext
Position = tuple[str, str, str, int]


class Suppressions(Protocol):
    """What is needed of the store of suppressions."""

    async def put(self, tx: Transaction, tenant: str, suppression: Suppression) -> Suppression: ...
    async def delete(
        self, tx: Transaction, tenant: str, *, channel: str, address: str, list_id: str, source: Source | None
    ) -> None: ...
    async def page(
        self, tx: Transaction, tenant: str, *, after: Position | None, limit: int, address: str
    ) -> list[Suppression]: ...


class SuppressionsRpc:
    """The suppressions' part of DispatcherService."""

    _db: Database
    _clock: Clock
    _suppressions: Suppressions

    async def PutSuppression(
        self, request: pb.PutSuppressionRequest, context: Context[object, object]
    ) -> pb.PutSuppressionResponse:
        """Never send to an address again, or nothing of one list."""
        violations = Violations()
        given, prefix = request.suppression, "suppression."
        channel, address = _checked_address(violations, given.channel, given.address, prefix)
        list_id = _checked_list(violations, given.list_id, prefix)
        reason = check_text(violations, f"{prefix}reason", given.reason, longest=MAX_REASON)
        source = _checked_source(violations, given.source, prefix) or Source.CALLER
        violations.raise_if_any()
        wanted = Suppression(
            channel=channel,
            address=address,
            reason=reason,
            created_at=self._clock.now(),
            list_id=list_id,
            source=source,
        )
        async with self._db.transaction() as tx:
            kept = await self._suppressions.put(tx, tenant_of(context), wanted)
        return pb.PutSuppressionResponse(suppression=_suppression(kept))

    async def DeleteSuppression(
        self, request: pb.DeleteSuppressionRequest, context: Context[object, object]
    ) -> pb.DeleteSuppressionResponse:
        """Lift a suppression."""
        violations = Violations()
        channel, address = _checked_address(violations, request.channel, request.address, "")
        list_id = _checked_list(violations, request.list_id, "")
        source = _checked_source(violations, request.source, "")
        violations.raise_if_any()
        async with self._db.transaction() as tx:
            await self._suppressions.delete(
                tx, tenant_of(context), channel=channel, address=address, list_id=list_id, source=source
            )
        return pb.DeleteSuppressionResponse()

    async def ListSuppressions(
        self, request: pb.ListSuppressionsRequest, context: Context[object, object]
    ) -> pb.ListSuppressionsResponse:
        """In order of channel, address, list and source."""
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        address = check_text(violations, "address", request.address, shortest=0, longest=MAX_ADDRESS)
        violations.raise_if_any()
        cursor = read_page_token(
            request.page_token, {"channel": str, "address": str, "list": str, "source": int}, query=address
        )
        after = (cursor["channel"], cursor["address"], cursor["list"], cursor["source"]) if cursor else None
        async with self._db.read() as tx:
            found = await self._suppressions.page(tx, tenant_of(context), after=after, limit=limit + 1, address=address)
        token = ""
        if len(found) > limit:
            last = found[limit - 1]
            position: dict[str, str | int | None] = {
                "channel": last.channel,
                "address": last.address,
                "list": last.list_id,
                "source": int(last.source),
            }
            token = page_token(position, query=address)
        return pb.ListSuppressionsResponse(suppressions=map(_suppression, found[:limit]), next_page_token=token)


def _checked_address(violations: Violations, channel: str, address: str, prefix: str) -> tuple[str, str]:
    if channel not in CHANNELS:
        violations.add(f"{prefix}channel", f"must be one of {', '.join(CHANNELS)}")
    address = check_text(violations, f"{prefix}address", address, longest=MAX_ADDRESS)
    if (size := len(address.encode())) > MAX_ADDRESS:  # It is a key, and Postgres's index takes no longer ones.
        violations.add(f"{prefix}address", f"must be at most {MAX_ADDRESS:,} bytes as UTF-8, got {size:,}")
    elif address and channel in CHANNELS and not is_valid_address(channel, address):
        violations.add(f"{prefix}address", f"must be an address of the channel {channel}")
    return channel, address


def _checked_list(violations: Violations, list_id: str, prefix: str) -> str:
    return check_text(
        violations,
        f"{prefix}list_id",
        list_id,
        shortest=0,
        longest=MAX_LIST_ID,
        pattern=LIST_ID,
        described_as="type:<id> or cadence:<id>",
    )


def _checked_source(violations: Violations, source: int, prefix: str) -> Source | None:
    """None when it is left open."""
    checked = check_enum(violations, f"{prefix}source", source, pb.SuppressionSource) if source else 0
    return Source(checked) if checked in {int(one) for one in Source} else None


def _suppression(one: Suppression) -> pb.Suppression:
    return pb.Suppression(
        channel=one.channel,
        address=one.address,
        reason=one.reason,
        create_time=to_timestamp(one.created_at),
        list_id=one.list_id,
        source=pb.SuppressionSource.ValueType(one.source),
        subscriber=one.subscriber,
    )
