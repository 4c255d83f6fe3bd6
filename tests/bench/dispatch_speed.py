"""How much a second: webhooks and mails that leave and are recorded, from a queue that is never empty."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import cycle, islice
from typing import Any

from carillon.link.v1 import link_pb2

from libs.ids import derived_id, new_id
from libs.jetstream import Bus, Message
from libs.links.frames import Addressed, OutgoingFrame, all_subjects, pack, stream_name
from libs.settings import NatsSettings
from local.stack import Stack
from tests.bench.dispatch_sinks import Sink, http_sink, smtp_sink
from tests.bench.link_sender import LinkSender, until
from tests.bench.report import Figure, at_least
from tests.bench.rig import Rig, Spending, Stopwatch, query
from tests.bench.stand_in import StandIn

TENANT = "bench"
CALL = 500
"""Deliveries that digest hands over together when many windows close at once."""
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

_LONG = timedelta(minutes=2)
_HOSTS = 8
_LINES = [f"Order 2013-{n:06}: 129.00 EUR, {n % 9} items, for Ann Example" for n in range(20)]
_TEXT = "\n".join(_LINES)
_HTML = "<html><body><table>" + "".join(f"<tr><td>{line}</td></tr>" for line in _LINES) + "</table></body></html>"
_JSON = '{"items": [' + ", ".join(f'{{"order": "{line}"}}' for line in _LINES) + "]}"


@dataclass(slots=True)
class Neighbours:
    """Digest and the scheduler reduced to their links: one hands over deliveries, both take what comes back."""

    sender: LinkSender
    digest: StandIn
    scheduler: StandIn
    outcomes: Counter[str] = field(default_factory=Counter)

    async def until_told(self, count: int) -> None:
        """Wait until digest knows of so many deliveries what came of them. Raises NotInTime."""
        told = lambda: f"{self.outcomes} of {count:,} outcomes"  # noqa: E731
        await until(lambda: self.outcomes.total() >= count, self.digest.news, _LONG, told)


@asynccontextmanager
async def neighbours(stack: Stack) -> AsyncIterator[Neighbours]:
    """Listening, until the block ends."""
    outcomes: Counter[str] = Counter()

    def keep(frame: link_pb2.Frame, _message: Message) -> None:
        outcomes.update(entry.delivery_outcome.outcome for entry in frame.entries)

    async with AsyncExitStack() as exits:
        bus = await Bus.connect(NatsSettings(url=(stack.nats_url,)), "bench")
        exits.push_async_callback(bus.close)
        digest, scheduler = StandIn(bus, "digest", keep), StandIn(bus, "scheduler")
        sender = LinkSender(bus, "digest", digest.news)
        await bus.ensure_stream(stream_name("dispatcher"), [all_subjects("dispatcher")])
        await sender.listen()
        await exits.enter_async_context(digest.running())
        await exits.enter_async_context(scheduler.running())
        yield Neighbours(sender=sender, digest=digest, scheduler=scheduler, outcomes=outcomes)


async def webhooks(rig: Rig) -> list[Figure]:
    """Webhooks a second, signed, to receivers on this machine, until digest knows of them."""
    count, sink = rig.pick(20_000, 3_000), Sink()
    async with http_sink(sink, _HOSTS) as urls:
        secrets = rig.directory / "secrets"
        secrets.write_text(f"{SECRET}\n")
        env = {"CARILLON_DISPATCHER_WEBHOOK_SECRET_FILE": str(secrets)}
        fields = [{"channel": "webhook", "address": url, "json": _JSON} for url in urls]
        rate, told = await _sent(rig, count, fields, sink, env)
    return [
        Figure(
            figure="webhooks delivered and recorded",
            value=rate,
            unit="deliveries/s",
            target=at_least(1_500),
            how=f"{count:,} deliveries of {len(_JSON):,} bytes of JSON, signed, to {_HOSTS} receivers on this machine; "
            f"{told}",
        )
    ]


async def mails(rig: Rig) -> list[Figure]:
    """Mails a second, HTML with a text twin, to an SMTP server on this machine, until digest knows of them."""
    count, sink = rig.pick(15_000, 2_000), Sink()
    async with smtp_sink(sink) as port:
        env = {"CARILLON_DISPATCHER_SMTP_PORT": str(port)}
        fields = [{"channel": "email", "address": "ann@example.com", "html": _HTML, "text": _TEXT}]
        rate, told = await _sent(rig, count, fields, sink, env)
    return [
        Figure(
            figure="mails delivered and recorded",
            value=rate,
            unit="deliveries/s",
            target=at_least(1_000),
            how=f"{count:,} mails with {len(_HTML):,} bytes of HTML and {len(_TEXT):,} of text to an SMTP server on "
            f"this machine, without TLS; {told}",
        )
    ]


async def _sent(
    rig: Rig, count: int, fields: Sequence[dict[str, Any]], sink: Sink, env: dict[str, str]
) -> tuple[float, str]:
    async with rig.stack(["dispatcher"], env=env) as stack, neighbours(stack) as peer:
        warm = 2 * CALL
        await peer.sender.send(_frames(warm, fields), timeout=_LONG)
        await peer.until_told(warm)
        await query(stack, "CHECKPOINT")
        frames = _frames(count, fields)
        rig.say(f"handing {count:,} deliveries over")
        spending, watch = Spending(stack, "dispatcher"), Stopwatch()
        await peer.sender.publish(frames)
        await peer.until_told(warm + count)
        took_s, spent = watch.elapsed_s, spending.told(count, "delivery")
        [(kept,)] = await query(stack, "SELECT count(*) FROM dispatcher.delivery WHERE state = 4")
        if (peer.outcomes["sent"], kept, len(sink.came_at_ns), sink.repeats) != (
            warm + count,
            warm + count,
            warm + count,
            0,
        ):
            raise RuntimeError(f"told {peer.outcomes}, recorded {kept:,}, {len(sink.came_at_ns):,} came")
    return count / took_s, (
        f"from the first frame that hands them over until the last outcome is with digest, a stand-in; each is in the "
        f"database with its attempt by then, and came once. One dispatcher, default settings, {sink.connections} "
        f"connections. {spent}"
    )


def _frames(count: int, fields: Sequence[dict[str, Any]]) -> list[OutgoingFrame]:
    entries = (
        Addressed(receiver="dispatcher", entry=link_pb2.Entry(tenant=TENANT, delivery=_delivery(one)))
        for one in islice(cycle(fields), count)
    )
    return [frame for call in _calls(entries) for frame in pack("digest", call, {})[0]]


def _delivery(fields: dict[str, Any]) -> link_pb2.Delivery:
    digest_id = new_id()
    delivery_id = derived_id("delivery", digest_id, 1)
    return link_pb2.Delivery(
        id=delivery_id.bytes, digest_id=digest_id.bytes, subscriber="ann", subject="Your orders", **fields
    )


def _calls(addressed: Iterator[Addressed]) -> Iterator[list[Addressed]]:
    while call := list(islice(addressed, CALL)):
        yield call
