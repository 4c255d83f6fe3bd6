"""How much a second: notifications that land as items, a topic's subscribers, digests that close."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

import grpc
from carillon.intake.v1 import intake_pb2
from carillon.scheduler.v1 import timer_pb2

from local.stack import Stack
from tests.bench.digest_peer import CALL, TENANT, TYPES, DigestPeer, name, payload
from tests.bench.report import Figure, at_least, at_most, formatted
from tests.bench.rig import Rig, Spending, Split, Stopwatch, query

_CALLERS = 8
_LONG = timedelta(minutes=3)
_NOTIFY = "/carillon.intake.v1.IntakeService/Notify"
_TOPIC = "market"


async def landed(rig: Rig) -> list[Figure]:
    """Notifications a second, from accepted until they are items in windows."""
    count, subscribers = rig.pick(200_000, 30_000), rig.pick(20_000, 5_000)
    return [await _through_the_link(rig, count, subscribers), await _through_intake(rig, count, subscribers)]


async def _through_the_link(rig: Rig, count: int, subscribers: int) -> Figure:
    async with rig.stack(["digest"]) as stack, DigestPeer.connect(stack) as peer:
        await peer.put_catalog(subscribers)
        await peer.sender.send(peer.notifications(_anybody(2 * CALL, subscribers)), timeout=_LONG)  # Warm.
        before = await count_items(stack)
        frames = peer.notifications(_anybody(count, subscribers))
        rig.say(f"sending {count:,} notifications in {len(frames):,} frames")
        spending, watch = Spending(stack, "digest"), Stopwatch()
        await peer.sender.send(frames, timeout=_LONG)
        took_s, spent = watch.elapsed_s, spending.told(count, "notification")
        check(await count_items(stack) - before, count, "items")
        windows = await _count_windows(stack)
    return Figure(
        figure="notifications accepted to items landed",
        value=count / took_s,
        unit="notifications/s",
        target=at_least(15_000),
        how=f"{count:,} notifications for one of {subscribers:,} subscribers each, in {len(frames):,} frames as intake "
        f"packs calls of {CALL}; from the first frame published to JetStream to the receipt of the last, which follows "
        f"the commit of its items. They open {windows:,} daily windows and ask for a timer for each. One "
        f"digest. {spent}",
    )


async def _through_intake(rig: Rig, count: int, subscribers: int) -> Figure:
    async with rig.stack(["intake", "digest"]) as stack, DigestPeer.connect(stack) as peer:
        await peer.put_catalog(subscribers)
        calls = [_call(subscribers) for _ in range(count // CALL)]
        before, watch = await count_items(stack), Stopwatch()
        await _notify_all(stack, calls)
        accepted_s = watch.elapsed_s
        async with asyncio.timeout(_LONG.total_seconds()):
            while True:
                if (found := await count_items(stack) - before) >= count:
                    break
                await asyncio.sleep(0.1)
        took_s = watch.elapsed_s
        check(found, count, "items")
    return Figure(
        figure="notifications from the caller to items landed",
        value=count / took_s,
        unit="notifications/s",
        how=f"The same through intake's API, which shares the processors: calls of {CALL} with WAIT_FOR_ACCEPTED, "
        f"{_CALLERS} callers on one connection. All {count:,} were accepted after {accepted_s:.1f} s "
        f"({formatted(count / accepted_s)}/s), and items after {took_s:.1f} s.",
    )


async def _notify_all(stack: Stack, calls: Sequence[bytes]) -> None:
    async with grpc.aio.insecure_channel(stack.grpc("intake")) as channel:
        notify: Callable[..., Awaitable[bytes]] = channel.unary_unary(_NOTIFY)
        answers: list[bytes] = []
        waiting = iter(calls)

        async def caller() -> None:
            answers.extend(
                [await notify(call, timeout=60, metadata=(("carillon-tenant", TENANT),)) for call in waiting]
            )

        await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    results = (one for answer in answers for one in intake_pb2.NotifyResponse.FromString(answer).results)
    check(sum(not one.HasField("error") for one in results), len(calls) * CALL, "accepted notifications")


def _call(subscribers: int) -> bytes:
    told = [
        intake_pb2.Notification(
            content=timer_pb2.NotificationContent(
                type=f"bench/{TYPES[number % len(TYPES)]}", subscribers=[one], payload=payload(number)
            ),
            entity=f"order/{number}",
        )
        for number, one in enumerate(_anybody(CALL, subscribers))
    ]
    return intake_pb2.NotifyRequest(notifications=told, wait_for=intake_pb2.WAIT_FOR_ACCEPTED).SerializeToString()


async def topic(rig: Rig) -> list[Figure]:
    """One notification to a topic of very many, who all have it in a digest."""
    subscribers = rig.pick(100_000, 20_000)
    async with rig.stack(["digest"]) as stack, DigestPeer.connect(stack) as peer:
        rig.say(f"subscribing {subscribers:,} to a topic")
        await peer.put_catalog(subscribers, topic=_TOPIC)
        await query(stack, "ANALYZE digest.choice, digest.subscriber")
        took = []
        for number in (1, 2):
            rig.say(f"telling them, {'with no window open' if number == 1 else 'with all windows open'}")
            spending, watch = Spending(stack, "digest"), Stopwatch()
            await peer.sender.send(peer.topical(_TOPIC), timeout=_LONG)
            took.append((watch.elapsed_s, spending.told(subscribers, "item")))
            check(await count_items(stack), number * subscribers, "items")
            await peer.until_timers(subscribers, timeout=_LONG)
    (opening_s, opening), (filling_s, filling) = took
    return [
        Figure(
            figure=f"a topic of {subscribers:,}, windows to be opened",
            value=opening_s,
            unit="s",
            target=at_most(4),
            how=f"One notification to a topic with {subscribers:,} subscribers who have it in a daily digest; from its "
            f"frame published until its receipt, when every item is committed. No window is open, so that many are "
            f"opened, with a timer asked for in the same transaction. {opening}",
        ),
        Figure(
            figure=f"a topic of {subscribers:,}, windows open",
            value=filling_s,
            unit="s",
            target=at_most(4),
            how=f"The next one to the same topic, when all windows are open. {filling}",
        ),
    ]


async def herd(rig: Rig) -> list[Figure]:
    """Digests a second when very many windows close together."""
    windows, items = rig.pick(20_000, 2_000), 20
    async with rig.stack(["digest"]) as stack, DigestPeer.connect(stack) as peer:
        await peer.put_catalog(windows)
        rig.say(f"filling {windows:,} windows with {items} items each")
        names = [name(number % windows) for number in range(windows * items)]
        await peer.sender.send(peer.notifications(names), timeout=_LONG)
        await peer.until_timers(windows, timeout=_LONG)
        await query(stack, "CHECKPOINT")
        frames = peer.wake()
        rig.say(f"closing {windows:,} windows")
        spending, watch = Split(stack, "digest"), Stopwatch()
        await peer.sender.publish(frames)
        await peer.until_delivered(windows, timeout=_LONG)
        took_s, spent = watch.elapsed_s, spending.told(windows, "digest")
        [(closed, held)] = await query(stack, "SELECT count(*), sum(item_count) FROM digest.digest WHERE parts = 1")
        check(closed, windows, "digests")
        check(held, windows * items, "items in digests")
    return [
        Figure(
            figure="herd: digests closed, rendered, handed over",
            value=windows / took_s,
            unit="digests/s",
            target=at_least(1_000),
            how=f"{windows:,} windows with {items} items each, of three types, whose timers all fire at once; HTML "
            f"with its text twin by the built-in templates. From the first timer published until the last digest has "
            f"landed at the dispatcher, a stand-in that receipts it. One digest, default settings. {spent}",
        )
    ]


async def count_items(stack: Stack) -> int:
    """Rows in digest's item table."""
    return int((await query(stack, "SELECT count(*) FROM digest.item"))[0][0])


async def _count_windows(stack: Stack) -> int:
    return int((await query(stack, "SELECT count(*) FROM digest.digest_window"))[0][0])


def check(found: int, expected: int, what: str) -> None:
    """Raise unless they are as many."""
    if found != expected:
        raise RuntimeError(f"expected {expected:,} {what}, found {found:,}")


def _anybody(count: int, subscribers: int) -> list[str]:
    return [name(random.randrange(subscribers)) for _ in range(count)]
