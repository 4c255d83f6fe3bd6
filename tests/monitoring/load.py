"""A load that touches everything a panel shows: small rounds, again and again, each a bit of every kind.

Everything goes through the public RPCs, as callers do it; business time is real time.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import aiohttp
import grpc
from carillon.digest.v1 import digest_pb2 as digest
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub
from carillon.dispatcher.v1 import dispatcher_pb2 as dispatcher
from carillon.dispatcher.v1.dispatcher_pb2_grpc import DispatcherServiceStub
from carillon.intake.v1 import intake_pb2 as intake
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub
from google.protobuf.duration_pb2 import Duration

from libs.wire import to_timestamp
from local.stack import SERVICES, Stack
from tests.monitoring.outside import Outside

TYPES = ("order", "price", "invoice", "broken", "nightly/request", "nightly/response", "nightly/summary")
READERS = tuple(f"reader-{number}" for number in range(8))
_TIMEOUT_S = 5
_ROUND_S = 0.5
_ROUNDS = 4
"""Under way at once: a service that stands still must not be buried."""
_APPLIED = intake.WAIT_FOR_APPLIED
_GREEDY = (("carillon-tenant", "greedy"),)
_SHOP = (("carillon-tenant", "shop"),)
_EMAIL, _WEBHOOK, _LOG = digest.CHANNEL_EMAIL, digest.CHANNEL_WEBHOOK, digest.CHANNEL_LOG


class Load:
    """One caller of the four services."""

    def __init__(self, stack: Stack, outside: Outside, unsubscribe_url: str) -> None:
        self._stack, self._outside, self._unsubscribe_url = stack, outside, unsubscribe_url
        stubs = (IntakeServiceStub, SchedulerServiceStub, DigestServiceStub, DispatcherServiceStub)
        self._channels = [grpc.aio.insecure_channel(stack.grpc(name)) for name in SERVICES]
        self._intake, self._scheduler, self._digest, self._dispatcher = (
            stub(channel) for stub, channel in zip(stubs, self._channels, strict=True)
        )
        self._numbers = count()
        self._request_ids: list[str] = []
        self._timer_ids: list[tuple[str, str]] = []

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()

    async def prepare(self) -> None:
        """Store types, people, cadences, templates and a timeline."""
        for put in self._catalog():
            await getattr(self._digest, type(put).__name__.removesuffix("Request"))(put, metadata=_SHOP)
        told = timer.Target(notification=_content("order", READERS[0]))
        only_busy = timer.Condition(cel="facts.orders > 1")
        steps = [
            timer.TimelineStep(name="welcome", offset=Duration(seconds=1), target=told),
            timer.TimelineStep(name="thanks", offset=Duration(seconds=2), target=told, condition=only_busy),
        ]
        line = timer.Timeline(name="trial", steps=steps)
        await self._scheduler.PutTimeline(scheduler.PutTimelineRequest(timeline=line), metadata=_SHOP)
        silenced = dispatcher.Suppression(channel="email", address="silenced@example.com", reason="asked us to stop")
        await self._dispatcher.PutSuppression(dispatcher.PutSuppressionRequest(suppression=silenced), metadata=_SHOP)

    async def run(self) -> None:
        """Round after round, until cancelled. A slow one holds up no other, but for _ROUNDS of them."""
        under_way = asyncio.Semaphore(_ROUNDS)
        async with asyncio.TaskGroup() as rounds:
            for number in count():
                await under_way.acquire()
                rounds.create_task(self._round(number)).add_done_callback(lambda _: under_way.release())
                await asyncio.sleep(_ROUND_S)

    async def _round(self, number: int) -> None:
        """A bit of everything; what fails because a service is away is left."""
        jobs = [self._notify(), self._schedule(), self._timeline(), self._request(), self._read(), self._mistakes()]
        if number % 5 == 0:
            jobs += [self._trigger(), self._unsubscribe(number // 5), self._redrive()]
        if number % 20 == 0:
            jobs.append(self._ask_too_much())
        for done in await asyncio.gather(*jobs, return_exceptions=True):
            if isinstance(done, BaseException) and not isinstance(done, grpc.aio.AioRpcError | aiohttp.ClientError):
                raise done

    # What a round is made of

    async def _notify(self) -> None:
        for one_type in ("order", "price", "invoice", "broken", "unheard-of"):
            told = [
                intake.Notification(
                    content=_content(one_type, *READERS, "stranger", amount=amount), entity=self._entity("cart")
                )
                for amount in (5, 20)
            ]
            key = f"notify-{next(self._numbers)}"
            request = intake.NotifyRequest(notifications=told, idempotency_key=key, wait_for=_APPLIED)
            await self._call(self._intake.Notify, request)
            if one_type == "order":
                await self._call(self._intake.Notify, request)
        waiting = intake.Notification(content=_content("order", READERS[2]), entity=self._entity("cart"))
        batch = intake.NotifyRequest(notifications=[waiting], wait_for=_APPLIED)
        stream = self._intake.NotifyStream(
            iter([intake.NotifyStreamRequest(batch=batch)]), metadata=_SHOP, timeout=_TIMEOUT_S
        )
        async for _ in stream:
            await self._call(self._intake.Cancel, intake.CancelRequest(selector=_selector(waiting.entity)))

    async def _schedule(self) -> None:
        event = timer.Target(event=timer.EventContent(type="cart.left", payload="{}"))
        reported = timer.Target(
            event=timer.EventContent(type="cart.check", payload="{}", report_within=Duration(seconds=1))
        )
        told = timer.Target(notification=_content("order", READERS[1]))
        asked = timer.Condition(service=timer.ServiceCondition(service="crm"))
        once_again = timer.RetryPolicy(initial_delay=Duration(seconds=1), maximum_attempts=2)
        soon, later = Duration(seconds=1), Duration(seconds=600)
        kinds: list[dict[str, Any]] = [
            *({"after": soon, "target": event} for _ in range(8)),
            *({"after": soon, "target": told} for _ in range(2)),
            *({"after": soon, "target": event, "condition": asked} for _ in range(2)),
            {"after": soon, "target": event, "condition": timer.Condition(cel="has(facts.nothing)")},
            {"after": soon, "target": reported, "retry_policy": once_again},
            {"after": Duration(), "target": reported, "retry_policy": once_again},
            {"after": later, "target": event},
        ]
        schedules = [intake.Schedule(entity=self._entity("timer"), **kind) for kind in kinds]
        answer = await self._call(self._intake.Schedule, intake.ScheduleRequest(schedules=schedules, wait_for=_APPLIED))
        await self._call(self._intake.Cancel, intake.CancelRequest(selector=_selector(schedules[-1].entity)))
        for timer_id, entity in self._timer_ids:
            done = intake.Outcome(timer_id=timer_id, attempt=1, entity=entity, is_done=True)
            await self._call(self._intake.ReportOutcome, intake.ReportOutcomeRequest(outcomes=[done]))
        self._timer_ids = [(answer.results[-2].id, schedules[-2].entity)]

    async def _timeline(self) -> None:
        entity = self._entity("trial")
        facts = intake.EntityFacts(entity=entity, facts=json.dumps({"orders": next(self._numbers) % 3}))
        await self._call(self._intake.PutFacts, intake.PutFactsRequest(facts=[facts]))
        start = intake.TimelineStart(timeline="trial", entity=entity)
        await self._call(self._intake.StartTimeline, intake.StartTimelineRequest(starts=[start]))

    async def _request(self) -> None:
        asked = [
            intake.Request(
                batch="nightly", customer=READERS[2], item="chair", providers=READERS[3:5], payload="{}",
                answer_within=Duration(seconds=60),
            )
            for _ in range(3)
        ]  # fmt: skip
        answer = await self._call(
            self._intake.SubmitRequest, intake.SubmitRequestRequest(requests=asked, wait_for=_APPLIED)
        )
        answered, withdrawn, _ = (result.id for result in answer.results)
        response = intake.Response(request_id=answered, provider=READERS[3], payload='{"price": 12}')
        await self._call(self._intake.RecordResponse, intake.RecordResponseRequest(responses=[response]))
        await self._call(self._intake.WithdrawRequest, intake.WithdrawRequestRequest(ids=[withdrawn]))

    async def _read(self) -> None:
        await self._call(self._scheduler.ListShards, scheduler.ListShardsRequest())
        await self._call(self._digest.ListDigests, digest.ListDigestsRequest(subscriber=READERS[0]))
        await self._call(self._dispatcher.ListDeliveries, dispatcher.ListDeliveriesRequest(subscriber=READERS[0]))

    async def _mistakes(self) -> None:
        good = intake.Notification(content=_content("order", READERS[0]), entity=self._entity("cart"))
        for method, request in (
            (self._intake.Notify, intake.NotifyRequest(notifications=[good, intake.Notification()])),
            (self._intake.Notify, intake.NotifyRequest()),
            (self._scheduler.GetTimer, scheduler.GetTimerRequest(id="none")),
            (self._digest.GetDigest, digest.GetDigestRequest(id="none")),
            (self._dispatcher.GetDelivery, dispatcher.GetDeliveryRequest(id="none")),
        ):
            try:
                await self._call(method, request)
            except grpc.aio.AioRpcError:
                continue

    async def _trigger(self) -> None:
        request = intake.TriggerBatchRequest(batch="nightly", window_end_time=to_timestamp(datetime.now(UTC)))
        for _ in range(2):
            await self._call(self._intake.TriggerBatch, request)

    async def _unsubscribe(self, number: int) -> None:
        """With the link in the newest mail to somebody, as a mail program does; and once with nonsense."""
        reader = READERS[number % len(READERS)]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{self._stack.mailbox_url}/api/mails", params={"to": reader}) as answer:
                mails = (await answer.json())["mails"]
            for mail in mails[-1:]:
                async with session.get(f"{self._stack.mailbox_url}/mails/{mail['id']}.eml") as answer:
                    found = re.search(r"List-Unsubscribe: <https://[^/]+/([^>]+)>", await answer.text())
                for token in filter(None, (found and found[1], "nonsense")):
                    form = {"List-Unsubscribe": "One-Click"}
                    async with session.post(f"{self._unsubscribe_url}/{token}", data=form) as answer:
                        await answer.read()

    async def _redrive(self) -> None:
        page = await self._call(self._dispatcher.ListDeadLetters, dispatcher.ListDeadLettersRequest(page_size=1))
        for dead in page.deliveries:
            await self._call(
                self._dispatcher.Redrive, dispatcher.RedriveRequest(delivery_ids=[dead.id], idempotency_key=dead.id)
            )

    async def _ask_too_much(self) -> None:
        """More at once than a tenant may."""
        many = [intake.EntityFacts(entity=f"fact-{number}", facts="{}") for number in range(1000)]
        for _ in range(2):
            await self._intake.PutFacts(intake.PutFactsRequest(facts=many), metadata=_GREEDY, timeout=_TIMEOUT_S)

    # How

    async def _call(self, method: Any, request: Any) -> Any:
        return await method(request, metadata=_SHOP, timeout=_TIMEOUT_S)

    def _entity(self, kind: str) -> str:
        return f"{kind}-{next(self._numbers)}"

    def _catalog(self) -> Iterator[Any]:
        """Eight readers, each told in another way, and what they are told."""
        yield digest.PutCadenceRequest(
            cadence=digest.Cadence(id="each-minute", aligned=digest.AlignedCadence(cron="* * * * *"))
        )
        yield digest.PutCadenceRequest(
            cadence=digest.Cadence(id="soon", rolling=digest.RollingCadence(duration=Duration(seconds=2)))
        )
        yield digest.PutCadenceRequest(
            cadence=digest.Cadence(id="nightly", external=digest.ExternalCadence(batch="nightly"))
        )
        for one_id in TYPES:
            service = "crm" if one_id == "invoice" else ""
            kind = digest.NotificationType(id=one_id, name=one_id, formatting_service=service)
            yield digest.PutNotificationTypeRequest(notification_type=kind)
        broken = digest.Template(id="broken", body="{{ 1 // 0 }}")
        yield digest.PutTemplateRequest(template=broken)
        yield from self._people()

    def _people(self) -> Iterator[Any]:
        hooks = {4: "ok", 5: "flaky", 6: "gone", 7: "slow"}
        now = datetime.now(UTC)
        quiet = digest.QuietHours(
            from_time_of_day=f"{now - timedelta(hours=1):%H:%M}", until_time_of_day=f"{now + timedelta(hours=2):%H:%M}"
        )
        yield digest.PutSubscribersRequest(
            subscribers=[
                digest.Subscriber(
                    id=name,
                    zone="UTC",
                    email="silenced@example.com" if number == 3 else f"{name}@example.com",
                    webhook_url=f"{self._outside.url}/{hooks[number]}" if number in hooks else "",
                    quiet_hours=[quiet] if number == 2 else [],
                )
                for number, name in enumerate(READERS)
            ]
            + [digest.Subscriber(id="away", webhook_url=self._outside.nowhere)]
        )
        ways = {0: "immediate", 1: "soon", 2: "each-minute", 3: "immediate", 4: "soon", 5: "immediate"}
        for number, name in enumerate(READERS):
            channel = _WEBHOOK if number in hooks else _EMAIL
            chosen = [digest.Choice(cadence=ways.get(number, "immediate"), channel=channel)]
            if number in (0, 1):
                chosen.append(digest.Choice(cadence="each-minute", channel=_EMAIL))
            if number == 3:
                chosen.append(digest.Choice(cadence="immediate", channel=_LOG))
            nightly = [digest.Choice(cadence="nightly", channel=channel)]
            yield digest.PutSubscriptionsRequest(
                subscriptions=[
                    digest.Subscription(id=f"{name}/all", subscriber=name, type="*", choices=chosen),
                    digest.Subscription(id=f"{name}/nightly", subscriber=name, type="nightly/*", choices=nightly),
                    digest.Subscription(
                        id=f"{name}/price", subscriber=name, type="price", choices=chosen, filter="payload.amount > 10"
                    ),
                ]
            )
        away = digest.Subscription(
            id="away",
            subscriber="away",
            type="order",
            topic="carts",
            choices=[digest.Choice(channel=_WEBHOOK, cadence="immediate")],
        )
        yield digest.PutSubscriptionsRequest(subscriptions=[away])


def _content(one_type: str, *readers: str, amount: int = 5) -> timer.NotificationContent:
    payload = json.dumps({"title": f"About {one_type}", "amount": amount})
    return timer.NotificationContent(type=one_type, subscribers=readers, topics=["carts"], payload=payload)


def _selector(entity: str) -> intake.Selector:
    return intake.Selector(entity=intake.EntitySelector(entity=entity))
