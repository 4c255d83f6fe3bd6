"""The local stack: servers, supervisor and mailbox, with stand-ins for the services."""

import json
import os
import signal
import smtplib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import psycopg
import pytest

from local.processes import Process, ProcessError, accepts_connections, free_port
from local.servers import HOST, PostgresServer
from local.stack import Stack
from tests.support.servers import scratch_directory

STANDINS = "tests.support.standin"
START = datetime(2013, 7, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Where the stack of this module lives."""
    with scratch_directory() as scratch:
        yield scratch


@pytest.fixture(scope="module")
def stack(directory: Path) -> Iterator[Stack]:
    """A stack of two stand-ins, one of them twice."""
    with Stack(
        directory, services=["bell", "gong"], replicas={"bell": 2}, package=STANDINS, test_clock=START
    ) as running:
        yield running


@pytest.fixture(scope="module")
def mailbox(directory: Path) -> Iterator[tuple[int, str]]:
    """SMTP port and page of a mailbox of this module's own."""
    smtp_port, http_port = free_port(), free_port()
    ports = [f"--smtp-port={smtp_port}", f"--http-port={http_port}"]
    process = Process(
        "mailbox",
        [sys.executable, "-m", "local.mailbox", f"--directory={directory / 'other-mailbox'}", *ports],
        log=directory / "mailbox.log",
        cwd=Path(__file__).parents[2],
    )
    process.start()
    try:
        process.wait_until(lambda: accepts_connections(HOST, http_port), timeout_s=20)
        yield smtp_port, f"http://{HOST}:{http_port}"
    finally:
        process.stop()


def _wait_until(holds: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "It did not happen in time."
        time.sleep(0.01)


def _exists(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _get(url: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def _json(url: str) -> Any:
    return json.loads(_get(url)[1])


def _post(url: str, body: str) -> int:
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json", "webhook-id": "msg_1"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def _mail(to: str, subject: str, *, html: str = "") -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"], mail["Message-ID"] = "bells@carillon.test", to, subject, f"<{to}>"
    mail.set_content("Three bells: ♪♪♪\n")
    if html:
        mail.add_alternative(html, subtype="html")
    return mail


def test_a_stack_is_ready_when_it_has_started(stack: Stack) -> None:
    """Schemas are migrated, every replica answers, and the addresses are written down."""
    assert sorted(stack.replicas) == [("bell", 0), ("bell", 1), ("gong", 0)]
    assert all(replica.is_ready() for replica in stack.replicas.values())
    addresses = json.loads((stack.directory / "addresses.json").read_text())
    assert addresses["services"]["bell"][1]["grpc"] == stack.grpc("bell", 1)
    assert addresses["postgres"] == stack.postgres_url
    with psycopg.connect(stack.postgres_url) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
    assert "gong is up" in (stack.directory / "logs" / "gong.log").read_text()


def test_a_killed_replica_starts_again_where_it_was(stack: Stack) -> None:
    """The address stays, the process is another; its sibling does not notice."""
    before, sibling = stack.replicas["bell", 0].process.pid, stack.replicas["bell", 1].process.pid
    address = stack.http("bell", 0)
    stack.kill("bell", 0)
    assert not stack.replicas["bell", 0].is_ready()
    stack.raise_if_failed()
    stack.restart("bell", 0)
    assert stack.http("bell", 0) == address
    assert stack.replicas["bell", 0].is_ready()
    assert stack.replicas["bell", 0].process.pid != before
    assert stack.replicas["bell", 1].process.pid == sibling


def test_a_paused_replica_can_be_resumed_or_ended(stack: Stack) -> None:
    """SIGSTOP keeps the process; ending one that is paused works as well."""
    stack.pause("gong")
    assert not stack.replicas["gong", 0].is_ready()
    stack.resume("gong")
    _wait_until(stack.replicas["gong", 0].is_ready)
    stack.pause("gong")
    assert stack.terminate("gong") == 0
    stack.restart("gong")


def test_an_unforeseen_end_is_noticed(stack: Stack) -> None:
    """Somebody else's kill -9 is reported with the name of the process."""
    pid = stack.replicas["gong", 0].process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _wait_until(lambda: not stack.replicas["gong", 0].process.is_running)
    with pytest.raises(ProcessError, match="gong ended with status -9"):
        stack.raise_if_failed()
    stack.restart("gong")


def test_one_directory_has_one_stack(stack: Stack) -> None:
    """A second one is refused before it touches anything."""
    with pytest.raises(ProcessError, match="Another stack"):
        Stack(stack.directory, services=["bell"], package=STANDINS).start()
    assert stack.replicas["bell", 0].is_ready()


def test_a_service_that_does_not_start_is_named_and_nothing_stays(
    postgres_url: str, nats_server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the end of its log; what had started is stopped. Servers named in the environment are used."""
    monkeypatch.setenv("CARILLON_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("CARILLON_NATS_URL", nats_server_url)
    with scratch_directory() as scratch:
        stack = Stack(scratch, services=["bell", "broken"], package=STANDINS)
        with pytest.raises(ProcessError, match="broken ended with status 1") as caught:
            stack.start()
        assert "the bell has no clapper" in str(caught.value)
        assert stack.postgres is None
        assert not any(replica.process.is_running for replica in stack.replicas.values())
        assert not accepts_connections(HOST, int(stack.mailbox_smtp.rpartition(":")[2]))


def test_a_migration_that_fails_is_named_and_nothing_starts(
    postgres_url: str, nats_server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the schema and what Postgres says."""
    monkeypatch.setenv("CARILLON_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("CARILLON_NATS_URL", nats_server_url)
    with scratch_directory() as scratch:
        stack = Stack(scratch, services=["torn", "bell"], package=STANDINS)
        with pytest.raises(ProcessError, match=r'(?s)schema of torn .* type "rope" does not exist'):
            stack.start()
        assert stack.replicas == {}
        assert not accepts_connections(HOST, int(stack.mailbox_smtp.rpartition(":")[2]))


ABANDONED = """
import sys, time
from pathlib import Path
from local.stack import Stack
stack = Stack(Path(sys.argv[1]), services=["bell"], package="tests.support.standin")
stack.start()
print(stack.postgres.pid, stack.nats.pid, stack.replicas["bell", 0].process.pid, flush=True)
time.sleep(60)
"""


def test_nothing_outlives_a_parent_that_was_killed() -> None:
    """kill -9 of the process that owns a stack ends servers and services with it."""
    with scratch_directory() as scratch:
        parent = subprocess.Popen(
            [sys.executable, "-c", ABANDONED, str(scratch)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        with parent:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert all(_exists(pid) for pid in pids)
            parent.kill()
        _wait_until(lambda: not any(_exists(pid) for pid in pids))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs Postgres as somebody else")
def test_postgres_runs_where_only_root_can_look() -> None:
    """Root's own directories are closed to the user that Postgres runs as."""
    with scratch_directory() as scratch:
        closed = scratch / "closed"
        closed.mkdir(mode=0o700)
        with PostgresServer(closed) as server:
            server.restart()
        real = (closed / "postgres").resolve()
        assert real != closed / "postgres"
        subprocess.run(["rm", "-r", str(real)], check=True)


def test_a_mail_is_kept_and_shown(mailbox: tuple[int, str]) -> None:
    """It is a file, a line of the list, a page; its HTML is shown in a frame where nothing can run."""
    smtp_port, page = mailbox
    html = "<p>Three <b>bells</b></p><script>alert(1)</script>"
    with smtplib.SMTP(HOST, smtp_port) as smtp:
        smtp.send_message(
            _mail("area@shops.test", "Bells <today>", html=html), to_addrs=["area@shops.test", "Bcc@x.test"]
        )
    [mail] = _json(f"{page}/api/mails?to=area@shops")["mails"]
    assert (mail["subject"], mail["recipients"]) == ("Bells <today>", ["area@shops.test", "Bcc@x.test"])
    assert "Bells &lt;today&gt;" in _get(f"{page}/")[1]
    status, shown, headers = _get(f"{page}/mails/{mail['id']}")
    assert status == 200
    assert "♪♪♪" in shown
    assert "<iframe sandbox" in shown
    assert "script" not in headers["Content-Security-Policy"]
    _, part, headers = _get(f"{page}/mails/{mail['id']}/html")
    assert html in part
    assert headers["Content-Security-Policy"].startswith("sandbox; default-src 'none'")
    opened = _json(f"{page}/api/mails/{mail['id']}")
    assert opened["text"] == "Three bells: ♪♪♪\n"
    assert ["Delivered-To", "Bcc@x.test"] in opened["headers"]
    assert "Delivered-To: area@shops.test" in _get(f"{page}/mails/{mail['id']}.eml")[1]
    assert _get(f"{page}/mails/999999")[0] == 404


def test_any_content_is_kept_as_it_was(mailbox: tuple[int, str]) -> None:
    """Lines with dots, no body at all, two mails over one connection; a line that no server would take is refused."""
    smtp_port, page = mailbox
    bodies = ["a\r\n.b\r\n..\r\nsee you.\r\n.c", ".\r\n", "no end of line", ""]
    with smtplib.SMTP(HOST, smtp_port) as smtp:
        for body in bodies:
            smtp.sendmail("a@x.test", ["dots@x.test"], f"Subject: =?utf-8?q?=E2=99=AA?=\r\n\r\n{body}")
        with pytest.raises(smtplib.SMTPDataError):
            smtp.sendmail("a@x.test", ["dots@x.test"], "Subject: x\r\n\r\n" + "x" * 999)
        assert smtp.noop()[0] == 250
    mails = _json(f"{page}/api/mails?to=dots@")["mails"]
    assert [mail["subject"] for mail in mails] == ["♪"] * 4
    kept = [_get(f"{page}/mails/{mail['id']}.eml")[1].partition("\r\n\r\n")[2] for mail in mails]
    assert [body.removesuffix("\r\n") for body in kept] == [body.removesuffix("\r\n") for body in bodies]


def test_recipients_can_be_searched_and_paged(mailbox: tuple[int, str]) -> None:
    """Newest first on the page, oldest first in JSON, nothing shown twice."""
    smtp_port, page = mailbox
    with smtplib.SMTP(HOST, smtp_port) as smtp:
        for n in range(60):
            smtp.send_message(_mail("pager@x.test", f"Number {n:02d}"))
    first = _get(f"{page}/?to=PAGER")[1]
    assert "60 mails to" in first
    assert "Number 59" in first
    assert "Number 09" not in first
    older = first.split("before=")[1].split('"')[0]
    second = _get(f"{page}/?to=PAGER&before={older}")[1]
    assert "Number 09" in second
    assert "Number 10" not in second
    after = _json(f"{page}/api/mails?to=pager&limit=59")["mails"][-1]["id"]
    assert [mail["subject"] for mail in _json(f"{page}/api/mails?to=pager&after={after}")["mails"]] == ["Number 59"]
    assert _json(f"{page}/api/counts")["mails_by_recipient"]["pager@x.test"] == 60
    assert _get(f"{page}/?before=x")[0] == 400


def test_an_address_can_ask_to_be_refused(mailbox: tuple[int, str]) -> None:
    """Temporary and permanent refusals can be had, to see what a sender makes of them."""
    with smtplib.SMTP(HOST, mailbox[0]) as smtp:
        for code in (451, 550):
            with pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
                smtp.send_message(_mail(f"refuse.{code}.x@x.test", "No"))
            assert [refusal[0] for refusal in caught.value.recipients.values()] == [code]


def test_webhooks_are_kept_counted_and_shown(mailbox: tuple[int, str]) -> None:
    """Bodies and headers are there again; an answer other than 200 can be asked for."""
    _, page = mailbox
    assert _post(f"{page}/hooks/bells", '{"tone": "<c>"}') == 200
    assert _post(f"{page}/hooks/bells?answer=503", "not json") == 503
    assert _post(f"{page}/hooks/bells%2Fx", "{}") in {400, 404}
    first, second = _json(f"{page}/api/hooks/bells")["hooks"]
    assert (first["body"], first["status"], first["headers"]["webhook-id"]) == ({"tone": "<c>"}, 200, "msg_1")
    assert (second["body"], second["status"]) == ("not json", 503)
    assert _json(f"{page}/api/counts")["hooks"] == {"bells": 2}
    shown = _get(f"{page}/hooks/bells")[1]
    assert "<c>" not in shown
    assert "&lt;c&gt;" in shown
    assert "answered 503" in shown
