"""Attempts: how often and when a timer whose event came to nothing is tried again. Pure."""

from datetime import datetime, timedelta
from hashlib import blake2b
from uuid import UUID

from msgspec import Struct

from libs.backoff import Backoff

_SECOND = timedelta(seconds=1)
MAX_ERROR = 2_048
"""Characters of an error that are kept."""


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """min(initial × multiplier^n, longest), with full jitter; at most so many attempts, none later than `most_age`."""

    initial: timedelta = 30 * _SECOND
    longest: timedelta = timedelta(hours=1)
    multiplier: float = 2.0
    most_attempts: int = 8
    most_age: timedelta = timedelta(days=3)

    def next_at(self, timer_id: UUID, attempts: int, *, first_at: datetime, now: datetime) -> datetime | None:
        """When to try again after `attempts` failed ones; None: no more. The jitter is fixed per timer and attempt."""
        if attempts >= self.most_attempts:
            return None
        backoff = Backoff(first=self.initial, longest=self.longest, multiplier=self.multiplier)
        at = now + backoff.delay(attempts, draw=fraction_of(timer_id, attempts))
        return at if at <= first_at + self.most_age else None


class EndedAttempt(Struct, frozen=True, kw_only=True):
    """An attempt on record; no error means done."""

    timer_id: UUID
    number: int
    started_at: datetime
    ended_at: datetime
    error: str | None


def fraction_of(timer_id: UUID, salt: int) -> float:
    """A number in [0, 1) that looks random and is always the same for the same timer: whoever decides again agrees."""
    digest = blake2b(timer_id.bytes + salt.to_bytes(4), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)
