"""What must be known beforehand: notification types, cadences, who is told, the timeline, the two schedules."""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import grpc
from carillon.digest.v1 import digest_pb2 as digest
from carillon.digest.v1.digest_pb2_grpc import DigestServiceStub
from carillon.intake.v1 import intake_pb2 as intake
from carillon.intake.v1.intake_pb2_grpc import IntakeServiceStub
from carillon.scheduler.v1 import scheduler_pb2 as scheduler
from carillon.scheduler.v1 import timer_pb2 as timer
from carillon.scheduler.v1.scheduler_pb2_grpc import SchedulerServiceStub
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from local.demo import story
from local.demo.caller import Refused, repeated
from local.demo.flights import airlines
from local.demo.plan import Plan

_EMAIL, _WEBHOOK = digest.CHANNEL_EMAIL, digest.CHANNEL_WEBHOOK
_ZONE = story.NEW_YORK.key
_TAIL = "{{ item.entity.partition('.')[2] }}"

_TYPES = (
    # id, name, cadence of those who chose none
    (story.DELAYED, "A departure is late", story.IMMEDIATE),
    (story.ASKED, "Passengers ask to be rebooked", story.BATCH),
    (story.ANSWERED, "A carrier answers", story.BATCH),
    (story.SUMMARY, "All answers to a request", story.BATCH),
    (story.REMINDER, "A maintenance trial is half over", story.DAILY),
    (story.CHECK, "A busy aircraft is due for a check", story.DAILY),
    (story.FOLLOW_UP, "Look at a checked aircraft again", story.DAILY),
    (story.REPORT, "Weekday report", story.IMMEDIATE),
    (story.REMARK, "Fireworks", story.IMMEDIATE),
)

# What the templates say of an item, and how it is named in brackets after that: there the check finds it again.
_TEXTS = {
    story.DELAYED: ("{{ item.payload.title }}", "{{ item.payload.flight }}"),
    story.ASKED: ("{{ item.payload.payload.title }}", "{{ item.payload.payload.flight }}"),
    story.ANSWERED: ("{{ item.payload.payload.title }}", "{{ item.payload.payload.carrier }}"),
    story.SUMMARY: (
        "{{ item.payload.payload.title }}: {{ item.payload.answers | length }} of"
        " {{ item.payload.answers | length + item.payload.unanswered | length }} answered",
        "{{ item.payload.payload.flight }} {{ item.payload.answers | length }}",
    ),
    story.REMINDER: ("{{ item.entity }}: the trial is half over", _TAIL),
    story.CHECK: ("{{ item.entity }}: due for its check", _TAIL),
    story.FOLLOW_UP: ("{{ item.entity }}: look at it again", _TAIL),
    story.REPORT: ("The weekday report", ""),
    story.REMARK: ("Fireworks over the Hudson", ""),
}
_ROW = '<tr><td class="pad" style="padding:10px 32px;border-top:1px solid #eaecf0;font-size:15px">{text}</td></tr>\n'


async def put_catalog(channel: grpc.aio.Channel, plan: Plan, *, webhook_url: str) -> None:
    """Store everything that the digest service must know."""
    stub = DigestServiceStub(channel)
    for cadence in _cadences():
        await repeated(stub.PutCadence, digest.PutCadenceRequest(cadence=cadence))
    for type_id, name, cadence_id in _TYPES:
        stored = digest.NotificationType(id=type_id, name=name, default_cadence=cadence_id, default_channel=_EMAIL)
        await repeated(stub.PutNotificationType, digest.PutNotificationTypeRequest(notification_type=stored))
    for template in _templates():
        await repeated(stub.PutTemplate, digest.PutTemplateRequest(template=template))
    for subscribers in _thousands(_subscribers(plan, webhook_url)):
        await repeated(stub.PutSubscribers, digest.PutSubscribersRequest(subscribers=subscribers))
    await repeated(stub.PutSubscriptions, digest.PutSubscriptionsRequest(subscriptions=_subscriptions(plan)))


async def put_timeline(channel: grpc.aio.Channel) -> None:
    """Store the maintenance trial."""
    check = _step(story.CHECK, story.CHECK_AFTER, condition=f"facts.flights >= {story.BUSY_FLIGHTS}")
    check.follow_ups.append(_step(story.FOLLOW_UP, story.FOLLOW_UP_AFTER))
    trial = timer.Timeline(name=story.TRIAL, steps=[_step(story.REMINDER, story.REMIND_AFTER), check])
    await repeated(SchedulerServiceStub(channel).PutTimeline, scheduler.PutTimelineRequest(timeline=trial))


async def put_schedules(channel: grpc.aio.Channel) -> Sequence[str]:
    """Schedule the weekday report and the one-off; returns their ids."""
    every_weekday = timer.Recurrence(cron=story.REPORT_CRON, zone=_ZONE)
    once = Timestamp()
    once.FromDatetime(story.REMARK_AT)
    request = intake.ScheduleRequest(
        schedules=[
            intake.Schedule(
                entity=story.REPORT,
                type=story.REPORT,
                recurrence=every_weekday,
                target=_tell(story.REPORT, story.DIRECTOR),
            ),
            intake.Schedule(
                entity=story.REMARK, type=story.REMARK, at_time=once, target=_tell(story.REMARK, story.DIRECTOR)
            ),
        ],
        idempotency_key="demo:schedules",
        wait_for=intake.WAIT_FOR_APPLIED,
    )
    answer = await repeated(IntakeServiceStub(channel).Schedule, request)
    for result in answer.results:
        if result.HasField("error"):
            raise Refused(result.error.message)
    return [result.id for result in answer.results]


def _cadences() -> Iterator[digest.Cadence]:
    yield digest.Cadence(
        id=story.DAILY, name="Daily at 08:00", aligned=digest.AlignedCadence(cron="0 8 * * *", zone="")
    )
    yield digest.Cadence(
        id=story.FOUR_HOURLY, name="Every four hours", aligned=digest.AlignedCadence(cron="0 */4 * * *", zone="")
    )
    yield digest.Cadence(id=story.BATCH, name="With each batch", external=digest.ExternalCadence(batch=story.BATCH))


def _templates() -> Iterator[digest.Template]:
    """Plain text for every type. Mails' HTML is built in, but for the batch, whose payloads are nested."""
    for type_id, (text, ref) in _TEXTS.items():
        style = digest.STYLE_FULL if type_id in (story.REPORT, story.REMARK) else digest.STYLE_SUMMARY
        body = f"- {text} [{{{{ item.type }}}}{ref and f' {ref}'}]\n"
        yield digest.Template(id=type_id, format=digest.FORMAT_TEXT, style=style, body=body)
        if type_id.startswith(story.BATCH):
            yield digest.Template(id=type_id, format=digest.FORMAT_HTML, style=style, body=_ROW.format(text=text))


def _subscribers(plan: Plan, webhook_url: str) -> list[digest.Subscriber]:
    names = airlines()
    mailed = [
        *(story.carrier_manager(carrier) for carrier in plan.carriers if carrier in names),
        *(story.airport_manager(airport) for airport in story.AIRPORTS),
        *(story.desk(carrier) for carrier in plan.carriers),
        *(story.passenger(flight) for flight in plan.passengers),
        story.DEPUTY,
        story.MAINTENANCE,
        story.DIRECTOR,
    ]
    return [
        *(digest.Subscriber(id=one, zone=_ZONE, locale="en", email=story.address(one)) for one in mailed),
        digest.Subscriber(id=story.FEED, zone=_ZONE, locale="en", webhook_url=webhook_url),
    ]


def _subscriptions(plan: Plan) -> list[digest.Subscription]:
    return [
        *(
            _subscription(story.carrier_manager(carrier), f"carrier:{carrier}", story.DAILY, _EMAIL)
            for carrier in plan.carriers
        ),
        *(
            _subscription(story.airport_manager(airport), f"origin:{airport}", story.FOUR_HOURLY, _EMAIL)
            for airport in story.AIRPORTS
        ),
        *(_subscription(story.FEED, f"origin:{airport}", story.IMMEDIATE, _WEBHOOK) for airport in story.AIRPORTS),
        _subscription(story.DEPUTY, f"origin:{story.DEPUTY_AIRPORT}", story.OFF, _EMAIL),
    ]


def _subscription(subscriber: str, topic: str, cadence: str, channel: digest.Channel.ValueType) -> digest.Subscription:
    return digest.Subscription(
        id=f"{subscriber}/{topic}",
        subscriber=subscriber,
        type=story.DELAYED,
        topic=topic,
        choices=[digest.Choice(cadence=cadence, channel=channel)],
    )


def _step(type_id: str, offset: timedelta, *, condition: str = "") -> timer.TimelineStep:
    return timer.TimelineStep(
        name=type_id.rpartition("/")[2],
        offset=_duration(offset),
        condition=timer.Condition(cel=condition) if condition else None,
        target=_tell(type_id, story.MAINTENANCE),
    )


def _tell(type_id: str, subscriber: str) -> timer.Target:
    return timer.Target(notification=timer.NotificationContent(type=type_id, subscribers=[subscriber], payload="{}"))


def _duration(value: timedelta) -> Duration:
    return Duration(seconds=int(value.total_seconds()))


def _thousands(subscribers: Sequence[digest.Subscriber]) -> Iterator[Sequence[digest.Subscriber]]:
    return (subscribers[at : at + 1000] for at in range(0, len(subscribers), 1000))
