"""Wires the dispatcher: the only place that constructs. A new channel is one module and one line in `channels_of`."""

from collections.abc import Mapping

from libs.backoff import Backoff
from libs.history import History
from libs.service import Runtime, Service
from libs.telemetry.logs import get_logger
from services.dispatcher import metrics, rpc
from services.dispatcher.apprise import AppriseChannel
from services.dispatcher.delivery import LANES, Channel
from services.dispatcher.log import LogChannel
from services.dispatcher.loops import SendingLoop
from services.dispatcher.loops_housekeeping import Housekeeping
from services.dispatcher.mail import ListHeaders, no_headers
from services.dispatcher.pipeline import Policy
from services.dispatcher.room import Room
from services.dispatcher.settings import DispatcherSettings, DispatchSettings, UnsubscribeSettings
from services.dispatcher.smtp import SmtpChannel
from services.dispatcher.store_dead_letters import DeadLetterStore
from services.dispatcher.store_deliveries import FORGOTTEN_AT_ONCE, DeliveryStore
from services.dispatcher.store_queue import QueueStore
from services.dispatcher.store_settings import KeyStore
from services.dispatcher.store_suppressions import BounceStore, SuppressionStore
from services.dispatcher.stream import Outcomes, Stream
from services.dispatcher.traffic import Traffic
from services.dispatcher.unsubscribe import Keys, Unsubscribing
from services.dispatcher.unsubscribe_http import KeyFile, UnsubscribeHttp
from services.dispatcher.webhook import WebhookChannel

log = get_logger(__name__)


async def build(runtime: Runtime, settings: DispatcherSettings) -> Service:
    """The dispatcher of one replica. Raises SettingsError when a file that a channel needs cannot be used."""
    metrics.initialise()
    queue, deliveries, keys, suppressions = QueueStore(), DeliveryStore(), KeyStore(), SuppressionStore()
    bounces = BounceStore(times=settings.dispatch.email_bounces)
    signing = signing_of(settings.unsubscribe)
    channels = channels_of(settings, list_headers=list_headers_of(settings.unsubscribe, signing))
    sending = SendingLoop(
        db=runtime.db,
        clock=runtime.clock,
        queue=queue,
        bounces=bounces,
        outcomes=Outcomes(sender=runtime.sender, sequences=deliveries, shards=runtime.shards),
        channels=channels,
        policy=policy_of(settings.dispatch, frozenset(channels)),
        room=room_of(settings.dispatch, apprise=settings.apprise.concurrency),
        traffic=Traffic(settings.traffic),
        settings=settings.dispatch,
        replica=runtime.replica,
    )
    stream = Stream(deliveries=deliveries, clock=runtime.clock, on_work=sending.wake)
    service = rpc.DispatcherRpc(
        db=runtime.db,
        clock=runtime.clock,
        deliveries=deliveries,
        dead_letters=DeadLetterStore(),
        suppressions=suppressions,
        keys=keys,
        on_work=sending.wake,
    )
    housekeeping = Housekeeping(
        db=runtime.db, queue=queue, dead_letters=DeadLetterStore(), keys=keys, bounces=bounces, lanes=LANES
    )
    history = History(
        db=runtime.db,
        forget=deliveries.forget,
        at_once=FORGOTTEN_AT_ONCE,
        clock=runtime.clock,
        retention=settings.dispatch.history_retention,
        forgotten=metrics.FORGOTTEN,
    )
    return Service(
        servicers=[rpc.servicer(service)],
        apply=stream.apply,
        loops={"history": history.run, "housekeeping": housekeeping.run, "sending": sending.run},
        resources=[]
        if signing is None
        else [
            UnsubscribeHttp(
                settings.unsubscribe, keys=signing, db=runtime.db, clock=runtime.clock, suppressions=suppressions
            )
        ],
    )


def signing_of(settings: UnsubscribeSettings) -> Keys | None:
    """The keys of unsubscribe tokens; None when it is off. Raises SettingsError when the file cannot be used."""
    return KeyFile(settings.secret_file).current if settings.base_url and settings.secret_file else None


def list_headers_of(settings: UnsubscribeSettings, keys: Keys | None) -> ListHeaders:
    """How readers of mails get off their lists."""
    if keys is None:
        return no_headers
    return Unsubscribing(base_url=settings.base_url.rstrip("/"), mailto=settings.mailto, keys=keys).headers


def channels_of(settings: DispatcherSettings, *, list_headers: ListHeaders) -> Mapping[str, Channel]:
    """Every way out, by its name in the contract. Deliveries for others are dead as `unsupported`."""
    webhook = WebhookChannel(settings.webhook, connections=settings.dispatch.webhook_concurrency)
    if not webhook.is_signing:
        log.warning("Webhooks are not signed, because there is no secret.")
    channels: dict[str, Channel] = {
        "email": SmtpChannel(settings.smtp, list_headers=list_headers),
        "webhook": webhook,
        "log": LogChannel(write=log.info),
    }
    if settings.apprise.schemas:
        channels["apprise"] = AppriseChannel(settings.apprise)
    return channels


def policy_of(settings: DispatchSettings, channels: frozenset[str]) -> Policy:
    """The rules of the pipeline."""
    return Policy(
        channels=channels,
        max_attempts=settings.max_attempts,
        max_age=settings.max_age,
        max_retry_after=settings.max_retry_after,
        backoff=Backoff(first=settings.backoff_first, longest=settings.backoff_longest),
        doubt={
            "email": settings.email_in_doubt,
            "webhook": settings.webhook_in_doubt,
            "apprise": settings.apprise_in_doubt,
        },
    )


def room_of(settings: DispatchSettings, *, apprise: int) -> Room:
    """Every lane has places, also those that no channel serves, so that what is in them gets its verdict."""
    limits = dict.fromkeys(LANES, settings.claim_deliveries)
    limits |= {
        "email": settings.email_concurrency,
        "webhook": settings.webhook_concurrency,
        "apprise": apprise,
    }
    return Room(limits=limits, per_destination=settings.destination_concurrency)
