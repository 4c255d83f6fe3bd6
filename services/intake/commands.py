"""What every call that writes has in common, and what its owner says of each entry in the end."""

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from msgspec import Struct


class Command(Struct, frozen=True, kw_only=True):
    """One call that writes.

    `key` is the caller's idempotency key, empty for a call that cannot be repeated; `fingerprint` stands for the
    content of the call. `timeout` is how long the caller waits for APPLIED; None: not at all. `receivers` are the
    services that the call's entries go to.
    """

    tenant: str
    method: str
    receivers: tuple[str, ...]
    key: str = ""
    fingerprint: bytes = b""
    timeout: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which timers of an entity, and with Cancel which of its waiting items too; empty parts select all."""

    entity: str
    type: str = ""
    ids: tuple[UUID, ...] = ()
    timeline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryOutcome:
    """What applying one entry gave, as its owner says. `code` 0: fine, else google.rpc.Code with reason and message."""

    changed: int = 0
    already_left: int = 0
    is_repeated: bool = False
    code: int = 0
    reason: str = ""
    message: str = ""


NOTHING = EntryOutcome()
"""The outcome of an entry its owner had nothing to say about."""
