"""How much is under way at once."""

from services.dispatcher.room import Room


def test_a_lane_has_as_many_places_as_its_limit() -> None:
    """A full lane has no places, and others still have theirs."""
    room = Room(limits={"email": 2, "webhook": 3}, per_destination=10)
    assert room.take("email", "")
    assert room.take("email", "")
    assert not room.take("email", "")
    assert room.free() == {"webhook": 3}
    room.leave("email", "")
    assert room.free() == {"email": 1, "webhook": 3}


def test_a_destination_has_as_many_places_as_its_limit() -> None:
    """A full destination is named, and the lane's other places stay for others."""
    room = Room(limits={"webhook": 5}, per_destination=2)
    assert [room.take("webhook", "slow") for _ in range(3)] == [True, True, False]
    assert room.full_destinations() == ["slow"]
    assert room.take("webhook", "quick")
    assert room.free() == {"webhook": 2}
    room.leave("webhook", "slow")
    assert room.full_destinations() == []


def test_a_lane_without_a_limit_has_no_places() -> None:
    """Nothing is claimed for what nobody serves."""
    assert not Room(limits={}, per_destination=1).take("email", "")
