"""What a process says of itself, over gRPC: version, clock, and whether it reaches what it stands on."""

import grpc
from carillon.link.v1 import status_pb2 as pb
from carillon.link.v1 import status_pb2_grpc as pb_grpc

from libs.clock import Clock
from libs.jetstream import Bus
from libs.postgres import Database
from libs.rpc import Servicer
from libs.wire import to_timestamp

Context = grpc.aio.ServicerContext


class StatusRpc(pb_grpc.StatusServiceServicer):
    """See proto/carillon/link/v1/status.proto."""

    def __init__(
        self,
        *,
        service: str,
        replica: str,
        version: str,
        clock: Clock,
        is_test_clock: bool,
        bus: Bus,
        db: Database,
    ) -> None:
        self._who = pb.GetStatusResponse(service=service, replica=replica, version=version, is_test_clock=is_test_clock)
        self._clock, self._bus, self._db = clock, bus, db

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: Context[object, object]) -> pb.GetStatusResponse:
        """Now."""
        answer = pb.GetStatusResponse()
        answer.CopyFrom(self._who)
        answer.is_postgres_alive = await self._db.is_alive()
        answer.is_nats_connected = self._bus.is_connected
        answer.time.CopyFrom(to_timestamp(self._clock.now()))
        return answer


def status_servicer(
    *, service: str, replica: str, version: str, clock: Clock, is_test_clock: bool, bus: Bus, db: Database
) -> Servicer:
    """What libs.service registers for every service."""
    rpc = StatusRpc(
        service=service, replica=replica, version=version, clock=clock, is_test_clock=is_test_clock, bus=bus, db=db
    )
    return Servicer(pb_grpc.add_StatusServiceServicer_to_server, rpc)
