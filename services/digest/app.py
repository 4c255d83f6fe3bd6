"""How the digest service is put together."""

from libs.service import Runtime, Service
from services.digest import (
    store_catalog,
    store_expansion,
    store_formatting,
    store_history,
    store_ledger,
    store_rendering,
    store_stories,
    store_subscribers,
    store_traces,
    store_views,
    store_windows,
)
from services.digest.boundaries import Boundaries
from services.digest.loops import Alarm, Care, Closing
from services.digest.loops_aside import Aside
from services.digest.loops_formatting import Formatter
from services.digest.loops_history import History
from services.digest.loops_ledger import LedgerCheck
from services.digest.loops_press import Press
from services.digest.rpc import DigestRpc, servicer
from services.digest.settings import DigestServiceSettings, DigestSettings
from services.digest.stream import Inlet, Post, Timers


async def build(runtime: Runtime, settings: DigestServiceSettings) -> Service:
    """The service's parts; see libs.service."""
    boundaries, alarm = Boundaries(), Alarm()
    timers = Timers(sender=runtime.sender, windows=store_windows, shards=runtime.shards)
    inlet = Inlet(
        expansion=store_expansion,
        windows=store_windows,
        timers=timers,
        boundaries=boundaries,
        clock=runtime.clock,
        ring=alarm.ring,
    )
    # One press for the RPCs, so that a preview never waits for a herd; each starts its process when first needed.
    presses = [_press(settings.digest) for _ in range(settings.digest.render_workers + 1)]
    formatter = Formatter(settings=settings.digest)
    aside = Aside(db=runtime.db, claims=store_rendering, store=store_formatting, formatter=formatter, ring=alarm.ring)
    closing = {
        f"closing {number}": Closing(
            db=runtime.db,
            claims=aside,
            store=store_rendering,
            traced=store_traces,
            press=press,
            post=Post(sender=runtime.sender, windows=store_windows),
            timers=timers,
            clock=runtime.clock,
            wake=alarm.event(),
            settings=settings.digest,
        ).run
        for number, press in enumerate(presses[1:], start=1)
    }
    care = Care(
        db=runtime.db,
        tombstones=store_windows,
        counts=store_views,
        clock=runtime.clock,
        retention=runtime.links.tombstone_retention,
    )
    history = History(db=runtime.db, store=store_history, clock=runtime.clock)
    ledger = LedgerCheck(db=runtime.db, store=store_ledger)
    rpc = DigestRpc(
        db=runtime.db,
        catalog=store_catalog,
        subscribers=store_subscribers,
        formatting=store_formatting,
        formatter=formatter,
        moving=store_windows,
        views=store_views,
        stories=store_stories,
        previews=store_rendering,
        timers=timers,
        press=presses[0],
        boundaries=boundaries,
        clock=runtime.clock,
        ring=alarm.ring,
    )
    return Service(
        servicers=[servicer(rpc)],
        apply=inlet.apply,
        loops={**closing, "care": care.run, "history": history.run, "ledger": ledger.run},
        resources=[*presses, formatter, aside],
    )


def _press(settings: DigestSettings) -> Press:
    return Press(time_limit=settings.render_timeout, memory_bytes=settings.render_memory_bytes)
