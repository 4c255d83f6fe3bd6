"""The dispatcher's gRPC service: questions about deliveries, redriving, suppressions."""

from collections.abc import Callable, Sequence
from typing import Protocol
from uuid import UUID

import grpc
from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.dispatcher.v1 import dispatcher_pb2_grpc as pb_grpc

from libs.clock import Clock
from libs.errors import NotFound, Violations
from libs.explaining import Bounds, nearest
from libs.postgres import Database, Transaction
from libs.rpc import Servicer, tenant_of
from libs.wire import After, check_count, check_id, check_page_size, check_text, instant_token, read_instant_token
from services.dispatcher.delivery import State
from services.dispatcher.records import AttemptRecord, Content, DeliveryRecord, story
from services.dispatcher.rpc_dead_letters import DeadLetters, DeadLettersRpc, Keys
from services.dispatcher.rpc_messages import (
    attempt_of,
    content_of,
    delivery_of,
    entry_of,
    fitting,
)
from services.dispatcher.rpc_suppressions import Suppressions, SuppressionsRpc

MAX_ATTEMPTS = 1_000
MAX_STORIES = 100

Context = grpc.aio.ServicerContext


class Deliveries(Protocol):
    """What the service needs of the store of deliveries."""

    async def get(self, tx: Transaction, tenant: str, delivery_id: UUID) -> DeliveryRecord | None: ...
    async def page(
        self,
        tx: Transaction,
        tenant: str,
        *,
        subscriber: str,
        digest_id: UUID | None,
        states: Sequence[State],
        after: After | None,
        limit: int,
    ) -> list[DeliveryRecord]: ...
    async def of_id(self, tx: Transaction, tenant: str, id_: UUID, *, limit: int) -> list[DeliveryRecord]: ...
    async def attempts(
        self, tx: Transaction, tenant: str, delivery_ids: Sequence[UUID], *, limit: int
    ) -> list[AttemptRecord]: ...
    async def content(self, tx: Transaction, tenant: str, delivery_id: UUID) -> Content | None: ...


class DispatcherRpc(DeadLettersRpc, SuppressionsRpc, pb_grpc.DispatcherServiceServicer):
    """See proto/carillon/dispatcher/v1/dispatcher.proto."""

    def __init__(
        self,
        *,
        db: Database,
        clock: Clock,
        deliveries: Deliveries,
        dead_letters: DeadLetters,
        suppressions: Suppressions,
        keys: Keys,
        on_work: Callable[[], None],
    ) -> None:
        """`on_work` is called after a commit that queued something."""
        self._db = db
        self._clock = clock
        self._deliveries = deliveries
        self._dead_letters = dead_letters
        self._suppressions = suppressions
        self._keys = keys
        self._on_work = on_work

    async def ListDeliveries(
        self, request: pb.ListDeliveriesRequest, context: Context[object, object]
    ) -> pb.ListDeliveriesResponse:
        """Newest first."""
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        subscriber = check_text(violations, "subscriber", request.subscriber, shortest=0, longest=256)
        digest_id = check_id(violations, "digest_id", request.digest_id) if request.digest_id else None
        states = _states(violations, request.states)
        violations.raise_if_any()
        query = f"{subscriber}\x1f{digest_id}\x1f{sorted(states)}"
        after = read_instant_token(request.page_token, query=query)
        async with self._db.read() as tx:
            found = await self._deliveries.page(
                tx,
                tenant_of(context),
                subscriber=subscriber,
                digest_id=digest_id,
                states=states,
                after=after,
                limit=limit + 1,
            )
        deliveries, token = [delivery_of(one) for one in found[:limit]], ""
        if len(found) > (shown := fitting(deliveries)):
            token = instant_token(found[shown - 1].created_at, found[shown - 1].id, query=query)
        return pb.ListDeliveriesResponse(deliveries=deliveries[:shown], next_page_token=token)

    async def GetDelivery(
        self, request: pb.GetDeliveryRequest, context: Context[object, object]
    ) -> pb.GetDeliveryResponse:
        """One delivery with its attempts."""
        violations = Violations()
        delivery_id = check_id(violations, "id", request.id)
        violations.raise_if_any()
        assert delivery_id is not None
        tenant = tenant_of(context)
        async with self._db.read() as tx:
            delivery = await self._deliveries.get(tx, tenant, delivery_id)
            if delivery is None:
                raise NotFound(f"There is no delivery {delivery_id}.", reason="DELIVERY_UNKNOWN")
            attempts = await self._deliveries.attempts(tx, tenant, [delivery_id], limit=MAX_ATTEMPTS)
            content = await self._deliveries.content(tx, tenant, delivery_id) if request.with_content else None
        return pb.GetDeliveryResponse(
            delivery=delivery_of(delivery),
            attempts=map(attempt_of, attempts),
            content=None if content is None else content_of(content),
        )

    async def Explain(self, request: pb.ExplainRequest, context: Context[object, object]) -> pb.ExplainResponse:
        """The story of a delivery, or of all deliveries of a digest."""
        violations = Violations()
        text = check_text(violations, "id", request.id, longest=256)
        violations.raise_if_any()
        id_ = check_id(Violations(), "id", text)
        if id_ is None:  # It may be the id of something else; then nothing is known of it here.
            return pb.ExplainResponse()
        tenant, bounds = tenant_of(context), Bounds()
        async with self._db.read() as tx:
            found = bounds.noted(await self._deliveries.of_id(tx, tenant, id_, limit=MAX_STORIES), MAX_STORIES)
            ids = [one.id for one in found]
            attempts = await self._deliveries.attempts(tx, tenant, ids, limit=MAX_ATTEMPTS) if ids else []
        bounds.noted(attempts, MAX_ATTEMPTS)
        told = [entry for one in found for entry in story(one, [a for a in attempts if a.delivery_id == one.id])]
        entries, is_cut = nearest(told, self._clock.now(), entry_of)
        return pb.ExplainResponse(entries=entries, is_cut=is_cut or bounds.are_met)


def servicer(rpc: DispatcherRpc) -> Servicer:
    """What libs.service registers."""
    return Servicer(pb_grpc.add_DispatcherServiceServicer_to_server, rpc)


def _states(violations: Violations, values: Sequence[int]) -> list[State]:
    check_count(violations, "states", values, least=0, most=len(State))
    known = {int(state) for state in State}
    for n, value in enumerate(values):
        if value not in known:
            violations.add(f"states[{n}]", f"must be one of {', '.join(pb.DeliveryState.keys()[1:])}")
    return [State(value) for value in values if value in known]
