"""Puts intake together."""

from libs.history import History
from libs.service import Runtime, Service
from services.intake import metrics
from services.intake.loops import Measuring, Pruning
from services.intake.rpc import IntakeRpc, servicer
from services.intake.rpc_limits import RateLimit
from services.intake.settings import ServiceSettings
from services.intake.store import CommandStore
from services.intake.store_requests import FORGOTTEN_AT_ONCE, RequestStore
from services.intake.stream import Acceptance, Closings
from services.intake.stream_backlog import TENANT_HEADER, Backlogs
from services.intake.stream_entries import Entries


async def build(runtime: Runtime, settings: ServiceSettings) -> Service:
    """See libs.service.Build."""
    metrics.initialise()
    commands, requests, entries = CommandStore(), RequestStore(), Entries(shards=runtime.shards)
    backlogs = Backlogs(most=settings.intake.tenant_backlog)
    rpc = IntakeRpc(
        db=runtime.db,
        clock=runtime.clock,
        acceptance=Acceptance(db=runtime.db, sender=runtime.sender, store=commands, backlogs=backlogs),
        entries=entries,
        requests=requests,
        rate=RateLimit(rate=settings.intake.tenant_rate, burst=settings.intake.tenant_burst),
        answer_margin=settings.intake.answer_margin,
    )
    closings = Closings(
        clock=runtime.clock, sender=runtime.sender, sequences=commands, requests=requests, entries=entries
    )
    pruning = Pruning(
        db=runtime.db,
        store=commands,
        retention=settings.intake.idempotency_retention,
        interval=settings.intake.prune_interval,
    )
    history = History(
        db=runtime.db,
        forget=requests.forget,
        at_once=FORGOTTEN_AT_ONCE,
        clock=runtime.clock,
        retention=settings.intake.request_retention,
        forgotten=metrics.FORGOTTEN_REQUESTS,
    )
    measuring = Measuring(db=runtime.db, store=commands, backlogs=backlogs, header=TENANT_HEADER)
    return Service(
        servicers=[servicer(rpc)],
        apply=closings.apply,
        loops={"prune": pruning.run, "history": history.run, "measure": measuring.run},
    )
