"""What closing does between the press and the link."""

from uuid import UUID

from services.digest.loops import _by_size
from services.digest.rendering_jobs import Message, Part

ID = UUID(int=1)


def test_a_large_digest_is_handed_over_a_little_at_a_time() -> None:
    """In order and whole, so that what goes over the link is never in memory all at once."""
    parts = [_message(part=Part(subject=str(number), html="x" * 100_000, text="", json="")) for number in range(200)]
    handed = list(_by_size(parts))
    assert len(handed) > 1
    assert [one for some in handed for one in some] == parts
    assert max(sum(len(one.part.html) for one in some) for some in handed) < 7_000_000


def test_usual_digests_are_handed_over_together() -> None:
    """Two hundred of 26 KB, which close in one transaction."""
    parts = [_message(part=Part(subject="", html="x" * 24_000, text="y" * 2_000, json="")) for _ in range(200)]
    assert [len(some) for some in _by_size(parts)] == [200]


def test_nothing_is_handed_over_in_no_piece() -> None:
    """Windows may close without a message."""
    assert list(_by_size([])) == []


def _message(*, part: Part) -> Message:
    return Message(
        tenant="t",
        delivery_id=ID,
        digest_id=ID,
        subscriber="ann",
        channel="email",
        address="a@example.com",
        part=part,
        priority=2,
    )
