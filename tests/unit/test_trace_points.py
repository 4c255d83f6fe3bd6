"""libs.trace_points: what is kept of a trace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.trace_points import NOWHERE, POINT_BYTES, carrier_at, ids_of, point_at, point_of

POINT = bytes(range(1, 25))
HEADER = "00-0102030405060708090a0b0c0d0e0f10-1112131415161718-01"


def test_a_point_is_24_bytes_of_a_traceparent() -> None:
    """And leads back to it."""
    assert point_of({"traceparent": HEADER, "other": "x"}) == POINT
    assert carrier_at(POINT) == {"traceparent": HEADER}
    assert point_at(*ids_of(POINT)) == POINT
    assert len(POINT) == POINT_BYTES


def test_what_is_not_sampled_is_not_kept() -> None:
    """Nobody has its spans, so nobody could follow a link to it."""
    assert point_of({"traceparent": HEADER[:-1] + "0"}) == NOWHERE
    assert point_of({"traceparent": HEADER[:-2] + "03"}) == POINT  # Sampled, and random.


def test_nowhere_leads_nowhere() -> None:
    """No headers, no point."""
    assert (carrier_at(NOWHERE), point_of({})) == ({}, NOWHERE)


@pytest.mark.parametrize(
    "header",
    [
        HEADER.replace("00-01", "01-01", 1),
        HEADER.replace("01020304", "zz020304"),
        "00-" + "0" * 32 + "-1112131415161718-01",
        HEADER[:36] + "0" * 16 + "-01",
        HEADER + "-more",
        HEADER.replace("-11", "011"),
        "é" * 55,
    ],
)
def test_nonsense_is_nowhere(header: str) -> None:
    """It may come from any caller."""
    assert point_of({"traceparent": header}) == NOWHERE


@given(st.text(max_size=60))
def test_nothing_that_a_caller_says_fails(header: str) -> None:
    """Tracing never fails a call."""
    assert len(point_of({"traceparent": header})) in (0, POINT_BYTES)
