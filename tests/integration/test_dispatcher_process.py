"""The dispatcher as its own process: killed between sending and recording, and stopped with mails under way."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiosmtpd.smtp import SMTP

from services.dispatcher.delivery import State
from tests.integration.test_dispatcher_smtp import MailServer
from tests.support.dispatcher_world import Rig, delivery, id_of, migrated_database
from tests.support.fixtures import OpenDatabase

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(120)


class Gate:
    """Holds the answer to DATA back until it is opened; says when a mail is waiting for it."""

    def __init__(self) -> None:
        self.is_waiting = asyncio.Event()
        self.is_open = asyncio.Event()

    async def __call__(self, _server: SMTP) -> str:
        self.is_waiting.set()
        await self.is_open.wait()
        return "250 kept"


@asynccontextmanager
async def dispatcher_process(
    database_url: str, nats_url: str, mail_port: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m services.dispatcher`, killed at the end if it still runs."""
    settings = {
        "CARILLON_POSTGRES_URL": database_url,
        "CARILLON_NATS_URL": nats_url,
        "CARILLON_DISPATCHER_SMTP_HOST": "127.0.0.1",
        "CARILLON_DISPATCHER_SMTP_PORT": str(mail_port),
        "CARILLON_DISPATCHER_SMTP_TLS": "none",
        "CARILLON_DISPATCHER_CLAIM_TIME": "2s",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.dispatcher", cwd=ROOT, env={**os.environ, **settings}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_all_sent(rig: Rig, count: int) -> None:
    """Return once that many deliveries are sent."""
    async with asyncio.timeout(60):
        while (await rig.states()).get(State.SENT, 0) < count:  # noqa: ASYNC110 — another process does it.
            await asyncio.sleep(0.05)


async def test_a_kill_between_sending_and_recording_repeats_the_mail_under_its_message_id(
    open_database: OpenDatabase, postgres_server_url: str, nats_url: str
) -> None:
    """After `kill -9` the next process sends again what was in doubt, recognisable by its Message-ID, and no more."""
    server, gate = MailServer(), Gate()
    server.answers["DATA"] = [gate]
    with migrated_database(postgres_server_url) as url:
        rig = Rig(await open_database("dispatcher", url))
        await rig.accept(delivery(channel="email", address="ann@example.com"))
        async with server.listening() as settings:
            async with dispatcher_process(url, nats_url, settings.port) as process:
                await asyncio.wait_for(gate.is_waiting.wait(), 60)
                process.send_signal(signal.SIGKILL)
                await process.wait()
            assert (await rig.record(id_of("one"))).state is State.SENDING
            await rig.accept(delivery("two", channel="email", address="bob@example.com"))
            async with dispatcher_process(url, nats_url, settings.port):
                await until_all_sent(rig, 2)
            gate.is_open.set()
        ids = [mail["X-Carillon-Delivery"] for mail in server.mails]
        assert sorted(ids) == sorted([str(id_of("one")), str(id_of("one")), str(id_of("two"))])
        assert len({mail["Message-ID"] for mail in server.mails}) == 2
        assert [(one.number, one.reason) for one in await rig.attempts(id_of("one"))] == [(1, "in_doubt"), (2, "")]
        assert await rig.queued() == 0


async def test_sigterm_finishes_what_is_being_sent(
    open_database: OpenDatabase, postgres_server_url: str, nats_url: str
) -> None:
    """A process told to stop waits for the mail under way, records it, and exits with status 0."""
    server, gate = MailServer(), Gate()
    server.answers["DATA"] = [gate]
    with migrated_database(postgres_server_url) as url:
        rig = Rig(await open_database("dispatcher", url))
        await rig.accept(delivery(channel="email", address="ann@example.com"))
        async with server.listening() as settings, dispatcher_process(url, nats_url, settings.port) as process:
            await asyncio.wait_for(gate.is_waiting.wait(), 60)
            process.terminate()
            gate.is_open.set()
            assert await asyncio.wait_for(process.wait(), 30) == 0
        assert await rig.states() == {State.SENT: 1}
        assert len(server.mails) == 1
        assert await rig.outcomes_told() == [("sent", "")]
