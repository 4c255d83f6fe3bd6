"""Dead frames over gRPC: listed, shown, and applied once more by the service they were for."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from carillon.link.v1 import dead_frame_pb2 as pb
from carillon.link.v1 import dead_frame_pb2_grpc as pb_grpc
from carillon.link.v1 import link_pb2
from prometheus_client import CollectorRegistry

from libs.ids import new_id
from libs.links import dead
from libs.links.dead_rpc import dead_frame_servicer
from libs.links.frames import OutgoingFrame
from libs.links.sender import Sender
from libs.rpc import build_server
from libs.rpc_client import connect
from libs.rpc_context import Principal
from libs.settings import GrpcSettings, LinkSettings
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_process import RECEIVER
from tests.support.link_world import LinkWorld, make_world, running, until

ROLES = {"operator": frozenset({"operator"}), "anybody": frozenset[str]()}


class ByTenant:
    """An operator is who says so; what callers are is not under test here."""

    async def authenticate(self, metadata: Any) -> Principal:
        """See Authenticator."""
        name = str(dict(metadata)["carillon-tenant"])
        return Principal(tenant=name, subject=name, roles=ROLES[name])


class Desk:
    """A server with one receiver's dead frames, and stubs for two callers."""

    def __init__(self, world: LinkWorld, operator: Any, anybody: Any, published: list[OutgoingFrame]) -> None:
        self.world, self.operator, self.anybody, self.published = world, operator, anybody, published

    async def bury(self, payload: bytes | None = None, *, sender: str = "intake", reason: str = "a bug") -> str:
        """Put a frame aside."""
        frame_id = new_id()
        frame = link_pb2.Frame(id=frame_id.bytes, sender=sender, receiver=RECEIVER)
        frame.entries.add(tenant="shop", put_facts=link_pb2.PutFacts(entity="order/7", facts='{"paid": true}'))
        async with self.world.receiver_db.transaction() as tx:
            await dead.bury(
                tx,
                frame_id,
                sender=sender,
                partition=0,
                payload=frame.SerializeToString() if payload is None else payload,
                entries=1,
                reason=reason,
                deliveries=1,
            )
        return str(frame_id)


@pytest.fixture
async def desk(open_database: OpenDatabase, postgres_url: str, nats_url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    """The receiver's end of a link with a server in front of it."""
    world = await make_world(open_database, postgres_url, nats_url, tmp_path)
    published: list[OutgoingFrame] = []
    async with AsyncExitStack() as stack:
        servicer = dead_frame_servicer(
            db=world.receiver_db, service=RECEIVER, publish=published.extend, settings=LinkSettings()
        )
        server = await stack.enter_async_context(
            build_server(GrpcSettings(), auth=ByTenant(), servicers=[servicer], registry=CollectorRegistry())
        )
        operator, anybody = [
            pb_grpc.DeadFrameServiceStub(await stack.enter_async_context(connect(server.address, tenant=name)))
            for name in ROLES
        ]
        yield Desk(world, operator, anybody, published)


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    """What a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_dead_frames_are_listed_last_first_in_pages(desk: Desk) -> None:
    """With sender, size and reason; of one sender where asked for."""
    ids = [await desk.bury(sender=sender) for sender in ("intake", "digest", "intake")]
    first = await desk.operator.ListDeadFrames(pb.ListDeadFramesRequest(page_size=2))
    rest = await desk.operator.ListDeadFrames(pb.ListDeadFramesRequest(page_size=2, page_token=first.next_page_token))
    assert [one.id for one in (*first.dead_frames, *rest.dead_frames)] == ids[::-1]
    assert (first.total, rest.next_page_token) == (3, "")
    assert (first.dead_frames[0].sender, first.dead_frames[0].reason, first.dead_frames[0].entries) == (
        "intake",
        "a bug",
        1,
    )
    assert first.dead_frames[0].size_bytes > 0
    digest = await desk.operator.ListDeadFrames(pb.ListDeadFramesRequest(sender="digest"))
    assert [one.id for one in digest.dead_frames] == [ids[1]]


async def test_a_dead_frame_shows_what_is_in_it(desk: Desk) -> None:
    """Entries as JSON; what was no frame at all shows nothing, and what is not there is not found."""
    shown = await desk.operator.GetDeadFrame(pb.GetDeadFrameRequest(id=await desk.bury()))
    (entry,) = shown.entries
    assert '"entity": "order/7"' in entry
    assert shown.dead_frame.reason == "a bug"
    garbage = await desk.operator.GetDeadFrame(pb.GetDeadFrameRequest(id=await desk.bury(b"\xff\xff", sender="")))
    assert not garbage.entries
    missing = desk.operator.GetDeadFrame(pb.GetDeadFrameRequest(id=str(new_id())))
    assert await code_of(missing) is grpc.StatusCode.NOT_FOUND


async def test_redriven_frames_leave_through_the_services_own_outbox(desk: Desk) -> None:
    """Under a new id and published at once; what is no frame stays, and a second time there is nothing to do."""
    good, garbage = await desk.bury(), await desk.bury(b"\xff\xff", sender="")
    answer = await desk.operator.RedriveDeadFrames(pb.RedriveDeadFramesRequest(ids=[good, garbage]))
    assert (answer.redriven, list(answer.left_ids)) == (1, [garbage])
    (frame,) = desk.published
    assert frame.receiver == RECEIVER
    assert str(frame.id) != good
    again = await desk.operator.RedriveDeadFrames(pb.RedriveDeadFramesRequest(ids=[good]))
    assert (again.redriven, list(again.left_ids)) == (0, [good])
    assert await desk.world.dead() == 1


async def test_a_redriven_frame_is_applied_and_confirmed(desk: Desk, open_bus: OpenBus) -> None:
    """The way is the one that every frame takes: stream, inbox, receipt."""
    bus = await open_bus()
    applied: list[str] = []

    async def apply(_tx: object, frames: Any) -> Any:
        from libs.links.receiver import Applied

        applied.extend(entry.put_facts.entity for one in frames for entry in one.frame.entries)
        return Applied()

    sender = Sender(
        db=desk.world.receiver_db,
        bus=bus,
        service=RECEIVER,
        replica="one",
        receivers=(),
        settings=LinkSettings(),
    )
    async with running(sender.run(), desk.world.receiver(bus, apply).run()):
        frame_id = await desk.bury()
        await desk.operator.RedriveDeadFrames(pb.RedriveDeadFramesRequest(ids=[frame_id]))
        sender.publish(desk.published)

        async def is_confirmed() -> bool:
            async with desk.world.receiver_db.read() as tx:
                row = await (await tx.raw.execute("SELECT count(*) FROM outbox")).fetchone()
            return row == (0,)

        await until(is_confirmed)
    assert applied == ["order/7"]
    assert await desk.world.dead() == 0


async def test_only_operators_see_dead_frames(desk: Desk) -> None:
    """They hold what all tenants sent (INV-8)."""
    frame_id = await desk.bury()
    calls = (
        desk.anybody.ListDeadFrames(pb.ListDeadFramesRequest()),
        desk.anybody.GetDeadFrame(pb.GetDeadFrameRequest(id=frame_id)),
        desk.anybody.RedriveDeadFrames(pb.RedriveDeadFramesRequest(ids=[frame_id])),
    )
    assert [await code_of(call) for call in calls] == [grpc.StatusCode.PERMISSION_DENIED] * 3
    assert await desk.world.dead() == 1


async def test_ids_that_are_none_are_refused(desk: Desk) -> None:
    """Before anything is redriven; and so is an empty list."""
    for ids in ([], ["x"], [await desk.bury(), "x"]):
        call = desk.operator.RedriveDeadFrames(pb.RedriveDeadFramesRequest(ids=ids))
        assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT
    assert await desk.world.dead() == 1
