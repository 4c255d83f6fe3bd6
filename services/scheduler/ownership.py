"""Who should hold which shard, and how long a lease may be trusted. Pure.

Which replica wants a shard is rendezvous hashing (Thaler & Ravishankar 1998) with even shares, over the live members:
each pair of replica and shard has a weight, and the heaviest pairs win, until a replica has its share. Without shares
chance would leave one of two replicas with eleven of 16 shards, and of 16 replicas five with none. A replica that joins
or leaves moves its own share and rarely a shard more, and all come to the same answer without talking.

Nothing here decides who *may* change a shard: that is the epoch in Postgres (INV-3). A wrong view of the members costs
a moment without an owner, never two of them.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import lru_cache
from hashlib import blake2b

MARGIN = timedelta(milliseconds=500)
"""How much earlier than Postgres a holder stops trusting its lease; covers a slow event loop, not correctness."""


def wanted_shards(replica: str, members: Collection[str], shards: int) -> frozenset[int]:
    """The shards that fall to `replica`, which counts as a member whether or not it is in `members`.

    Each member gets `shards / members` of them, rounded down or up.
    """
    return frozenset(_shares(frozenset({replica, *members}), shards)[replica])


@lru_cache(maxsize=2)  # Asked at every beat; members seldom change.
def _shares(members: frozenset[str], shards: int) -> dict[str, list[int]]:
    least, larger_shares = divmod(shards, len(members))
    shares: dict[str, list[int]] = {one: [] for one in members}
    unwanted = set(range(shards))
    for _, one, shard in sorted(((_weight(o, s), o, s) for o in members for s in unwanted), reverse=True):
        if shard not in unwanted or len(shares[one]) > least:
            continue
        if len(shares[one]) == least:
            if not larger_shares:
                continue
            larger_shares -= 1
        shares[one].append(shard)
        unwanted.remove(shard)
    return shares


def trusted_until_s(renewal_began_s: float, ttl: timedelta) -> float:
    """Until when a lease counts, on the monotonic clock: from the *start* of the renewing call, never its answer."""
    return renewal_began_s + (ttl - MARGIN).total_seconds()


def until_next_beat(ttl: timedelta, wanted_but_held: Sequence[timedelta]) -> timedelta:
    """How long to wait: a third of the TTL, or until the first wanted shard's lease runs out at its present holder."""
    soonest = min(wanted_but_held, default=ttl)
    return min(ttl / 3, max(soonest + timedelta(milliseconds=20), timedelta(milliseconds=50)))


def _weight(replica: str, shard: int) -> bytes:
    return blake2b(f"{replica}\x1f{shard}".encode(), digest_size=8).digest()
