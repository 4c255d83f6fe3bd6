"""The channel `apprise`: a hundred services of chats, pushes and texts, through the library Apprise.

Whoever puts a subscriber chooses the URL, and Apprise can do a lot: post to any host, read templates from files, follow
redirects, leave certificates unchecked. So a URL is judged before Apprise sees it: its schema must be one of the
settings' (by default services whose host is fixed), and its query may hold only what shapes the message. What passes is
taken as one URL; lists of them, attachments and configuration files never get that far.

Apprise blocks, so that each notification has a thread, as many as the settings say; one that does not come back in time
keeps its thread until it does, and its attempt is in doubt. Apprise answers yes or no. What it writes to its log on
the way is the reply; which of it would work later it does not tell, so that every no is tried again.
"""

import asyncio
import logging
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from services.dispatcher.addresses import apprise_parts
from services.dispatcher.delivery import Letter, Permanent, Reason, Result, Retryable, Sent, clean_reply
from services.dispatcher.settings import AppriseSettings

OUTAGES = frozenset({Reason.DEFERRED, Reason.TIMEOUT})
"""A destination is one address here, and all that is known of it is that it does not work."""

MAX_BODY = 64 * 1024

# What shapes a message. Not among them: template, redirect, verify, rto, cto, store, and whatever else names a file, a
# URL or a time that would be ours to choose.
_PARAMETERS = frozenset(
    {"emojis", "format", "mode", "overflow", "preview", "priority", "region", "silent", "sound", "thread", "topic"}
)
_LOGGER = "apprise"


class AppriseChannel:
    """Notifications through Apprise, in threads."""

    outages = OUTAGES

    def __init__(self, settings: AppriseSettings) -> None:
        self._settings = settings
        self._schemas = frozenset(settings.schemas)
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="apprise")
        self._words = SaidInThread()
        logging.getLogger(_LOGGER).addHandler(self._words)

    async def send(self, letter: Letter) -> Result:
        """See Channel."""
        delivery = letter.delivery
        if (refusal := judge_url(delivery.address, self._schemas)) is not None:
            return refusal
        if not (delivery.text or delivery.subject):
            return Permanent(Reason.CONTENT_EMPTY, "there is nothing to say")
        job = self._pool.submit(self._notify, delivery.address, delivery.subject, delivery.text[:MAX_BODY])
        try:
            async with asyncio.timeout(self._settings.timeout.total_seconds()):
                return await asyncio.shield(asyncio.wrap_future(job))
        except TimeoutError:
            # What still waits for a thread can be taken back, and has not left then.
            return Retryable(Reason.TIMEOUT, "no answer in time", is_in_doubt=not job.cancel())

    async def close(self) -> None:
        """See Channel. Threads that are still waiting are left to end by themselves."""
        logging.getLogger(_LOGGER).removeHandler(self._words)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _notify(self, url: str, title: str, body: str) -> Result:
        """In a thread; an error of a plugin is an answer too."""
        library = _apprise()
        with self._words.listening() as said:
            service = library.Apprise.instantiate(url, asset=_asset(), suppress_exceptions=True)
            if service is None:
                why = clean_reply("; ".join(said))
                return Permanent(Reason.ADDRESS_INVALID, why or "Apprise does not take this URL")
            is_sent = service.notify(title=title, body=body or title, body_format=library.NotifyFormat.TEXT)
        reply = clean_reply("; ".join(said))
        return Sent(reply or "taken") if is_sent else Retryable(Reason.DEFERRED, reply or "Apprise says no")


def judge_url(url: str, schemas: frozenset[str]) -> Permanent | None:
    """Why a URL is not handed to Apprise; None: it is."""
    parts = apprise_parts(url)
    if parts is None:
        return Permanent(Reason.ADDRESS_INVALID, "it is not one URL")
    if parts.scheme not in schemas:
        return Permanent(Reason.DESTINATION_FORBIDDEN, f"the service {parts.scheme} is not allowed")
    # Split at anything that any parser takes for the start of a parameter: Apprise's finds a query where urllib's sees
    # a fragment, and a name must not slip through between two opinions.
    names = {unquote(one.partition("=")[0]).strip().lower() for one in re.split("[?&;]", url)[1:]} - {""}
    if unknown := sorted(names - _PARAMETERS):
        return Permanent(Reason.DESTINATION_FORBIDDEN, clean_reply(f"the parameter {unknown[0]} is not allowed"))
    return None


class SaidInThread(logging.Handler):
    """What Apprise logs while it works for one notification; which that is follows from the thread."""

    _MOST = 8

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[int, list[str]] = {}

    def listening(self) -> "_Listening":
        """Collect what this thread says, until the block ends."""
        return _Listening(self._said)

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        said = self._said.get(threading.get_ident())
        if said is not None and len(said) < self._MOST:
            said.append(record.getMessage())


class _Listening:
    def __init__(self, said: dict[int, list[str]]) -> None:
        self._all = said

    def __enter__(self) -> Sequence[str]:
        return self._all.setdefault(threading.get_ident(), [])

    def __exit__(self, *_: object) -> None:
        del self._all[threading.get_ident()]


@cache
def _apprise() -> ModuleType:
    """Imported where it is first needed: half a second, and 25 MB that most processes never use."""
    import apprise

    return apprise


@cache
def _asset() -> Any:
    """No files: nothing is stored, nothing is loaded beside the plugins it comes with; secrets stay out of its log."""
    library = _apprise()
    return library.AppriseAsset(
        app_id="Carillon",
        app_desc="Carillon",
        app_url="",
        storage_mode=library.PersistentStoreMode.MEMORY,
        secure_logging=True,
        plugin_paths=[],
    )
