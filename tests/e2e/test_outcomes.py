"""Outcomes travel back: from a request, a timer or a digest one can follow what came of it, to the receiver's answer.

Real processes, a real HTTP receiver, and `carillon explain`, which goes from service to service by the ids they name.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from aiohttp import web
from carillon.digest.v1 import digest_pb2, digest_pb2_grpc
from carillon.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from carillon.intake.v1 import intake_pb2, intake_pb2_grpc
from carillon.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc, timer_pb2
from google.protobuf.duration_pb2 import Duration

from local.stack import PROJECT, SERVICES, Stack
from tests.e2e.conftest import token_of
from tests.support.link_world import until

pytestmark = pytest.mark.timeout(120)

TENANT = "shop"
BATCH = "offers"
_AS_TENANT = (("authorization", f"Bearer {token_of(TENANT)}"),)
_SILENCED = "silenced@example.com"
_Entry = dict[str, Any]


class Caller:
    """All four services, as a tenant; and a receiver that takes what is posted to /ok and is gone elsewhere."""

    def __init__(self, stack: Stack, channels: dict[str, grpc.aio.Channel], receiver_url: str) -> None:
        self._stack, self._receiver_url = stack, receiver_url
        self.intake: Any = intake_pb2_grpc.IntakeServiceStub(channels["intake"])
        self.scheduler: Any = scheduler_pb2_grpc.SchedulerServiceStub(channels["scheduler"])
        self.digest: Any = digest_pb2_grpc.DigestServiceStub(channels["digest"])
        self.dispatcher: Any = dispatcher_pb2_grpc.DispatcherServiceStub(channels["dispatcher"])

    async def call(self, method: Any, request: Any) -> Any:
        """The answer."""
        return await method(request, metadata=_AS_TENANT, timeout=30)

    async def put_type(self, one_id: str) -> None:
        """A notification type."""
        kind = digest_pb2.NotificationType(id=one_id, name=one_id)
        await self.call(self.digest.PutNotificationType, digest_pb2.PutNotificationTypeRequest(notification_type=kind))

    async def put_subscriber(self, one_id: str, *, types: str, cadence: str = "immediate", path: str = "ok") -> None:
        """Somebody who has such types by webhook; by mail to a suppressed address where `path` is empty."""
        who = digest_pb2.Subscriber(id=one_id, email=_SILENCED, webhook_url=f"{self._receiver_url}/{path or 'ok'}")
        channel = digest_pb2.CHANNEL_WEBHOOK if path else digest_pb2.CHANNEL_EMAIL
        choice = digest_pb2.Choice(cadence=cadence, channel=channel)
        wanted = digest_pb2.Subscription(id=f"{one_id}/{types}", subscriber=one_id, type=types, choices=[choice])
        await self.call(self.digest.PutSubscribers, digest_pb2.PutSubscribersRequest(subscribers=[who]))
        await self.call(self.digest.PutSubscriptions, digest_pb2.PutSubscriptionsRequest(subscriptions=[wanted]))

    async def digests_told(self, *subscribers: str, each: int = 1) -> list[digest_pb2.Digest]:
        """Their digests, once digest knows of every one what came of it."""

        async def found() -> list[digest_pb2.Digest]:
            lists = [
                (await self.call(self.digest.ListDigests, digest_pb2.ListDigestsRequest(subscriber=one))).digests
                for one in subscribers
            ]
            digests = [one for some in lists for one in some]
            is_told = all(one.outcome != "pending" for one in digests)
            return digests if is_told and all(len(some) >= each for some in lists) else []

        return await until(found, timeout_s=60)

    async def explained(self, one_id: str) -> list[_Entry]:
        """What `carillon explain` has to say."""
        endpoints = {f"CARILLON_{name.upper()}_ENDPOINT": self._stack.grpc(name) for name in SERVICES}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", "explain", "--json", one_id),
            cwd=PROJECT,
            env={**os.environ, **endpoints, "CARILLON_TOKEN": token_of(TENANT)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == 0, (out, err)
        return list(json.loads(out)["entries"])


@pytest.fixture
async def caller(guarded: Stack) -> AsyncIterator[Caller]:
    """Connected, with an address that is suppressed."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="thanks") if request.path == "/ok" else web.Response(status=410, text="moved away")

    app = web.Application()
    app.router.add_post("/{path}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with AsyncExitStack() as exits:
        exits.push_async_callback(runner.cleanup)
        channels = {
            name: await exits.enter_async_context(grpc.aio.insecure_channel(guarded.grpc(name))) for name in SERVICES
        }
        caller = Caller(guarded, channels, f"http://127.0.0.1:{runner.addresses[0][1]}")
        silenced = dispatcher_pb2.Suppression(channel="email", address=_SILENCED, reason="asked us to stop")
        await caller.call(caller.dispatcher.PutSuppression, dispatcher_pb2.PutSuppressionRequest(suppression=silenced))
        yield caller


def sentences(entries: Sequence[_Entry], service: str, kind: str, **details: str) -> list[str]:
    """What a service says of such things."""
    return [
        one["sentence"]
        for one in entries
        if (one["service"], one["kind"]) == (service, kind)
        and all(one["details"].get(key) == value for key, value in details.items())
    ]


async def test_a_request_leads_to_what_came_of_every_notification(caller: Caller) -> None:
    """Provider by provider: delivered, given up, suppressed, with the reason; then the answer and who heard of it."""
    for name in ("request", "response", "summary"):
        await caller.put_type(f"{BATCH}/{name}")
    for who, path in (("provider-there", "ok"), ("provider-gone", "gone"), ("provider-silenced", "")):
        await caller.put_subscriber(who, types=f"{BATCH}/*", path=path)
    await caller.put_subscriber("asking-customer", types=f"{BATCH}/*")
    providers = ["provider-there", "provider-gone", "provider-silenced"]
    asked = intake_pb2.Request(batch=BATCH, customer="asking-customer", item="house/7", providers=providers)
    answer = await caller.call(caller.intake.SubmitRequest, intake_pb2.SubmitRequestRequest(requests=[asked]))
    request_id = answer.results[0].id
    digests = {one.subscriber: one.outcome for one in await caller.digests_told(*providers)}
    assert digests == {"provider-there": "sent", "provider-gone": "failed", "provider-silenced": "failed"}

    response = intake_pb2.Response(request_id=request_id, provider="provider-there", payload='{"price": 12}')
    await caller.call(caller.intake.RecordResponse, intake_pb2.RecordResponseRequest(responses=[response]))
    await caller.digests_told("asking-customer")
    story = await caller.explained(request_id)

    assert sentences(story, "intake", "request_submitted")
    assert sentences(story, "intake", "response_recorded") == ["provider-there answered."]
    assert sentences(story, "intake", "request_due")
    assert len(sentences(story, "scheduler", "timer_expected")) == 1
    sent = sentences(story, "dispatcher", "delivery_sent")
    assert len(sent) == 2  # The provider's and the customer's.
    assert all("200 thanks" in one for one in sent)
    (dead,) = sentences(story, "dispatcher", "delivery_dead")
    assert "was given up" in dead
    assert "410 moved away" in dead
    (suppressed,) = sentences(story, "dispatcher", "delivery_suppressed")
    assert "the address is suppressed" in suppressed
    assert any("gone" in one for one in sentences(story, "digest", "delivery_dead"))
    assert sentences(story, "digest", "delivery_suppressed")


async def test_a_timer_leads_to_what_came_of_its_notification(caller: Caller) -> None:
    """It says that it fired, digest whom it told, the dispatcher what the receiver answered; and why it told nobody."""
    await caller.put_type("outcomes/trial-over")
    await caller.put_subscriber("timed", types="outcomes/trial-over")
    timer_ids = []
    for subscriber in ("timed", "nobody-we-know"):
        content = timer_pb2.NotificationContent(type="outcomes/trial-over", subscribers=[subscriber], payload="{}")
        schedule = intake_pb2.Schedule(
            entity=f"trial/{subscriber}", after=Duration(), target=timer_pb2.Target(notification=content)
        )
        answer = await caller.call(caller.intake.Schedule, intake_pb2.ScheduleRequest(schedules=[schedule]))
        timer_ids.append(answer.results[0].id)
    told, told_nobody = timer_ids
    await caller.digests_told("timed")

    timer = await caller.call(caller.scheduler.GetTimer, scheduler_pb2.GetTimerRequest(id=told))
    assert timer.timer.state == timer_pb2.TIMER_STATE_FIRED
    story = await caller.explained(told)
    assert sentences(story, "scheduler", "timer_fired", timer_id=told)
    assert sentences(story, "digest", "notification_received", notification_id=told)
    assert ["200 thanks" in one for one in sentences(story, "dispatcher", "delivery_sent")] == [True]
    assert sentences(story, "digest", "delivery_sent") == ["It was sent, the dispatcher reported."]

    async def decided() -> list[str]:
        story = await caller.explained(told_nobody)
        return sentences(story, "scheduler", "timer_fired") and sentences(story, "digest", "item_suppressed")

    (why,) = await until(decided, timeout_s=60)
    assert "there was no subscriber nobody-we-know" in why


async def test_a_digest_leads_to_what_its_receiver_answered(caller: Caller) -> None:
    """Two notifications in one digest to somebody who is gone: each, and the digest, say that and why."""
    await caller.put_type("outcomes/price")
    external = digest_pb2.ExternalCadence(batch="outcomes")
    cadence = digest_pb2.Cadence(id="outcomes", name="When told to", external=external)
    await caller.call(caller.digest.PutCadence, digest_pb2.PutCadenceRequest(cadence=cadence))
    await caller.put_subscriber("collecting", types="outcomes/price", cadence="outcomes", path="gone")
    content = timer_pb2.NotificationContent(type="outcomes/price", subscribers=["collecting"], payload="{}")
    notified = [intake_pb2.Notification(content=content, entity=f"house/{number}") for number in (1, 2)]
    request = intake_pb2.NotifyRequest(notifications=notified, wait_for=intake_pb2.WAIT_FOR_APPLIED)
    answer = await caller.call(caller.intake.Notify, request)
    assert answer.is_applied

    async def triggered() -> int:
        trigger = intake_pb2.TriggerBatchRequest(batch="outcomes", wait_for=intake_pb2.WAIT_FOR_APPLIED)
        return int((await caller.call(caller.intake.TriggerBatch, trigger)).windows)

    assert await until(triggered) == 1
    (digest,) = await caller.digests_told("collecting")
    for one_id in (digest.id, *(one.id for one in answer.results)):
        story = await caller.explained(one_id)
        (rendered,) = sentences(story, "digest", "digest_rendered")
        assert "of 2 items for collecting" in rendered
        assert "could not be delivered: gone" in rendered
        (dead,) = sentences(story, "dispatcher", "delivery_dead")
        assert "410 moved away" in dead
