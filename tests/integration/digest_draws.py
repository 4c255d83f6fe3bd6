"""What random histories of digest are drawn from: few names, so that things meet; see digest_machine."""

from datetime import timedelta

from hypothesis import strategies as st

from tests.support.digest_words import (
    DAY,
    Aligned,
    Cadence,
    Choice,
    External,
    Rolling,
    Subscriber,
    Subscription,
    Type,
)

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)

TYPES = {
    "order.made": Type(retention=DAY, default_cadence="batch"),
    "order.paid": Type(retention=2 * DAY, default_cadence="daily", default_channel="webhook"),
    "bill": Type(default_channel="log", needs_number=True),
}
CADENCES: dict[str, Cadence] = {
    "daily": Aligned(hours=(8,)),
    "often": Aligned(hours=(0, 4, 8, 12, 16, 20), zone="Europe/Berlin"),
    "rolling": Rolling(duration=HOUR, extension=20 * MINUTE, maximum=3),
    "leading": Rolling(duration=2 * HOUR, is_leading=True),
    "batch": External(batch="batch", fallback=2 * DAY),
}
RULES: list[Cadence] = [
    Aligned(hours=(8,)),
    Aligned(hours=(8, 17)),
    Aligned(hours=(8,), zone="America/New_York"),
    Rolling(duration=HOUR),
    Rolling(duration=HOUR, extension=HOUR, cap=3 * HOUR),
    Rolling(duration=2 * HOUR, maximum=2, is_leading=True),
    External(batch="batch", fallback=HOUR),
    External(batch="other", fallback=3 * DAY),
]
ZONES = ["UTC", "America/New_York", "Europe/Berlin", "Asia/Kolkata"]
NAMES = ["ann", "bob", "cem", "dan"]
"""Dan subscribes to nothing: he is told what the types' defaults say."""
TOPICS = ("shops", "flights")
ENTITIES = ["", "e1", "e2", "e3"]

cadences = st.sampled_from(
    ["daily", "often", "rolling", "leading", "batch", "leading", "daily", "batch", "immediate", "off"]
)
choices = st.builds(
    Choice,
    cadence=cadences,
    channel=st.sampled_from(["", "", "", "email", "webhook", "log"]),
    style=st.sampled_from(["", "", "summary", "full"]),
)
subscriptions = st.builds(
    Subscription,
    subscriber=st.sampled_from(NAMES[:3]),
    type=st.sampled_from(["order.made", "order.*", "*", "bill"]),
    topic=st.sampled_from(["", "", *TOPICS]),
    choices=st.lists(choices, min_size=1, max_size=3, unique=True).map(tuple),
    least=st.sampled_from([None, None, 5]),
)
subscribers = st.builds(
    Subscriber,
    zone=st.sampled_from(ZONES),
    email=st.sampled_from(["a@example.com", "a@example.com", "a@example.com", ""]),
    webhook_url=st.sampled_from(["https://example.com/hook", "https://example.com/hook", ""]),
    quiet=st.sampled_from([(), (), ((22, 7),), ((12, 16),), ((7, 9), (9, 10)), ((16, 23),)]),
)
tellings = st.fixed_dictionaries(
    {
        "type": st.sampled_from([*["order.made"] * 5, *["order.paid"] * 4, *["bill"] * 2, "unheard.of"]),
        "subscribers": st.lists(st.sampled_from([*NAMES * 5, "zoe"]), max_size=3).map(tuple),
        "topics": st.sampled_from([(), (), (), *[(topic,) for topic in TOPICS], TOPICS]),
        "entity": st.sampled_from(ENTITIES),
        "number": st.sampled_from([9, 9, 9, 1, 1, None]),
        "ago": st.sampled_from([timedelta(0), timedelta(0), MINUTE, 5 * HOUR, 2 * DAY, -3 * HOUR, None]),
        "lives": st.sampled_from([*[None] * 8, 3 * HOUR, 3 * HOUR, timedelta(0)]),
        "lag": st.sampled_from([0, 0, 0, 2, None]),
        "is_urgent": st.booleans(),
        "timeline": st.sampled_from(["", "", "trial"]),
    }
).filter(lambda one: one["subscribers"] or one["topics"])
frames = st.lists(tellings, min_size=1, max_size=7)
cancels = st.fixed_dictionaries(
    {
        "entity": st.sampled_from(ENTITIES[1:]),
        "type": st.sampled_from(["", "", "order.made"]),
        "timeline": st.sampled_from(["", "", "trial"]),
        "lag": st.sampled_from([0, 0, 3]),
    }
)
triggers = st.tuples(
    st.sampled_from(["batch", "batch", "batch", "other"]),
    st.sampled_from([timedelta(0), timedelta(0), MINUTE, 2 * HOUR]),
)
