"""DigestService: questions and settings over gRPC."""

from carillon.digest.v1 import digest_pb2_grpc

from libs.clock import Clock
from libs.postgres import Database
from libs.rpc import Servicer
from services.digest.boundaries import Boundaries
from services.digest.rpc_catalog import CatalogRpc
from services.digest.rpc_previews import PreviewsRpc
from services.digest.rpc_stores import CatalogStore, MovingStore, Press, PreviewStore, Timers, ViewStore
from services.digest.rpc_views import ViewsRpc


class DigestRpc(CatalogRpc, PreviewsRpc, ViewsRpc, digest_pb2_grpc.DigestServiceServicer):
    """All RPCs, written in three modules because one would be too long."""

    def __init__(
        self,
        *,
        db: Database,
        catalog: CatalogStore,
        moving: MovingStore,
        views: ViewStore,
        previews: PreviewStore,
        timers: Timers,
        press: Press,
        boundaries: Boundaries,
        clock: Clock,
    ) -> None:
        CatalogRpc.__init__(
            self, db=db, catalog=catalog, moving=moving, timers=timers, press=press, boundaries=boundaries, clock=clock
        )
        PreviewsRpc.__init__(self, db=db, catalog=catalog, press=press, clock=clock)
        ViewsRpc.__init__(self, db=db, views=views, previews=previews, press=press, clock=clock)


def servicer(rpc: DigestRpc) -> Servicer:
    """For libs.rpc.build_server."""
    return Servicer(digest_pb2_grpc.add_DigestServiceServicer_to_server, rpc)
