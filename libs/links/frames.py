"""Frames: how entries are packed for the way, and what a received message turns out to be. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from carillon.link.v1 import link_pb2
from google.protobuf.message import DecodeError
from msgspec import Struct

from libs.ids import new_id

MAX_FRAME_ENTRIES = 1_000
MAX_FRAME_BYTES = 512 * 1024

REPLY_HEADER = "Carillon-Reply"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingFrame:
    """A packed frame on its way to `receiver`; `payload` is a serialized link.v1.Frame."""

    id: UUID
    receiver: str
    partition: int
    payload: bytes
    entries: int
    headers: dict[str, str]


class Addressed(Struct, frozen=True, kw_only=True):
    """One entry and where it goes; `partition` is the scheduler's shard, 0 for everybody else."""

    receiver: str
    entry: link_pb2.Entry
    partition: int = 0


class Position(Struct, frozen=True, kw_only=True, gc=False):
    """Where an entry ended up, for matching a receipt's results with what the caller asked for."""

    frame_id: UUID
    index: int


class BadFrame(Exception):
    """The message is not a frame."""


def pack(
    sender: str, addressed: Iterable[Addressed], headers: dict[str, str]
) -> tuple[list[OutgoingFrame], list[Position]]:
    """Pack entries into as few frames as bounds allow, keeping their order within each receiver and partition.

    Returns the frames, and one position per entry in the order given. An entry that alone is larger than a frame gets a
    frame of its own; callers bound their entries far below that.
    """
    routes: dict[tuple[str, int], list[tuple[int, link_pb2.Entry]]] = {}
    count = 0
    for count, one in enumerate(addressed, start=1):
        routes.setdefault((one.receiver, one.partition), []).append((count - 1, one.entry))
    frames: list[OutgoingFrame] = []
    positions: list[Position | None] = [None] * count
    for (receiver, partition), numbered in routes.items():
        for chunk in _chunks(numbered):
            frame_id = new_id()
            message = link_pb2.Frame(id=frame_id.bytes, sender=sender, receiver=receiver, partition=partition)
            message.entries.extend(entry for _, entry in chunk)
            for index, (number, _) in enumerate(chunk):
                positions[number] = Position(frame_id=frame_id, index=index)
            frames.append(
                OutgoingFrame(
                    id=frame_id,
                    receiver=receiver,
                    partition=partition,
                    payload=message.SerializeToString(),
                    entries=len(chunk),
                    headers=headers,
                )
            )
    return frames, [position for position in positions if position is not None]


def _chunks(numbered: Sequence[tuple[int, link_pb2.Entry]]) -> Iterator[list[tuple[int, link_pb2.Entry]]]:
    chunk: list[tuple[int, link_pb2.Entry]] = []
    chunk_bytes = 0
    for one in numbered:
        entry_bytes = one[1].ByteSize()
        if chunk and (len(chunk) >= MAX_FRAME_ENTRIES or chunk_bytes + entry_bytes > MAX_FRAME_BYTES):
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(one)
        chunk_bytes += entry_bytes
    if chunk:
        yield chunk


def parse_frame(payload: bytes, *, receiver: str) -> tuple[UUID, link_pb2.Frame]:
    """The frame in `payload`; raises BadFrame when there is none, or it is for somebody else."""
    try:
        frame = link_pb2.Frame.FromString(payload)
    except DecodeError as err:
        raise BadFrame(f"not a Frame message: {err}") from err
    if len(frame.id) != 16:
        raise BadFrame("it has no id of 16 bytes")
    frame_id = UUID(bytes=frame.id)
    if frame_id.version != 7:
        raise BadFrame("its id is not a UUIDv7")
    if frame.receiver != receiver:
        raise BadFrame(f"it is for {frame.receiver!r}, not for {receiver!r}")
    return frame_id, frame


def stream_name(receiver: str) -> str:
    """The JetStream stream that holds all frames for `receiver`."""
    return f"CARILLON_{receiver.upper()}"


def subject_of(receiver: str, partition: int) -> str:
    """Where frames for a partition of `receiver` are published."""
    return f"carillon.link.{receiver}.{partition}"


def all_subjects(receiver: str) -> str:
    """What the stream of `receiver` listens to."""
    return f"carillon.link.{receiver}.*"


def receipt_subject(sender: str, replica: str) -> str:
    """Where one replica of `sender` gets its receipts."""
    return f"carillon.receipt.{sender}.{replica}"
