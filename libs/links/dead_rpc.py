"""Dead frames over gRPC: every service lists its own, shows what is in them, and applies them once more.

A frame holds what several tenants sent, so that only operators may ask.
"""

from collections.abc import Callable, Sequence

import grpc
from carillon.link.v1 import dead_frame_pb2 as pb
from carillon.link.v1 import dead_frame_pb2_grpc as pb_grpc
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import DecodeError

from libs.auth import OPERATOR
from libs.errors import NotFound, Violations
from libs.links import dead
from libs.links.frames import OutgoingFrame, decoded
from libs.postgres import Database
from libs.rpc import Servicer, require_role
from libs.settings import LinkSettings
from libs.wire import (
    check_count,
    check_id,
    check_page_size,
    check_text,
    instant_token,
    read_instant_token,
    to_timestamp,
)

MAX_REDRIVEN = 1_000
MAX_SHOWN = 100
MAX_SHOWN_CHARACTERS = 16_384

Context = grpc.aio.ServicerContext


class DeadFrameRpc(pb_grpc.DeadFrameServiceServicer):
    """See proto/carillon/link/v1/dead_frame.proto."""

    def __init__(
        self,
        *,
        db: Database,
        service: str,
        publish: Callable[[Sequence[OutgoingFrame]], None],
        settings: LinkSettings,
    ) -> None:
        """`service` is the one whose dead frames these are."""
        self._db = db
        self._service = service
        self._publish = publish
        self._settings = settings

    async def ListDeadFrames(
        self, request: pb.ListDeadFramesRequest, context: Context[object, object]
    ) -> pb.ListDeadFramesResponse:
        """Those put aside last first."""
        require_role(context, OPERATOR)
        violations = Violations()
        limit = check_page_size(violations, request.page_size)
        sender = check_text(violations, "sender", request.sender, shortest=0, longest=64)
        violations.raise_if_any()
        after = read_instant_token(request.page_token, query=sender)
        async with self._db.read() as tx:
            found = await dead.dead_frames(tx, limit=limit + 1, sender=sender, after=after)
            total = await dead.count_dead(tx)
        token = ""
        if len(found) > limit:
            last = found[limit - 1]
            token = instant_token(last.buried_at, last.frame_id, query=sender)
        return pb.ListDeadFramesResponse(
            dead_frames=map(_dead_frame, found[:limit]), next_page_token=token, total=total
        )

    async def GetDeadFrame(
        self, request: pb.GetDeadFrameRequest, context: Context[object, object]
    ) -> pb.GetDeadFrameResponse:
        """One frame with what is in it."""
        require_role(context, OPERATOR)
        violations = Violations()
        frame_id = check_id(violations, "id", request.id)
        violations.raise_if_any()
        assert frame_id is not None
        async with self._db.read() as tx:
            found = await dead.dead_frame(tx, frame_id)
        if found is None:
            raise NotFound(f"{self._service} has no dead frame {frame_id}.", reason="DEAD_FRAME_UNKNOWN")
        return pb.GetDeadFrameResponse(dead_frame=_dead_frame(found[0]), entries=_shown(found[1]))

    async def RedriveDeadFrames(
        self, request: pb.RedriveDeadFramesRequest, context: Context[object, object]
    ) -> pb.RedriveDeadFramesResponse:
        """Apply frames once more, under new ids."""
        require_role(context, OPERATOR)
        violations = Violations()
        check_count(violations, "ids", request.ids, most=MAX_REDRIVEN)
        ids = [check_id(violations, f"ids[{n}]", one) for n, one in enumerate(request.ids)]
        violations.raise_if_any()
        wanted = sorted({one for one in ids if one is not None})
        async with self._db.transaction() as tx:
            sent, frames = await dead.redrive(
                tx,
                wanted,
                receiver=self._service,
                first_sweep=self._settings.republish_after,
                retention=self._settings.inbox_retention,
            )
        self._publish(frames)
        left = [str(one) for one in wanted if one not in set(sent)]
        return pb.RedriveDeadFramesResponse(redriven=len(sent), left_ids=left)


def dead_frame_servicer(
    *, db: Database, service: str, publish: Callable[[Sequence[OutgoingFrame]], None], settings: LinkSettings
) -> Servicer:
    """What libs.service registers for every service."""
    rpc = DeadFrameRpc(db=db, service=service, publish=publish, settings=settings)
    return Servicer(pb_grpc.add_DeadFrameServiceServicer_to_server, rpc)


def _dead_frame(one: dead.DeadFrame) -> pb.DeadFrame:
    return pb.DeadFrame(
        id=str(one.frame_id),
        sender=one.sender,
        partition=one.partition,
        entries=one.entries,
        reason=one.reason,
        bury_time=to_timestamp(one.buried_at),
        size_bytes=one.size_bytes,
    )


def _shown(payload: bytes) -> list[str]:
    try:
        frame = decoded(payload)
    except DecodeError:
        return []
    return [MessageToJson(one, indent=None)[:MAX_SHOWN_CHARACTERS] for one in frame.entries[:MAX_SHOWN]]
