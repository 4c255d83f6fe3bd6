"""DigestService: questions and settings over gRPC."""

from collections.abc import Callable
from typing import Protocol

from carillon.digest.v1 import digest_pb2_grpc

from libs.clock import Clock
from libs.postgres import Database
from libs.rpc import Servicer
from services.digest.boundaries import Boundaries
from services.digest.rpc_catalog import CatalogRpc
from services.digest.rpc_explain import ExplainRpc, Stories
from services.digest.rpc_explain import Views as ExplainedViews
from services.digest.rpc_previews import PreviewsRpc
from services.digest.rpc_stores import (
    CatalogStore,
    Formatter,
    FormattingStore,
    MovingStore,
    Press,
    PreviewStore,
    SubscriberStore,
    Timers,
    ViewStore,
)
from services.digest.rpc_views import ViewsRpc


class Views(ViewStore, ExplainedViews, Protocol):
    """See store_views."""


class DigestRpc(CatalogRpc, PreviewsRpc, ViewsRpc, ExplainRpc, digest_pb2_grpc.DigestServiceServicer):
    """All RPCs, written in four modules because one would be too long."""

    def __init__(
        self,
        *,
        db: Database,
        catalog: CatalogStore,
        subscribers: SubscriberStore,
        moving: MovingStore,
        views: Views,
        stories: Stories,
        previews: PreviewStore,
        formatting: FormattingStore,
        formatter: Formatter,
        timers: Timers,
        press: Press,
        boundaries: Boundaries,
        clock: Clock,
        ring: Callable[[], None],
    ) -> None:
        CatalogRpc.__init__(
            self,
            db=db,
            catalog=catalog,
            subscribers=subscribers,
            formatter=formatter,
            moving=moving,
            timers=timers,
            press=press,
            boundaries=boundaries,
            clock=clock,
            ring=ring,
        )
        PreviewsRpc.__init__(
            self, db=db, catalog=catalog, formatting=formatting, formatter=formatter, press=press, clock=clock
        )
        ViewsRpc.__init__(self, db=db, views=views, previews=previews, formatter=formatter, press=press, clock=clock)
        ExplainRpc.__init__(self, db=db, views=views, stories=stories, boundaries=boundaries, clock=clock)


def servicer(rpc: DigestRpc) -> Servicer:
    """For libs.rpc.build_server."""
    return Servicer(digest_pb2_grpc.add_DigestServiceServicer_to_server, rpc)
