"""What a service has sent and has no receipt for, over gRPC.

A frame holds what several tenants sent, so that only operators may ask.
"""

from datetime import timedelta

import grpc
from carillon.link.v1 import backlog_pb2 as pb
from carillon.link.v1 import backlog_pb2_grpc as pb_grpc

from libs.auth import OPERATOR
from libs.links.outbox import backlogs
from libs.postgres import Database
from libs.rpc import Servicer, require_role
from libs.wire import to_duration

Context = grpc.aio.ServicerContext


class BacklogRpc(pb_grpc.BacklogServiceServicer):
    """See proto/carillon/link/v1/backlog.proto."""

    def __init__(self, *, db: Database) -> None:
        self._db = db

    async def ListBacklogs(
        self, _request: pb.ListBacklogsRequest, context: Context[object, object]
    ) -> pb.ListBacklogsResponse:
        """One per receiver, by name."""
        require_role(context, OPERATOR)
        async with self._db.read() as tx:
            found = await backlogs(tx)
        return pb.ListBacklogsResponse(
            backlogs=[
                pb.Backlog(
                    receiver=one.receiver, frames=one.frames, oldest_age=to_duration(timedelta(seconds=one.oldest_s))
                )
                for one in sorted(found, key=lambda one: one.receiver)
            ]
        )


def backlog_servicer(*, db: Database) -> Servicer:
    """What libs.service registers for every service."""
    return Servicer(pb_grpc.add_BacklogServiceServicer_to_server, BacklogRpc(db=db))
