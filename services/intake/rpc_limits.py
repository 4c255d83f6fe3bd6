"""How many items a second each tenant may send to this process: GCRA, a token bucket that keeps one number per tenant.

Each process counts for itself, in its memory: a limit shared by all replicas would cost every call a round trip, and
this one is there to protect the process. After a restart every tenant has its whole burst again.

The clock is the process's monotonic one, not business time: what is limited is real work.
"""

import asyncio
from datetime import timedelta

from throttled import RateLimiterType, Throttled, per_sec
from throttled.store import MemoryStore

from libs.errors import ResourceExhausted
from services.intake import metrics

MAX_TENANTS = 10_000
"""Tenants remembered, those that called last (INV-9); one that is forgotten has its whole burst again."""


class RateLimit:
    """`rate` items per second and tenant, `burst` at once; a rate of 0 limits nothing."""

    def __init__(self, *, rate: int, burst: int) -> None:
        self._rate = rate
        self._throttled = Throttled(
            using=RateLimiterType.GCRA.value,
            quota=per_sec(max(rate, 1), burst),
            store=MemoryStore(options={"MAX_SIZE": MAX_TENANTS}),
        )

    def take(self, tenant: str, items: int) -> None:
        """Count `items`, at most the burst. Raises ResourceExhausted when they are too many now: then none counts."""
        if delay_s := self._delay_s(tenant, items):
            metrics.LIMITED_CALLS.labels("rate").inc()
            raise ResourceExhausted(
                f"The tenant {tenant} has sent more than its {self._rate:,} items per second; come back later.",
                reason="TENANT_RATE_EXCEEDED",
                retry_after=timedelta(seconds=delay_s),
                metadata={"rate": str(self._rate)},
            )

    async def wait(self, tenant: str, items: int) -> None:
        """Count `items`, at most the burst, as soon as they are not too many."""
        while delay_s := self._delay_s(tenant, items):  # noqa: ASYNC110 - what it waits for is time.
            await asyncio.sleep(delay_s)

    def _delay_s(self, tenant: str, items: int) -> float:
        """0 when the items are counted."""
        if not self._rate or not items:
            return 0
        result = self._throttled.limit(tenant, cost=items)
        return max(float(result.state.retry_after), 0.001) if result.limited else 0
