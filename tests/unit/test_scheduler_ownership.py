"""Who should hold which shard, and how long a lease is trusted."""

from datetime import timedelta
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.ownership import trusted_until_s, until_next_beat, wanted_shards

TTL = timedelta(seconds=5)
_members = st.sets(st.text(min_size=1, max_size=12), min_size=1, max_size=8)


@given(_members)
def test_every_shard_is_wanted_by_exactly_one_member(members: set[str]) -> None:
    """All members come to the same answer without talking."""
    wanted = [shard for member in members for shard in wanted_shards(member, members, 64)]
    assert sorted(wanted) == list(range(64))


@given(_members, st.integers(min_value=1, max_value=64))
def test_shares_are_even(members: set[str], shards: int) -> None:
    """No replica has two shards more than another; as many replicas as shards have one each."""
    shares = [len(wanted_shards(member, members, shards)) for member in members]
    assert max(shares) - min(shares) <= 1


def test_a_member_that_joins_moves_little_more_than_its_share() -> None:
    """And one that leaves likewise: over 50 memberships of two to nine, a third more than its share on average."""
    moved = share = 0
    for run, count in product(range(50), range(2, 9)):
        members = {f"scheduler-{run}-{number}" for number in range(count)}
        newcomer = f"scheduler-{run}-new"
        before = {s: member for member in members for s in wanted_shards(member, members, 64)}
        after = {s: member for member in members for s in wanted_shards(member, members | {newcomer}, 64)}
        moved += sum(after.get(shard) != member for shard, member in before.items())
        share += 64 // (count + 1)
    assert moved < 1.34 * share


def test_a_replica_counts_itself_in() -> None:
    """Its own row may not be visible yet."""
    assert wanted_shards("a", [], 4) == {0, 1, 2, 3}


def test_inv3_a_lease_is_trusted_from_the_start_of_the_call_and_less_than_its_ttl() -> None:
    """Half a second less, for a slow event loop."""
    assert trusted_until_s(100.0, TTL) == 104.5


def test_the_next_beat_is_in_a_third_of_the_ttl_or_when_a_wanted_lease_or_a_member_runs_out() -> None:
    """20 ms after that moment, and never sooner than in 50 ms."""
    assert until_next_beat(TTL, []) == TTL / 3
    assert until_next_beat(TTL, [timedelta(seconds=4), timedelta(seconds=1)]) == timedelta(seconds=1.02)
    assert until_next_beat(TTL, [timedelta(milliseconds=1)]) == timedelta(milliseconds=50)
