"""What our streams are like, and how one comes to be so."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from nats.js import JetStreamContext
from nats.js import errors as js_errors
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from libs.jetstream_metrics import STREAM_PRESENT

log = logging.getLogger(__name__)

DUPLICATE_WINDOW = timedelta(minutes=2)
_OURS = (
    "subjects",
    "retention",
    "storage",
    "discard",
    "max_age",
    "max_bytes",
    "duplicate_window",
    "num_replicas",
)


def stream_config(
    name: str, subjects: Sequence[str], *, is_work_queue: bool, max_age: timedelta, max_bytes: int, replicas: int
) -> StreamConfig:
    """A stream in files. A full work queue refuses messages: the sender hears of it, and keeps them. Another drops its
    oldest: one reader who stays away must not stop everybody.
    """
    return StreamConfig(
        name=name,
        subjects=list(subjects),
        retention=RetentionPolicy.WORK_QUEUE if is_work_queue else RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW if is_work_queue else DiscardPolicy.OLD,
        max_age=max_age.total_seconds(),
        max_bytes=max_bytes,
        duplicate_window=min(DUPLICATE_WINDOW, max_age).total_seconds(),
        num_replicas=replicas,
    )


async def create_or_update(connection: Callable[[], JetStreamContext], wanted: StreamConfig) -> datetime | None:
    """When the stream that now exists was created: the broker's own word on whether it is the one we knew."""
    assert wanted.name is not None
    is_present = STREAM_PRESENT.labels(wanted.name)
    try:
        created_at = await _create_or_update(connection(), wanted, wanted.name)
    except BaseException:
        is_present.set(0)
        raise
    is_present.set(1)
    return created_at


async def _create_or_update(jetstream: JetStreamContext, wanted: StreamConfig, name: str) -> datetime | None:
    try:
        found = await jetstream.stream_info(name)
    except js_errors.NotFoundError:
        return (await jetstream.add_stream(wanted)).created
    differs = {one: getattr(wanted, one) for one in _OURS if getattr(wanted, one) != getattr(found.config, one)}
    if not differs:
        return found.created
    log.info("Updating a stream.", extra={"stream": name, "fields": sorted(differs)})
    return (await jetstream.update_stream(replace(found.config, **differs))).created
