"""Addresses that get nothing, and why. Pure.

A suppression holds for all messages to an address by a channel, or for those of one list. Three sources may want it so,
each in a row of its own, so that lifting what one of them said takes nothing back that another did:

- a caller of PutSuppression, and a mail server that says that there is no such address: then nothing is sent;
- the reader, by unsubscribing: then only what has something mandatory in it is sent.

A list is what a message belongs to in its reader's eyes: the type of what is sent alone, the cadence of a digest,
whatever types are in it. So unsubscribing from "daily" ends the daily digests and leaves the alarm that comes alone,
and no message is ever thinned out. One in which anything is mandatory is on no list.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from services.dispatcher.delivery import Reason

MAX_LIST_ID = 160


class Source(IntEnum):
    """Who suppresses. Numbers are the contract's, and what the table holds; of several the least is the reason."""

    CALLER = 1
    BOUNCE = 2
    UNSUBSCRIBE = 3

    @property
    def verdict(self) -> Reason:
        """What a delivery ends with."""
        return _VERDICTS[self]


_VERDICTS = {Source.CALLER: Reason.SUPPRESSED, Source.BOUNCE: Reason.BOUNCED, Source.UNSUBSCRIBE: Reason.UNSUBSCRIBED}


@dataclass(frozen=True, kw_only=True, slots=True)
class Suppression:
    """An address that gets nothing of a list, or nothing at all (`list_id` empty).

    `subscriber` is who unsubscribed, empty when that is not known. `reason` is for people.
    """

    channel: str
    address: str
    reason: str
    created_at: datetime
    list_id: str = ""
    source: Source = Source.CALLER
    subscriber: str = ""
