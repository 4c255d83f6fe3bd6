"""Thousands of deliveries through receivers that fail one time in five, while dispatchers are killed and stopped.

Real processes: two dispatchers, a scheduler for the retries; digest is a stand-in that keeps what it is told. Every
delivery must end sent or dead with its reason, told once; none may arrive twice but where an attempt was in doubt, and
those are counted. CARILLON_TEST_DELIVERIES sizes it.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from aiohttp import web
from aiosmtpd.smtp import SMTP
from carillon.link.v1 import link_pb2

from libs.ids import derived_id
from libs.jetstream import Bus, Message
from libs.links.frames import Addressed, all_subjects, pack, stream_name
from libs.settings import NatsSettings
from local.stack import Stack
from tests.bench.link_sender import LinkSender
from tests.bench.stand_in import StandIn
from tests.integration.test_dispatcher_smtp import MailServer, drop

DELIVERIES = int(os.environ.get("CARILLON_TEST_DELIVERIES", "1000"))
FAILURES = 0.2
CALL = 200

SETTINGS = {
    "CARILLON_SHARDS": "4",
    "CARILLON_DISPATCHER_CLAIM_TIME": "2s",
    "CARILLON_DISPATCHER_BACKOFF_FIRST": "100ms",
    "CARILLON_DISPATCHER_BACKOFF_LONGEST": "500ms",
    "CARILLON_DISPATCHER_TRAFFIC_BREAKER_OPEN": "300ms",
    "CARILLON_DISPATCHER_TRAFFIC_BREAKER_OPEN_LONGEST": "1s",
    "CARILLON_DISPATCHER_SMTP_TIMEOUT": "3s",
    "CARILLON_DISPATCHER_WEBHOOK_TIMEOUT": "3s",
}

pytestmark = pytest.mark.timeout(120 + DELIVERIES // 25)

_MAIL_FAILURES: tuple[tuple[str, Any], ...] = (
    ("MAIL", "451 4.3.0 later"),
    ("MAIL", drop),
    ("RCPT", "450 4.2.1 busy"),
    ("RCPT", "550 5.1.1 who?"),
    ("RCPT", drop),
    ("DATA", "452 4.3.1 full"),
    ("DATA", "554 5.6.0 spam"),
    ("DATA", drop),
)
_HOOK_FAILURES = ("500", "503", "429", "400", "410", "drop", "late")


class FlakyMail(MailServer):
    """Fails one mail in five, in one of its states; `copies` counts the mails it has taken over, answered or not."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[UUID] = Counter()

    async def handle_MAIL(self, server: SMTP, session: Any, envelope: Any, address: str, options: Any) -> str:
        session.fate = random.choice(_MAIL_FAILURES) if random.random() < FAILURES else ("", "")
        return await self._fated("MAIL", server, session) or await super().handle_MAIL(
            server, session, envelope, address, options
        )

    async def handle_RCPT(self, server: SMTP, session: Any, envelope: Any, address: str, options: Any) -> str:
        return await self._fated("RCPT", server, session) or await super().handle_RCPT(
            server, session, envelope, address, options
        )

    async def handle_DATA(self, server: SMTP, session: Any, envelope: Any) -> str:
        command, answer = session.fate
        if command != "DATA" or callable(answer):
            head = bytes(envelope.original_content).partition(b"\r\n\r\n")[0].decode()
            self.copies[UUID(head.partition("X-Carillon-Delivery: ")[2][:36])] += 1
        return await self._fated("DATA", server, session) or "250 kept"

    async def _fated(self, command: str, server: SMTP, session: Any) -> str:
        fated, answer = session.fate
        if fated != command:
            return ""
        return await answer(server) if callable(answer) else str(answer)


class FlakyHooks:
    """Fails one call in five; `copies` counts those it has taken over."""

    def __init__(self) -> None:
        self.copies: Counter[UUID] = Counter()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        fate = random.choice(_HOOK_FAILURES) if random.random() < FAILURES else "200"
        if fate in ("200", "drop", "late"):
            self.copies[UUID(request.headers["webhook-id"])] += 1
        if fate == "drop" and request.transport is not None:
            request.transport.abort()
        if fate == "late":
            await asyncio.sleep(3.5)
        return web.Response(status=int(fate) if fate.isdigit() else 200, headers={"Retry-After": "0"})

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/{tail:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        finally:
            await runner.cleanup()


class Digest:
    """Hands deliveries over, and keeps what it is told of them."""

    def __init__(self, bus: Bus) -> None:
        self.told: dict[UUID, list[tuple[str, str]]] = {}
        self._stand_in = StandIn(bus, "digest", self._keep)
        self._sender = LinkSender(bus, "digest", self._stand_in.news)

    @classmethod
    @asynccontextmanager
    async def connect(cls, nats_url: str) -> AsyncIterator["Digest"]:
        async with AsyncExitStack() as exits:
            bus = await Bus.connect(NatsSettings(url=(nats_url,)), "chaos")
            exits.push_async_callback(bus.close)
            digest = cls(bus)
            await bus.ensure_stream(stream_name("dispatcher"), [all_subjects("dispatcher")])
            await digest._sender.listen()
            await exits.enter_async_context(digest._stand_in.running())
            yield digest

    async def hand_over(self, deliveries: list[link_pb2.Delivery]) -> None:
        """Returns when all are committed."""
        for start in range(0, len(deliveries), CALL):
            entries = (
                Addressed(receiver="dispatcher", entry=link_pb2.Entry(tenant="shop", delivery=one))
                for one in deliveries[start : start + CALL]
            )
            await self._sender.send(pack("digest", entries, {})[0], timeout=timedelta(seconds=60))

    async def until_told(self, count: int) -> None:
        """Wait until it knows of so many."""
        while len(self.told) < count:
            self._stand_in.news.clear()
            await self._stand_in.news.wait()

    def _keep(self, frame: link_pb2.Frame, _message: Message) -> None:
        for entry in frame.entries:
            outcome = entry.delivery_outcome
            self.told.setdefault(UUID(bytes=outcome.delivery_id), []).append((outcome.outcome, outcome.reason))


def deliveries(hook: str) -> list[link_pb2.Delivery]:
    """Half mails, half webhooks."""
    made = []
    for n in range(DELIVERIES):
        fields: dict[str, Any] = (
            {"channel": "webhook", "address": hook, "json": f'{{"n": {n}}}'}
            if n % 2
            else {"channel": "email", "address": f"ann{n}@example.com", "text": f"Number {n}."}
        )
        delivery_id, digest_id = derived_id("chaos-delivery", n), derived_id("chaos-digest", n)
        made.append(link_pb2.Delivery(id=delivery_id.bytes, digest_id=digest_id.bytes, subscriber="ann", **fields))
    return made


def rows(stack: Stack, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    """What a query of the dispatcher's schema gives."""
    with psycopg.connect(stack.postgres_url, autocommit=True) as connection:
        connection.execute("SET search_path TO dispatcher")
        return connection.execute(query, parameters).fetchall()


async def test_every_delivery_ends_once_through_failures_kills_and_stops(tmp_path: Path) -> None:
    """Sent or dead with its reason, told once; second copies only of what was in doubt; a stop leaves no doubt."""
    mail, hooks = FlakyMail(), FlakyHooks()
    directory = tmp_path / "stack"
    directory.mkdir()
    for one in (directory, *directory.parents[:4]):
        one.chmod(0o755)  # Postgres may run as another user.
    async with mail.listening() as smtp, hooks.listening() as hook:
        env = SETTINGS | {"CARILLON_DISPATCHER_SMTP_PORT": str(smtp.port)}
        stack = Stack(directory, services=("scheduler", "dispatcher"), replicas={"dispatcher": 2}, env=env)
        try:
            await asyncio.to_thread(stack.start)
            async with Digest.connect(stack.nats_url) as digest:
                await digest.hand_over(deliveries(hook))
                await digest.until_told(DELIVERIES // 4)
                await asyncio.to_thread(stack.kill, "dispatcher", 0)
                await digest.until_told(DELIVERIES // 2)
                await asyncio.to_thread(stack.restart, "dispatcher", 0)
                pid = stack.replicas["dispatcher", 1].process.pid
                status = await asyncio.to_thread(stack.terminate, "dispatcher", 1)
                left = rows(stack, "SELECT count(*) FROM queue WHERE attempt > 0 AND claimed_by LIKE %s", f"%-{pid}-%")
                assert (status, left) == (0, [(0,)])
                await digest.until_told(DELIVERIES)
            await asyncio.to_thread(stack.raise_if_failed)
            _check(stack, digest, mail.copies + hooks.copies)
        finally:
            await asyncio.to_thread(stack.stop)


def _check(stack: Stack, digest: Digest, copies: Counter[UUID]) -> None:
    found = {one[0]: one[1:] for one in rows(stack, "SELECT id, state, reason FROM delivery")}
    assert len(found) == DELIVERIES
    assert rows(stack, "SELECT count(*) FROM queue") == [(0,)]
    names = {4: "sent", 5: "dead"}
    told = {one: [(names[state], reason)] for one, (state, reason) in found.items()}
    assert digest.told == told
    dead = Counter(reason for state, reason in found.values() if state == 5)
    assert dead.keys() <= {"address_rejected", "rejected", "gone", "attempts_exhausted"}
    doubts = Counter(
        dict(
            rows(
                stack,
                "SELECT delivery_id, count(*) FROM attempt"
                " WHERE reason IN ('in_doubt', 'disconnected', 'timeout') GROUP BY delivery_id",
            )
        )
    )
    twice = {one: count for one, count in copies.items() if count > 1}
    assert all(count <= 1 + doubts[one] for one, count in twice.items())
    assert all(copies[one] >= 1 for one, (state, _) in found.items() if state == 4)
    sent = sum(state == 4 for state, _ in found.values())
    print(f"{sent} sent, {dict(dead)} dead; {doubts.total()} attempts in doubt, {len(twice)} came more than once")
