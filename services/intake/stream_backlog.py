"""What each tenant has under way, so that one tenant cannot fill a link for all: frames in the outbox, without receipt.

A frame that a call makes says in its headers whose it is. The counts come from the table once a second, all replicas'
frames included (loops.Measuring); between two looks a tenant may exceed its share by what it sends in that second.
"""

from collections.abc import Mapping
from datetime import timedelta

from libs.errors import ResourceExhausted
from libs.telemetry import traces
from services.intake import metrics

RETRY_AFTER = timedelta(seconds=5)
TENANT_HEADER = "Carillon-Tenant"


def carrier_of(tenant: str) -> dict[str, str]:
    """The headers of a tenant's frames: the current trace where it is sampled, and whose they are."""
    return traces.carried() | {TENANT_HEADER: tenant}


class Backlogs:
    """`most` frames per tenant."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._full: Mapping[str, int] = {}

    def learn(self, frames: Mapping[str, int]) -> None:
        """How many frames each tenant has under way."""
        self._full = {tenant: count for tenant, count in frames.items() if count >= self._most}

    def check_room(self, tenant: str) -> None:
        """Raise ResourceExhausted when the tenant has as many as it may (INV-9); call before accepting a command."""
        if tenant in self._full:
            metrics.LIMITED_CALLS.labels("backlog").inc()
            raise ResourceExhausted(
                f"{self._full[tenant]:,} frames of the tenant {tenant} wait to be applied; come back later.",
                reason="TENANT_BACKLOG_FULL",
                retry_after=RETRY_AFTER,
                metadata={"limit": str(self._most)},
            )
