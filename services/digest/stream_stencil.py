"""Entries that ask for windows' timers, by the thousand.

What opens in one go is mostly due at one time, so its entries differ only in three values of fixed length: the timer's
id, its entity, the window's id. One of them is made and serialised in full, with stand-ins for these, and cut where
they stand; the others are put together from the pieces, for a twentieth of what building messages costs.
"""

from datetime import datetime
from typing import Self

from carillon.link.v1 import link_pb2
from msgspec import Struct

from libs.wire import set_timestamp

# None of the bytes of these stands in a tag or a length of the entry, so each is found once; see `of`.
_TIMER_ID = b"\xfa" * 16
_WINDOW_ID = b"\xfb" * 16
_ENTITY_CHARACTERS = len("carillon:window:") + 36
_ENTITY = "\x7f" * _ENTITY_CHARACTERS


class Stencil(Struct, frozen=True, gc=False):
    """An entry without what is its own: before the timer's id, before its entity, before the window's id, the rest."""

    first: bytes
    second: bytes
    third: bytes
    rest: bytes

    @classmethod
    def of(cls, tenant: str, due_at: datetime, *, sequence: int, now: datetime) -> Self:
        """For a tenant's windows that are due together. Raises ValueError if it cannot be cut."""
        entry = link_pb2.Entry(tenant=tenant, sequence=sequence)
        timer = entry.schedule_timer
        timer.id = _TIMER_ID
        timer.entity = _ENTITY
        set_timestamp(timer.due_time, due_at)
        set_timestamp(timer.accept_time, now)
        window = timer.target.close_window
        window.window_id = _WINDOW_ID
        set_timestamp(window.due_time, due_at)
        first, found_id, more = entry.SerializeToString(deterministic=True).partition(_TIMER_ID)
        second, found_entity, more = more.partition(_ENTITY.encode())
        third, found_window, rest = more.partition(_WINDOW_ID)
        if not (found_id and found_entity and found_window):
            raise ValueError("The fields of a timer's entry are not in the order of their numbers.")
        return cls(first, second, third, rest)

    def filled(self, timer_id: bytes, entity: str, window_id: bytes) -> bytes:
        """One entry, serialised: a link.v1.Entry."""
        return b"".join((self.first, timer_id, self.second, entity.encode(), self.third, window_id, self.rest))
