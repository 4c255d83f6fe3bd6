"""Points in traces: what is kept of a trace where work waits or travels with others' work. Pure.

A point is a trace id and a span id, 24 bytes. There is one only for what is sampled: of the rest nobody keeps a span,
so nothing need remember it, and where nothing is traced every point is empty. W3C's `tracestate` stays behind: it
speaks to the vendor who made it about a call that is long over.
"""

from collections.abc import Mapping

Point = bytes
"""24 bytes, or none."""

NOWHERE: Point = b""
POINT_BYTES = 24

TRACEPARENT = "traceparent"

_TRACE_BYTES = 16
_LENGTH = 55  # 00-<32 digits>-<16 digits>-<2 digits>
_SAMPLED = 1


def point_of(carrier: Mapping[str, str]) -> Point:
    """The point in a carrier's `traceparent` (W3C Trace Context); NOWHERE when it has none, or one not sampled."""
    header = carrier.get(TRACEPARENT)
    if header is None or len(header) != _LENGTH:
        return NOWHERE
    try:
        version, trace_id, span_id, flags = header.split("-")
        is_sampled = version == "00" and int(flags, 16) & _SAMPLED
        point = bytes.fromhex(trace_id) + bytes.fromhex(span_id)
    except ValueError:
        return NOWHERE
    return point if is_sampled and is_point(point) and all(ids_of(point)) else NOWHERE


def carrier_at(point: Point) -> dict[str, str]:
    """The carrier that leads to a point; empty for NOWHERE."""
    if not point:
        return {}
    return {TRACEPARENT: f"00-{point[:_TRACE_BYTES].hex()}-{point[_TRACE_BYTES:].hex()}-01"}


def is_point(given: bytes) -> bool:
    """Whether what came over the wire has the length of one."""
    return len(given) == POINT_BYTES


def ids_of(point: Point) -> tuple[int, int]:
    """Trace id and span id as OpenTelemetry has them."""
    return int.from_bytes(point[:_TRACE_BYTES]), int.from_bytes(point[_TRACE_BYTES:])


def point_at(trace_id: int, span_id: int) -> Point:
    """The point with these ids."""
    return trace_id.to_bytes(_TRACE_BYTES) + span_id.to_bytes(POINT_BYTES - _TRACE_BYTES)
