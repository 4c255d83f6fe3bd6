"""Asks business services to format items, by HTTP: many items at a time, few requests at once, and never twice.

Nobody is asked in a transaction (loops_aside.py sees to it). One deadline holds for all that a caller wants; what has
not come by then is left to the templates, and the reason goes on record. A service that fails again and again, or keeps
us waiting, is not asked for a while (a circuit breaker per service): its items are written by templates at once, and
nothing queues behind it. Answers that are wrong do not count against it, for they cost no time, and a tenant with odd
payloads must not turn a service off for the others.

Answers are remembered by everything that they depend on, the tenant included, for a while and in bounded room.
"""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

import aiohttp
import stamina
from cachetools import TTLCache
from opentelemetry.trace import SpanKind
from purgatory.domain.model import Context, OpenedState

from libs.business_services import BadReply, one_line, open_session, read_body, refusal
from libs.telemetry import traces
from libs.telemetry.logs import get_logger
from services.digest import metrics
from services.digest.formatting import (
    Answered,
    Ask,
    Formatted,
    Key,
    Manner,
    Order,
    answered,
    asks_for,
    put_together,
    wanted_by,
)
from services.digest.formatting_answers import BadFragment
from services.digest.rendering_jobs import Line
from services.digest.settings import DigestSettings

log = get_logger(__name__)

MOST_ANSWER_BYTES: Final = 4 << 20
MOST_CALL_BYTES: Final = 32 << 20
"""What is taken for one call; all messages of one are in memory together."""

PATIENCE: Final = 3
"""A caller waits so many times the timeout of one request."""

_CACHE_SECONDS: Final = 300.0  # A service that writes differently from now on is seen to do so soon.
_ENTRY_BYTES: Final = 150  # What remembering an answer costs besides its text.
_BREAKS_AFTER: Final = 5
_BROKEN_SECONDS: Final = 30.0
_ATTEMPTS: Final = 2
_PAUSE_S: Final = 0.1
_REASON_CHARACTERS: Final = 200


class _Passing(Exception):
    """The service did not answer, but may another time; the message is why."""


class Formatter:
    """Asks for one replica; use as `async with`."""

    def __init__(self, *, settings: DigestSettings) -> None:
        """See CARILLON_DIGEST_FORMATTING_*."""
        self._settings = settings
        self._services = settings.formatting_services
        self._timeout_s = settings.formatting_timeout.total_seconds()
        self._slots = {name: asyncio.Semaphore(settings.formatting_concurrency) for name in self._services}
        self._cache: TTLCache[Key, str] = TTLCache(
            settings.formatting_cache_bytes, ttl=_CACHE_SECONDS, getsizeof=_entry_bytes
        )
        self._breakers = {
            name: Context(name, _BREAKS_AFTER, _BROKEN_SECONDS, exclude=[BadReply, BadFragment])
            for name in self._services
        }
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = open_session(self._settings.formatting_token)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def names(self) -> frozenset[str]:
        """The registered services."""
        return frozenset(self._services)

    @property
    def patience(self) -> timedelta:
        """How long `format` takes at most."""
        return PATIENCE * self._settings.formatting_timeout

    def known(self, order: Order) -> Formatted | None:
        """The message, when all it needs is remembered, or none of its items is a service's; None: `format` it."""
        keys = [key for _, _, key in wanted_by(order)]
        found = {key: text for key in keys if (text := self._cache.get(key)) is not None}
        if len(found) < len(set(keys)):
            return None
        if keys:
            metrics.FORMATTED_ITEMS.labels("cached").inc(len(keys))
        return put_together(order, found, {})

    async def format(self, orders: Sequence[Order]) -> list[Formatted]:
        """One result per message, in order, within `patience`. Never raises: what does not come is said in `error`."""
        wanted: defaultdict[Manner, dict[Key, Line]] = defaultdict(dict)
        fragments: dict[Key, str] = {}
        failures: dict[Key, str] = {}
        for order in orders:
            for manner, line, key in wanted_by(order):
                if (text := self._cache.get(key)) is not None:
                    fragments[key] = text
                elif key not in fragments:
                    wanted[manner][key] = line
        metrics.FORMATTED_ITEMS.labels("cached").inc(len(fragments))
        remembered = len(fragments)
        await self._ask_all(wanted, fragments, failures)
        missing = sum(map(len, wanted.values())) - (len(fragments) - remembered)
        metrics.FORMATTED_ITEMS.labels("asked").inc(len(fragments) - remembered)
        metrics.FORMATTED_ITEMS.labels("fallback").inc(missing)
        return [put_together(order, fragments, failures) for order in orders]

    async def _ask_all(
        self, wanted: Mapping[Manner, Mapping[Key, Line]], fragments: dict[Key, str], failures: dict[Key, str]
    ) -> None:
        """Fill `fragments` and `failures`; what is in neither was not answered in time."""
        room = MOST_CALL_BYTES

        async def ask_one(ask: Ask) -> None:
            nonlocal room
            came = await self._ask(ask)
            size = sum(map(len, came.fragments.values()))
            room -= size
            if room < 0:
                failures.update(dict.fromkeys(ask.lines, f"it wrote more than {MOST_CALL_BYTES >> 20} MiB together"))
                return
            fragments.update(came.fragments)
            failures.update(came.failures)
            for key, text in came.fragments.items():
                if _entry_bytes(text) <= self._cache.maxsize:
                    self._cache[key] = text

        tasks = [asyncio.ensure_future(ask_one(ask)) for ask in asks_for(wanted)]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=self.patience.total_seconds())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, ask: Ask) -> Answered:
        """What came of one request; never raises."""
        service = ask.manner.service
        if service not in self._services:
            variable = DigestSettings.variable_of("formatting_services")
            return self._failed(ask, "not_asked", f"it is not registered in {variable}")
        try:
            async with self._slots[service]:
                with _judged(self._breakers[service]):
                    came = await self._answer(ask)
        except OpenedState as err:
            err.__traceback__ = None  # One object for all: it would grow with each that it is raised to.
            return self._failed(ask, "not_asked", f"it failed {_BREAKS_AFTER} times and is left alone for a while")
        except TimeoutError:
            return self._failed(ask, "no_answer", f"no answer within {self._timeout_s:g} s")
        except _Passing as err:
            return self._failed(ask, "no_answer", str(err))
        except (BadReply, BadFragment) as err:
            return self._failed(ask, "bad_answer", str(err))
        except Exception as err:  # Outermost frame of a request: the messages must leave all the same.
            log.exception("A business service could not be asked.", formatting_service=service)
            return self._failed(ask, "no_answer", f"could not be asked: {type(err).__name__}")
        metrics.FORMATTING_REQUESTS.labels("answered").inc()
        return came

    def _failed(self, ask: Ask, result: str, reason: str) -> Answered:
        metrics.FORMATTING_REQUESTS.labels(result).inc()
        if result != "not_asked":
            log.warning("A business service did not format items.", formatting_service=ask.manner.service, error=reason)
        return Answered({}, dict.fromkeys(ask.lines, one_line(reason, most=_REASON_CHARACTERS)))

    async def _answer(self, ask: Ask) -> Answered:
        attributes = {"http.request.method": "POST", "peer.service": ask.manner.service}
        request = traces.begin("POST", parent=traces.here(), kind=SpanKind.CLIENT, attributes=attributes)
        with traces.doing(request), metrics.FORMATTING_SECONDS.time():
            async with asyncio.timeout(self._timeout_s):
                body = await self._body(ask)
        return await asyncio.to_thread(answered, ask, body)

    async def _body(self, ask: Ask) -> bytes:
        """What was answered, at the second attempt if need be: to format twice does no harm."""
        question = ask.body()
        async for attempt in stamina.retry_context(
            on=_Passing, attempts=_ATTEMPTS, wait_initial=_PAUSE_S, wait_jitter=_PAUSE_S, timeout=self._timeout_s
        ):
            with attempt:
                return await self._post(ask.manner, question)
        raise AssertionError("retry_context returns or raises")

    async def _post(self, manner: Manner, question: bytes) -> bytes:
        assert self._session is not None, "use as `async with`"
        try:
            async with self._session.post(
                self._services[manner.service],
                data=question,
                headers=traces.inject() | {"Accept": manner.accept},
                timeout=aiohttp.ClientTimeout(total=None),  # The caller's holds for all attempts.
                allow_redirects=False,
            ) as response:
                body = await read_body(response, most_bytes=MOST_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError) as err:
            raise _Passing(str(err) or type(err).__name__) from err
        if response.status == 429 or response.status >= 500:
            raise _Passing(refusal(response.status, body))
        if response.status != 200:
            raise BadReply(refusal(response.status, body))
        return body


def _entry_bytes(text: str) -> int:
    """What remembering an answer costs; of some languages each character has two bytes, or four."""
    return sys.getsizeof(text) + _ENTRY_BYTES


@contextmanager
def _judged(breaker: Context) -> Iterator[None]:
    """Let the breaker see what comes of a request; raises OpenedState when it lets none through.

    What is cancelled says nothing of the service; the library would take it for a success, and forget the failures.
    """
    breaker.handle_new_request()
    try:
        yield
    except Exception as err:
        breaker.handle_exception(err)
        raise
    else:
        breaker.handle_end_request()
    finally:
        breaker.messages.clear()  # It keeps its events until somebody publishes them.
