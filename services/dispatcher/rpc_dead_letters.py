"""Dead letters over gRPC: list, count, send again."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Protocol
from uuid import UUID

import grpc
from carillon.dispatcher.v1 import dispatcher_pb2 as pb

from libs.clock import Clock
from libs.errors import Violations
from libs.postgres import Database, Transaction
from libs.rpc import tenant_of
from libs.wire import (
    After,
    check_count,
    check_id,
    check_instant,
    check_number,
    check_page_size,
    check_text,
    instant_token,
    read_instant_token,
)
from services.dispatcher import metrics
from services.dispatcher.delivery import CHANNELS, DEAD_LETTERS, State
from services.dispatcher.records import DeadLetterCount, DeadLetterFilter, DeliveryRecord
from services.dispatcher.rpc_messages import count_of, delivery_of, fitting

MAX_KEY = 128
MAX_REDRIVEN = 1_000
MAX_REDRIVEN_BY_FILTER = 10_000
MAX_COUNTS = 1_000

Context = grpc.aio.ServicerContext


class DeadLetters(Protocol):
    """What is needed of the store of dead letters."""

    async def page(
        self, tx: Transaction, tenant: str, wanted: DeadLetterFilter, *, after: After | None, limit: int
    ) -> list[DeliveryRecord]: ...
    async def counts(
        self, tx: Transaction, tenant: str, wanted: DeadLetterFilter, *, limit: int
    ) -> list[DeadLetterCount]: ...
    async def redrive(self, tx: Transaction, tenant: str, ids: Sequence[UUID], *, now: datetime) -> int: ...
    async def redrive_matching(
        self, tx: Transaction, tenant: str, wanted: DeadLetterFilter, *, limit: int, now: datetime
    ) -> tuple[int, int]: ...


class Keys(Protocol):
    """What is needed of the store of idempotency keys."""

    async def once(
        self,
        tx: Transaction,
        tenant: str,
        *,
        method: str,
        key: str,
        fingerprint: bytes,
        work: Callable[[], Awaitable[bytes]],
    ) -> bytes: ...


class DeadLettersRpc:
    """The dead letters' part of DispatcherService."""

    _db: Database
    _clock: Clock
    _dead_letters: DeadLetters
    _keys: Keys
    _on_work: Callable[[], None]

    async def ListDeadLetters(
        self, request: pb.ListDeadLettersRequest, context: Context[object, object]
    ) -> pb.ListDeadLettersResponse:
        """Dead and held deliveries, those given up last first."""
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        wanted = _checked_filter(violations, request.filter)
        violations.raise_if_any()
        query = f"dead {request.filter.SerializeToString(deterministic=True).hex()}"
        after = read_instant_token(request.page_token, query=query)
        async with self._db.read() as tx:
            found = await self._dead_letters.page(tx, tenant_of(context), wanted, after=after, limit=limit + 1)
        deliveries, token = [delivery_of(one) for one in found[:limit]], ""
        shown = fitting(deliveries)
        if len(found) > shown and (last := found[shown - 1]).dead_letter_at is not None:
            token = instant_token(last.dead_letter_at, last.id, query=query)
        return pb.ListDeadLettersResponse(deliveries=deliveries[:shown], next_page_token=token)

    async def CountDeadLetters(
        self, request: pb.CountDeadLettersRequest, context: Context[object, object]
    ) -> pb.CountDeadLettersResponse:
        """How many there are, by channel, state and reason."""
        violations = Violations()
        wanted = _checked_filter(violations, request.filter)
        violations.raise_if_any()
        async with self._db.read() as tx:
            found = await self._dead_letters.counts(tx, tenant_of(context), wanted, limit=MAX_COUNTS)
        return pb.CountDeadLettersResponse(counts=map(count_of, found), total=sum(one.count for one in found))

    async def Redrive(self, request: pb.RedriveRequest, context: Context[object, object]) -> pb.RedriveResponse:
        """Send dead or held deliveries again: those named, all of them or none; or those that match."""
        violations = Violations()
        key = check_text(violations, "idempotency_key", request.idempotency_key, longest=MAX_KEY)
        ids = _checked_ids(violations, request)
        wanted = _checked_filter(violations, request.filter)
        limit = check_number(violations, "limit", request.limit or MAX_REDRIVEN, least=1, most=MAX_REDRIVEN_BY_FILTER)
        if request.limit and not request.HasField("filter"):
            violations.add("limit", "is for a filter")
        violations.raise_if_any()
        tenant = tenant_of(context)
        redriven_now = 0  # A repeated call answers as the first one did, and redrives nothing.
        async with self._db.transaction() as tx:

            async def work() -> bytes:
                nonlocal redriven_now
                now = self._clock.now()
                if ids:
                    answer = pb.RedriveResponse(redriven=await self._dead_letters.redrive(tx, tenant, ids, now=now))
                else:
                    redriven, remaining = await self._dead_letters.redrive_matching(
                        tx, tenant, wanted, limit=limit, now=now
                    )
                    answer = pb.RedriveResponse(redriven=redriven, remaining=remaining)
                redriven_now = answer.redriven
                return answer.SerializeToString()

            response = await self._keys.once(
                tx, tenant, method="Redrive", key=key, fingerprint=_fingerprint(request, ids), work=work
            )
        metrics.REDRIVEN.inc(redriven_now)
        self._on_work()
        return pb.RedriveResponse.FromString(response)


def _checked_ids(violations: Violations, request: pb.RedriveRequest) -> list[UUID]:
    """Each once, in order; empty when a filter is given instead."""
    if request.HasField("filter"):
        if request.delivery_ids:
            violations.add("delivery_ids", "must be empty when a filter is given")
        return []
    check_count(violations, "delivery_ids", request.delivery_ids, most=MAX_REDRIVEN)
    ids = [check_id(violations, f"delivery_ids[{n}]", one) for n, one in enumerate(request.delivery_ids)]
    return sorted({one for one in ids if one is not None})


def _fingerprint(request: pb.RedriveRequest, ids: Sequence[UUID]) -> bytes:
    """What a key stands for. Of named deliveries it is made as ever, so that keys survive an upgrade."""
    if not request.HasField("filter"):
        return sha256(b"".join(one.bytes for one in ids)).digest()
    content = pb.RedriveRequest(filter=request.filter, limit=request.limit)
    return sha256(b"filter" + content.SerializeToString(deterministic=True)).digest()


def _checked_filter(violations: Violations, given: pb.DeadLetterFilter) -> DeadLetterFilter:
    if given.channel and given.channel not in CHANNELS:
        violations.add("filter.channel", f"must be one of {', '.join(CHANNELS)}")
    since, until = (
        check_instant(violations, f"filter.{name}", getattr(given, name)) if given.HasField(name) else None
        for name in ("start_time", "end_time")
    )
    states = {int(state) for state in DEAD_LETTERS}
    if given.state and given.state not in states:
        violations.add("filter.state", "must be DELIVERY_STATE_DEAD or DELIVERY_STATE_HELD")
    return DeadLetterFilter(
        channel=given.channel,
        reason=check_text(violations, "filter.reason", given.reason, shortest=0, longest=64),
        subscriber=check_text(violations, "filter.subscriber", given.subscriber, shortest=0, longest=256),
        since=since,
        until=until,
        state=State(given.state) if given.state in states else None,
    )
