"""libs.wire_format: messages put together from serialised pieces are what protobuf itself would have made."""

import pytest
from carillon.link.v1 import link_pb2
from google.protobuf.internal import encoder
from hypothesis import given
from hypothesis import strategies as st

from libs.links.frames import Addressed, Encoded, number, pack
from libs.wire_format import length, number_tag_of, tag_of, varint


@given(st.integers(min_value=0, max_value=(1 << 64) - 1))
def test_numbers_are_written_as_protobuf_writes_them(value: int) -> None:
    """Any unsigned number."""
    assert varint(value) == encoder._VarintBytes(value)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 300_000])
def test_a_piece_of_any_length_is_read_back(size: int) -> None:
    """Also where the length takes more bytes."""
    text = b"x" * size
    body = tag_of(link_pb2.PutFacts, "facts") + length(text) + text
    assert link_pb2.PutFacts.FromString(body).facts == text.decode()


def test_a_field_of_another_kind_has_no_tag_here() -> None:
    """A number is not length-delimited, and text is no number."""
    with pytest.raises(ValueError, match="not length-delimited"):
        tag_of(link_pb2.Entry, "sequence")
    with pytest.raises(ValueError, match="not an unsigned number"):
        number_tag_of(link_pb2.Entry, "tenant")


@given(st.lists(st.tuples(st.booleans(), st.text(max_size=300)), max_size=40), st.integers(1, (1 << 63) - 1))
def test_serialised_entries_and_messages_make_the_same_frames(entries: list[tuple[bool, str]], sequence: int) -> None:
    """Mixed in any order; each has its sequence, and numbered twice the second one."""
    messages = [link_pb2.Entry(tenant="t", put_facts=link_pb2.PutFacts(facts=text)) for _, text in entries]
    outgoing = [
        Encoded(receiver="digest", body=one.SerializeToString())
        if is_encoded
        else Addressed(receiver="digest", entry=one)
        for (is_encoded, _), one in zip(entries, messages, strict=True)
    ]
    number(outgoing, 7)
    number(outgoing, sequence)
    frames, positions = pack("intake", outgoing, {})
    found = [entry for frame in frames for entry in link_pb2.Frame.FromString(frame.payload).entries]
    for one in messages:
        one.sequence = sequence
    assert found == messages
    assert [one.index for one in positions] == list(range(len(entries)))
