"""libs.links.frames: packing and parsing."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from carillon.link.v1 import link_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.ids import new_id
from libs.links.frames import (
    MAX_FRAME_BYTES,
    MAX_FRAME_ENTRIES,
    Addressed,
    BadFrame,
    Encoded,
    Outgoing,
    OutgoingFrame,
    all_subjects,
    pack,
    parse_frame,
    receipt_subject,
    stream_name,
    subject_of,
)
from libs.links.incoming import IncomingFrame
from libs.trace_points import carrier_at

FRAME = link_pb2.Frame(id=new_id().bytes, sender="intake", receiver="digest").SerializeToString()


def entry(number: int, size_bytes: int = 0) -> link_pb2.Entry:
    """An entry that can be told apart."""
    return link_pb2.Entry(tenant="x" * size_bytes, sequence=number)


def entries_of(frame: OutgoingFrame) -> list[int]:
    """What the receiver will read."""
    _, message = parse_frame(frame.payload, receiver=frame.receiver)
    return [one.sequence for one in message.entries]


class TestTraces:
    """What caused an entry travels with it."""

    ONE, OTHER = bytes(range(1, 25)), bytes(range(2, 26))

    def packed(self, *traces: bytes) -> IncomingFrame:
        """A frame as it comes in, of serialised and other entries by turns."""
        frames, _ = pack("intake", [self.addressed(number, trace) for number, trace in enumerate(traces)], {"a": "b"})
        (frame,) = frames
        return IncomingFrame.of(_Message(frame.payload, frame.headers), receiver="digest")

    def addressed(self, number: int, trace: bytes) -> Outgoing:
        """One of them."""
        if number % 2:
            return Encoded(receiver="digest", body=entry(number).SerializeToString(), trace=trace)
        return Addressed(receiver="digest", entry=entry(number), trace=trace)

    def test_one_for_all_entries_is_a_header(self) -> None:
        """As in a frame that intake packs; the entries stay as they are."""
        frame = self.packed(self.ONE, self.ONE)
        assert frame.headers == {"a": "b", **carrier_at(self.ONE)}
        assert [frame.trace_of(one) for one in frame.frame.entries] == [self.ONE, self.ONE]
        assert not any(one.trace for one in frame.frame.entries)

    def test_of_several_each_entry_has_its_own(self) -> None:
        """And those of nobody have none; where the work goes on in a span, that is what causes the rest."""
        frame = self.packed(self.ONE, b"", self.OTHER)
        assert [frame.trace_of(one) for one in frame.frame.entries] == [self.ONE, b"", self.OTHER]
        going_on = replace(frame, points={self.OTHER: b"x" * 24})
        assert [going_on.trace_of(one) for one in frame.frame.entries] == [self.ONE, b"", b"x" * 24]

    def test_of_nobody_nothing_is_said(self) -> None:
        """Not a byte more than without tracing."""
        frame = self.packed(b"", b"")
        assert (frame.is_traced, frame.headers) == (False, {"a": "b"})

    def test_an_entry_that_says_nonsense_is_nobodys(self) -> None:
        """It may come from a newer sender, or a worse one."""
        frame = IncomingFrame(id=new_id(), frame=link_pb2.Frame(), message=_Message(b"", {}), has_traces=True)
        assert frame.trace_of(link_pb2.Entry(trace=b"short")) == b""


class _Message:
    num_delivered = 1

    def __init__(self, data: bytes, headers: Mapping[str, str]) -> None:
        self.data, self.headers = data, headers

    async def ack(self) -> None: ...
    async def nak(self, delay: timedelta) -> None: ...


def test_nothing_packs_to_nothing() -> None:
    """No empty frames."""
    assert pack("intake", [], {}) == ([], [])


def test_entries_to_one_place_share_a_frame() -> None:
    """In their order, whatever was between them."""
    addressed = [
        Addressed(receiver="digest", entry=entry(1)),
        Addressed(receiver="scheduler", partition=7, entry=entry(2)),
        Addressed(receiver="digest", entry=entry(3)),
        Addressed(receiver="scheduler", partition=8, entry=entry(4)),
    ]
    frames, _ = pack("intake", addressed, {"traceparent": "00-1"})
    assert [(one.receiver, one.partition, entries_of(one)) for one in frames] == [
        ("digest", 0, [1, 3]),
        ("scheduler", 7, [2]),
        ("scheduler", 8, [4]),
    ]
    assert all(one.headers == {"traceparent": "00-1"} for one in frames)


def test_a_frame_holds_a_thousand_entries() -> None:
    """The thousand and first travels in the next."""
    frames, positions = pack("intake", [Addressed(receiver="digest", entry=entry(n)) for n in range(1_001)], {})
    assert [one.entries for one in frames] == [MAX_FRAME_ENTRIES, 1]
    assert (positions[1_000].frame_id, positions[1_000].index) == (frames[1].id, 0)


def test_a_frame_holds_512_kib() -> None:
    """Also with entries that each are fine."""
    addressed = [Addressed(receiver="digest", entry=entry(n, size_bytes=100_000)) for n in range(11)]
    frames, _ = pack("intake", addressed, {})
    assert [one.entries for one in frames] == [5, 5, 1]
    assert all(len(one.payload) <= MAX_FRAME_BYTES + 1_024 for one in frames)


def test_an_entry_larger_than_a_frame_has_one_of_its_own() -> None:
    """It holds up nothing else."""
    sizes = [10, MAX_FRAME_BYTES + 1, 10]
    addressed = [Addressed(receiver="digest", entry=entry(n, size)) for n, size in enumerate(sizes)]
    assert [one.entries for one in pack("intake", addressed, {})[0]] == [1, 1, 1]


@given(
    st.lists(
        st.tuples(st.sampled_from(["digest", "scheduler"]), st.integers(0, 3), st.sampled_from([0, 90_000])),
        max_size=40,
    )
)
def test_every_entry_is_found_at_its_position(places: list[tuple[str, int, int]]) -> None:
    """Receipts answer by frame and index; callers ask by the order in which they gave."""
    addressed = [
        Addressed(receiver=receiver, partition=partition, entry=entry(n, size))
        for n, (receiver, partition, size) in enumerate(places)
    ]
    frames, positions = pack("intake", addressed, {})
    by_id = {one.id: one for one in frames}
    assert len(by_id) == len(frames)
    assert [entries_of(by_id[one.frame_id])[one.index] for one in positions] == list(range(len(places)))
    for (receiver, partition, _), position in zip(places, positions, strict=True):
        frame = by_id[position.frame_id]
        assert (frame.receiver, frame.partition) == (receiver, partition)
    for frame in frames:
        assert entries_of(frame) == sorted(entries_of(frame))


def test_a_frame_is_read_as_it_was_packed() -> None:
    """Its id is the inbox's key."""
    (frame,), _ = pack("intake", [Addressed(receiver="scheduler", partition=3, entry=entry(1))], {})
    frame_id, message = parse_frame(frame.payload, receiver="scheduler")
    assert frame_id == frame.id
    assert (message.sender, message.receiver, message.partition) == ("intake", "scheduler", 3)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\xff\xff\xff garbage", "not a Frame message"),
        (b"", "no id"),
        (link_pb2.Frame(id=b"short", receiver="digest").SerializeToString(), "no id of 16 bytes"),
        (link_pb2.Frame(id=uuid4().bytes, receiver="digest").SerializeToString(), "not a UUIDv7"),
        (link_pb2.Frame(id=new_id().bytes, receiver="intake").SerializeToString(), "for 'intake', not for 'digest'"),
    ],
    ids=["garbage", "nothing", "short id", "random id", "not for us"],
)
def test_what_is_no_frame_for_us_is_refused(payload: bytes, reason: str) -> None:
    """With a reason that somebody will read in dead_frame."""
    with pytest.raises(BadFrame, match=reason):
        parse_frame(payload, receiver="digest")


def test_a_frame_of_documents_is_compressed_and_read_all_the_same() -> None:
    """What is rendered repeats itself; commands are small, and not worth the time."""
    bodies = [f"<table>{number}" + "<tr><td>an order</td></tr>" * 1_000 for number in range(3)]
    (documents,), _ = pack("digest", [_delivery(one) for one in bodies], {})
    (commands,), _ = pack("digest", [_delivery("short") for _ in bodies], {})
    assert len(documents.payload) < 2_000
    assert b"short" in commands.payload
    _, message = parse_frame(documents.payload, receiver="dispatcher")
    assert [one.delivery.html for one in message.entries] == bodies


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (zlib.compress(FRAME)[:-4], "cut off or too large"),
        (zlib.compress(bytes(64 << 20)), "cut off or too large"),
        (b"\x78\x01 not so", "compressed, but not well"),
        (zlib.compress(b"\xff no frame"), "not a Frame message"),
    ],
    ids=["cut off", "a bomb", "garbage", "something else"],
)
def test_what_is_compressed_badly_is_refused(payload: bytes, reason: str) -> None:
    """In little memory: a frame unpacks to a few MiB at most."""
    with pytest.raises(BadFrame, match=reason):
        parse_frame(payload, receiver="digest")


def _delivery(html: str) -> Addressed:
    return Addressed(receiver="dispatcher", entry=link_pb2.Entry(delivery=link_pb2.Delivery(html=html)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_refused(payload: bytes) -> None:
    """Nothing else comes out of garbage."""
    try:
        frame_id, _ = parse_frame(payload, receiver="digest")
    except BadFrame:
        return
    assert isinstance(frame_id, UUID)


def test_names_in_nats_are_fixed() -> None:
    """Another release must find the same streams."""
    assert stream_name("digest") == "CARILLON_DIGEST"
    assert subject_of("scheduler", 12) == "carillon.link.scheduler.12"
    assert all_subjects("scheduler") == "carillon.link.scheduler.*"
    assert receipt_subject("intake", "host-1") == "carillon.receipt.intake.host-1"
