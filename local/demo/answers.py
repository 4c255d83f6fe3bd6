"""What the services say came of it, and what really arrived: the material of the check."""

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carillon.digest.v1 import digest_pb2 as digest
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub
from carillon.intake.v1 import intake_pb2 as intake
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub

from local.demo.caller import repeated
from local.demo.connections import Connections
from local.mailbox.store import Store

_PAGE = 1000
_SHOWN = re.compile(r"^- .* \[(.+)\]$", re.MULTILINE)
"""How our templates name an item; see local.demo.catalog."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the services answered at the end of the replay."""

    digests: Sequence[digest.Digest]
    windows: Sequence[digest.Window]
    deliveries: Sequence[dispatcher.Delivery]
    timers: Sequence[timer.Timer]
    requests: Sequence[intake.LoggedRequest]
    ledger: digest.GetLedgerResponse


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One mail or webhook as it arrived. `key` names its delivery; the same key twice is the same message, resent."""

    key: str
    to: str
    items: tuple[str, ...]


async def ask(connections: Connections) -> Answers:
    """Ask every service for everything that the check needs."""
    asked = DigestServiceStub(connections.digest)
    dispatched = DispatcherServiceStub(connections.dispatcher)
    scheduled = SchedulerServiceStub(connections.scheduler)
    taken = IntakeServiceStub(connections.intake)
    return Answers(
        digests=await _all(asked.ListDigests, digest.ListDigestsRequest, "digests"),
        windows=await _all(asked.ListWindows, digest.ListWindowsRequest, "windows", states=[digest.WINDOW_STATE_OPEN]),
        deliveries=await _all(dispatched.ListDeliveries, dispatcher.ListDeliveriesRequest, "deliveries"),
        timers=await _all(scheduled.ListTimers, scheduler.ListTimersRequest, "timers"),
        requests=await _all(taken.ListRequests, intake.ListRequestsRequest, "requests"),
        ledger=await repeated(asked.GetLedger, digest.GetLedgerRequest()),
    )


def open_mailbox(directory: Path, hook: str) -> list[Arrival]:
    """Every mail and every webhook, in order of arrival. For when the mailbox's own process has ended."""
    store = Store(directory)
    try:
        mails = [
            Arrival(
                key=mail.message_id.strip("<>").partition("@")[0],
                to=mail.recipients[0],
                items=_shown(store.open_mail(mail.id).text),
            )
            for mail in _mails(store)
        ]
        hooks = [
            Arrival(key=hook.headers["webhook-id"], to=hook.name, items=_posted(hook.body))
            for hook in _hooks(store, hook)
        ]
    finally:
        store.close()
    return mails + hooks


async def _all(
    method: Callable[..., Awaitable[Any]], request: Callable[..., Any], field: str, **filters: object
) -> list[Any]:
    """All pages."""
    found: list[Any] = []
    token = ""
    while True:
        page = await repeated(method, request(page_size=_PAGE, page_token=token, **filters))
        found += getattr(page, field)
        token = page.next_page_token
        if not token:
            return found


def _mails(store: Store) -> Iterable[Any]:
    after = 0
    while page := store.mails_after(after=after):
        yield from page
        after = page[-1].id


def _hooks(store: Store, name: str) -> Iterable[Any]:
    after = 0
    while page := store.hooks_after(name, after=after):
        yield from page
        after = page[-1].id


def _shown(text: str) -> tuple[str, ...]:
    return tuple(sorted(_SHOWN.findall(text)))


def _posted(body: Any) -> tuple[str, ...]:
    return tuple(sorted(f"{item['type']} {item['payload']['flight']}" for item in body["items"]))
