"""`carillon audit` against a real digest server and a dispatcher that says what a test wants."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
from carillon.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from carillon.link.v1 import backlog_pb2, backlog_pb2_grpc
from prometheus_client import CollectorRegistry

from cli.audit import Audit
from cli.connection import Connection
from cli.session import Session
from libs.errors import NotFound
from libs.ids import new_id
from libs.links import dead
from libs.links.backlog_rpc import backlog_servicer
from libs.links.dead_rpc import dead_frame_servicer
from libs.rpc import Servicer, build_server
from libs.rpc_client import connect
from libs.rpc_context import Principal
from libs.settings import GrpcSettings, LinkSettings
from services.digest.rpc import servicer
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

ROOT = Path(__file__).resolve().parents[2]


class ByToken:
    """The token is the role; what callers are is not under test here."""

    async def authenticate(self, metadata: Any) -> Principal:
        """See Authenticator."""
        role = str(dict(metadata).get("authorization", "")).removeprefix("Bearer ")
        return Principal(tenant="acme", subject=role, roles=frozenset({role}))


@dataclass
class Dispatcher(dispatcher_pb2_grpc.DispatcherServiceServicer):
    """Knows deliveries by their states, and how often it was asked."""

    states: dict[str, dispatcher_pb2.DeliveryState.ValueType] = field(default_factory=dict)
    asked: int = 0

    async def GetDelivery(
        self, request: dispatcher_pb2.GetDeliveryRequest, context: object
    ) -> dispatcher_pb2.GetDeliveryResponse:
        """Of those that it knows."""
        self.asked += 1
        if request.id not in self.states:
            raise NotFound("There is none.", reason="DELIVERY_UNKNOWN")
        return dispatcher_pb2.GetDeliveryResponse(
            delivery=dispatcher_pb2.Delivery(id=request.id, state=self.states[request.id])
        )


@dataclass(frozen=True, kw_only=True)
class World:
    """Two servers, of which digest's also tells of its links."""

    rig: Rig
    dispatcher: Dispatcher
    digest_address: str
    dispatcher_address: str

    async def run(self, *arguments: str, token: str = "operator", **environment: str) -> tuple[int, str]:
        """Run the command; returns its code and what it wrote."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", "audit", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
                "CARILLON_DIGEST_ENDPOINT": self.digest_address,
                "CARILLON_DISPATCHER_ENDPOINT": self.dispatcher_address,
                "CARILLON_TOKEN": token,
                "COLUMNS": "160",
                **environment,
            },
        )
        out, _ = await asyncio.wait_for(process.communicate(), timeout=30)
        return process.returncode or 0, out.decode()

    async def lost(self) -> dict[str, str]:
        """What the audit finds of deliveries, without waiting between its looks."""
        addresses = {"digest": self.digest_address, "dispatcher": self.dispatcher_address}
        connections = {name: Connection(endpoint=one, token="operator") for name, one in addresses.items()}
        async with Session(connections=connections) as session:
            return (await Audit(session, between_looks_s=0).run()).lost


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[World]:
    """A digest that has handed one message over to a dispatcher that has it, and suppressed another."""
    migrate(postgres_url)
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(replica(postgres_url, open_database))
        dispatcher = Dispatcher()  # type: ignore[abstract]  # What is missing answers UNIMPLEMENTED.
        links = dead_frame_servicer(db=rig.db, service="digest", publish=lambda _: None, settings=LinkSettings())
        parts = {
            "digest": [servicer(rig.rpc), links, backlog_servicer(db=rig.db)],
            "dispatcher": [Servicer(dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server, dispatcher)],
        }
        addresses = {}
        for name, servicers in parts.items():
            server = build_server(GrpcSettings(), auth=ByToken(), servicers=servicers, registry=CollectorRegistry())
            addresses[name] = (await stack.enter_async_context(server)).address
        await rig.put_type()
        await rig.put_subscriber("ann")
        await rig.apply(rig.notification("ann"), rig.notification("nobody"))
        await rig.close()
        (delivery,) = await rig.deliveries()
        dispatcher.states[delivery_id(delivery)] = dispatcher_pb2.DELIVERY_STATE_RETRYING
        yield World(
            rig=rig,
            dispatcher=dispatcher,
            digest_address=addresses["digest"],
            dispatcher_address=addresses["dispatcher"],
        )


def delivery_id(delivery: Any) -> str:
    """As text."""
    return str(UUID(bytes=delivery.id))


async def test_all_is_accounted_for(world: World) -> None:
    """Exit code 0, every item in one state, what is under way, and who was not asked."""
    code, out = await world.run("--json")
    told = json.loads(out)
    assert code == 0
    assert (told["is_accounted"], told["unaccounted"], told["notifications"]) == (True, 0, 2)
    assert told["items"] == [
        {"state": "sent_alone", "reason": "", "items": 1},
        {"state": "suppressed", "reason": "unknown_subscriber", "items": 1},
    ]
    assert (told["deliveries"], told["gaps"], told["lost_deliveries"]) == ({"pending": 1}, [], {})
    (under_way,) = told["links"]["digest"]["under_way"]
    assert (under_way["receiver"], under_way["frames"]) == ("dispatcher", 1)
    assert told["links"]["digest"]["dead_frames"] == 0
    assert told["links"]["dispatcher"] == {"not_told": "is of a version that does not tell"}
    assert told["not_asked"] == ["intake", "scheduler"]
    assert world.dispatcher.asked == 1


async def test_people_see_a_table_and_a_last_word(world: World) -> None:
    """Also a caller who may not look at links: that is said, and nothing is wrong with it."""
    code, out = await world.run(token="nobody")
    assert code == 0
    assert "2 notifications" in out
    assert "unknown_subscriber" in out
    assert "needs the role operator" in out
    assert "not asked: no endpoint given" in out
    assert out.rstrip().endswith("Everything is accounted for.")


async def test_only_operators_are_told_what_is_under_way(world: World) -> None:
    """A frame holds entries of all tenants."""
    async with connect(world.digest_address, token="operator") as operator, connect(world.digest_address) as other:
        request = backlog_pb2.ListBacklogsRequest()
        (one,) = (await backlog_pb2_grpc.BacklogServiceStub(operator).ListBacklogs(request)).backlogs
        assert (one.receiver, one.frames, one.HasField("oldest_age")) == ("dispatcher", 1, True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await backlog_pb2_grpc.BacklogServiceStub(other).ListBacklogs(request)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_row_that_vanished_is_told_with_its_id(world: World) -> None:
    """Exit code 1; the id is there to be explained."""
    async with world.rig.db.transaction() as tx:
        cursor = await tx.raw.execute("DELETE FROM item WHERE subscriber = 'nobody' RETURNING notification_id")
        row = await cursor.fetchone()
        assert row is not None
    code, out = await world.run()
    assert code == 1
    assert f"1 items of these notifications are gone: {row[0]}" in out
    assert out.rstrip().endswith("1 unaccounted for.")


async def test_frames_put_aside_are_unaccounted_for(world: World) -> None:
    """What is in them has not arrived, and will not by itself."""
    async with world.rig.db.transaction() as tx:
        await dead.bury(
            tx, new_id(), sender="intake", partition=0, payload=b"", entries=3, reason="a bug", deliveries=1
        )
    code, out = await world.run("--json")
    assert (code, json.loads(out)["links"]["digest"]["dead_frames"]) == (1, 1)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, "the dispatcher has never heard of it"),
        (dispatcher_pb2.DELIVERY_STATE_SENT, "the dispatcher has it as sent, and digest was not told"),
    ],
)
async def test_a_delivery_that_only_digest_waits_for_is_lost(
    world: World, state: dispatcher_pb2.DeliveryState.ValueType | None, says: str
) -> None:
    """Asked three times, because it, or its outcome, may be under way."""
    (one_id,) = world.dispatcher.states
    world.dispatcher.states = {} if state is None else {one_id: state}
    async with world.rig.db.transaction() as tx:
        await tx.raw.execute("DELETE FROM outbox")  # As if all had been confirmed.
    assert await world.lost() == {one_id: says}
    assert world.dispatcher.asked == 3


async def test_a_delivery_whose_frame_is_not_confirmed_is_not_lost(world: World) -> None:
    """The link is slow, or the dispatcher away: nothing is missing, and the person hears of it."""
    world.dispatcher.states = {}
    assert await world.lost() == {}
    code, out = await world.run()
    assert (code, "1 deliveries are still on their way" in out) == (0, True), out


async def test_a_delivery_that_was_still_under_way_is_not_lost(world: World) -> None:
    """Unknown at the first look, there at the second."""
    (known,) = [world.dispatcher.states]
    world.dispatcher.states = Appearing(known)
    assert await world.lost() == {}
    assert world.dispatcher.asked == 2


class Appearing(dict[str, dispatcher_pb2.DeliveryState.ValueType]):
    """Has what it has from the second question on."""

    is_there = False

    def __contains__(self, key: object) -> bool:
        was_there, self.is_there = self.is_there, True
        return was_there and super().__contains__(key)


async def test_a_service_that_cannot_be_reached_is_told(world: World) -> None:
    """Nothing is known to be missing, and nothing is known to be there."""
    code, out = await world.run(CARILLON_DISPATCHER_ENDPOINT="127.0.0.1:1")
    assert code == 1
    assert "dispatcher has not answered" in out
    assert "Not everybody has answered" in out
    code, out = await world.run("--json", CARILLON_DIGEST_ENDPOINT="127.0.0.1:1")
    assert (code, json.loads(out)["is_accounted"]) == (1, False)


async def test_a_command_line_that_cannot_be_used(world: World) -> None:
    """No file with that token, or no option of that name."""
    assert (await world.run("--token-file", "/nowhere"))[0] == 2
    assert (await world.run("--nonsense"))[0] == 2
