"""The first thing to open: is anything late, lost or stuck? Every number leads to the dashboard that says more."""

from collections.abc import Callable

from tools.dashboards.panels import COMPONENT, Dashboard, Panel, Row, Series, graph, heat, listing, number, row
from tools.dashboards.shared import failed_calls, share

_BUDGET = 0.001
"""The share that may be late, of both objectives."""
_ALLOWED, _TOO_FAST = 1, 14.4
"""How fast a budget burns: so that it lasts for its 30 days; so that 2 % of it are gone within an hour."""
_WITH_VERSION = COMPONENT.replace("(component)", "(component, version)")


def late(histogram: str, within: str, over: str) -> str:
    """The share of a histogram's observations beyond a bound."""
    every = f"sum(rate({histogram}_count{{}}[{over}]))"
    in_time = f'sum(rate({histogram}_bucket{{le="{within}"}}[{over}]))'
    return share(f"{every} - {in_time}", every)


def timers_late(over: str) -> str:
    """The share of timers that fired more than a second after they were due."""
    return late("carillon_scheduler_lateness_seconds", "1.0", over)


def deliveries_late(over: str) -> str:
    """The share of deliveries that were handed over, or put off with a reason, after more than five minutes."""
    return late("carillon_dispatcher_handover_seconds", "300.0", over)


def _burning(what: Callable[[str], str]) -> list[Series]:
    return [(f"{what(over)} / {_BUDGET}", f"over {over}") for over in ("5m", "1h", "6h")]


def _is_late() -> Row:
    return row(
        "Late?",
        number(
            "Timers: budget burning",
            "Objective: 99.9 % fire within 1 s. How many times faster than allowed the last hour burned.",
            f"{timers_late('1h')} / {_BUDGET}",
            to="scheduler",
            unit="suffix:×",
            warn=_ALLOWED,
            bad=_TOO_FAST,
        ),
        number(
            "Deliveries: budget burning",
            "Objective: 99.9 % are handed over within 5 minutes, or put off with a reason. As beside.",
            f"{deliveries_late('1h')} / {_BUDGET}",
            to="dispatcher",
            unit="suffix:×",
            warn=_ALLOWED,
            bad=_TOO_FAST,
        ),
        *_ages(),
    )


def _ages() -> list[Panel]:
    return [
        number(
            "Timers are late by",
            "How far the latest shard is behind the clock.",
            "max(carillon_scheduler_watermark_lag_seconds{})",
            unit="s",
            warn=1,
            bad=5,
            to="scheduler",
        ),
        number(
            "Digests are overdue by",
            "The window longest past its time: its timer has not come, or it waits to be rendered.",
            "max(carillon_digest_overdue_seconds{})",
            unit="s",
            warn=30,
            bad=300,
            to="digest",
        ),
        number(
            "Oldest delivery waiting",
            "How long the longest-waiting delivery could have been sent.",
            "max(carillon_dispatcher_oldest_queued_seconds{})",
            unit="s",
            warn=60,
            bad=300,
            to="dispatcher",
        ),
        number(
            "Oldest frame on its way",
            "Between two services: committed by the one, not yet applied by the other.",
            "max(carillon_link_oldest_unconfirmed_seconds{})",
            unit="s",
            warn=10,
            bad=60,
            to="links",
        ),
    ]


def _is_lost() -> Row:
    return row(
        "Lost?",
        number(
            "Unaccounted",
            "Items, notifications and deliveries that are missing, or there and should not be. Must be 0.",
            "max(carillon_digest_unaccounted{})",
            bad=1,
            to="digest",
        ),
        number(
            "Dead frames",
            "Frames that a service could not apply and put aside, and nobody has redriven.",
            f"sum(max by (component) (carillon_link_dead_frames_kept{{}} {COMPONENT}{{}}))",
            bad=1,
            to="links",
        ),
        number(
            "Dead letters",
            "Deliveries that were given up or are held, and wait for somebody.",
            "max(carillon_dispatcher_dead_letters{})",
            warn=1,
            bad=1000,
            to="dispatcher",
        ),
        number(
            "In doubt, last hour",
            "Attempts of which nobody knows whether they arrived.",
            "sum(increase(carillon_dispatcher_in_doubt_total{}[1h]))",
            warn=1,
            bad=100,
            to="dispatcher",
        ),
        number(
            "Batches missed, last day",
            "Windows that closed by their fallback, because their batch's trigger never came.",
            'sum(increase(carillon_digest_batch_windows_total{cause="fallback"}[1d]))',
            bad=1,
            to="digest",
        ),
        number(
            "Digests not rendered, last hour",
            "Windows whose items are dead, because not even the built-in template could write them.",
            'sum(increase(carillon_digest_rendered_total{result="dead"}[1h]))',
            bad=1,
            to="digest",
        ),
    )


def _is_stuck() -> Row:
    return row(
        "Stuck?",
        number(
            "Shards without holder",
            "Nobody fires their timers. A few for the length of a lease (5 s) after a scheduler died.",
            "max(carillon_scheduler_shards_unheld{})",
            bad=1,
            to="scheduler",
        ),
        number(
            "Schedulers that hold back",
            "They fire nothing, because a link or the backlog of events is full.",
            "sum(carillon_scheduler_firing_paused{})",
            bad=1,
            to="scheduler",
        ),
        number(
            "Destinations left alone",
            "They failed too often in a row; what is for them waits.",
            "sum(carillon_dispatcher_open_breakers{})",
            warn=1,
            bad=10,
            to="dispatcher",
        ),
        number(
            "Processes without NATS",
            "What they commit waits in Postgres.",
            "count(carillon_nats_connected{}) - sum(carillon_nats_connected{})",
            bad=1,
            to="links",
        ),
        number(
            "Streams missing",
            "JetStream streams that were not there at somebody's last look.",
            "count(carillon_jetstream_stream_present{}) - sum(carillon_jetstream_stream_present{})",
            bad=1,
            to="links",
        ),
        number(
            "Services up",
            "Of intake, scheduler, digest and dispatcher, those that answer Prometheus.",
            "count(count by (component) (carillon_build_info{}))",
            bad=4,
            below=True,
        ),
    )


def _objectives() -> Row:
    return row(
        "Objectives",
        graph(
            "Timers: how fast the budget burns",
            "1 is as fast as it may. Page: 5 m and 1 h above 14.4. Ticket: 6 h above 1.",
            *_burning(timers_late),
            unit="suffix:×",
            log=True,
            limit=_TOO_FAST,
        ),
        graph(
            "Deliveries: how fast the budget burns",
            "As beside, for deliveries.",
            *_burning(deliveries_late),
            unit="suffix:×",
            log=True,
            limit=_TOO_FAST,
        ),
        heat("How late timers fire", "The objective is 1 s.", "carillon_scheduler_lateness_seconds{}"),
        heat(
            "How long deliveries wait",
            "Until they were handed over, ended, or put off with a reason. The objective is 5 minutes.",
            "carillon_dispatcher_handover_seconds{}",
        ),
    )


def _flow() -> Row:
    return row(
        "Flow",
        graph(
            "What each service got done",
            "Items accepted, timers fired, items sent on in digests or alone, deliveries sent.",
            ('sum(rate(carillon_intake_items_total{outcome="accepted"}[]))', "intake"),
            ("sum(rate(carillon_scheduler_timers_fired_total{}[]))", "scheduler"),
            ('sum(rate(carillon_digest_items_total{state=~"digested|sent_alone"}[]))', "digest"),
            ('sum(rate(carillon_dispatcher_deliveries_ended_total{outcome="sent"}[]))', "dispatcher"),
            unit="si:/s",
        ),
        graph(
            "What became of deliveries",
            "By outcome.",
            ("sum by (outcome) (rate(carillon_dispatcher_deliveries_ended_total{}[]))", "{{outcome}}"),
            ("sum(rate(carillon_dispatcher_retries_total{}[]))", "retries"),
            unit="si:/s",
        ),
        graph(
            "Calls that failed by our fault",
            "Share of all calls, by service.",
            (failed_calls("component"), "{{component}}"),
            unit="percentunit",
            limit=0.01,
        ),
        graph(
            "Oldest of everything that waits",
            "Each age must come down again by itself. One that only climbs is stuck.",
            ("max(carillon_scheduler_watermark_lag_seconds{})", "scheduler: timer due"),
            ("max(carillon_scheduler_oldest_unconfirmed_event_seconds{})", "event not published"),
            ("max(carillon_link_oldest_unconfirmed_seconds{})", "frame on its way"),
            ("max(carillon_digest_overdue_seconds{})", "digest: window overdue"),
            ("max(carillon_dispatcher_oldest_queued_seconds{})", "dispatcher: delivery waiting"),
            unit="s",
            log=True,
        ),
    )


def _processes() -> Row:
    return row(
        "Processes",
        listing(
            "What runs",
            "Several versions at once are normal during a rollout only.",
            f"(time() - process_start_time_seconds{{}}) {_WITH_VERSION}{{}}",
            ("component", "version", "instance"),
            value="up for",
            unit="s",
        ),
        graph(
            "Processor",
            "Cores, all replicas of a service together.",
            (f"sum by (component) (rate(process_cpu_seconds_total{{}}[]) {COMPONENT}{{}})", "{{component}}"),
            stack=True,
        ),
        graph(
            "Memory",
            "Resident, all replicas of a service together.",
            (f"sum by (component) (process_resident_memory_bytes{{}} {COMPONENT}{{}})", "{{component}}"),
            unit="bytes",
            stack=True,
        ),
        graph(
            "Clocks beside Postgres's",
            "The worst of each service. Leases and claims do not depend on it; business time follows Postgres.",
            (f"max by (component) (abs(carillon_clock_drift_seconds{{}}) {COMPONENT}{{}})", "{{component}}"),
            unit="s",
            limit=1,
        ),
    )


def dashboard() -> Dashboard:
    """All services at a glance."""
    return Dashboard(
        name="overview",
        title="Overview",
        description="Is anything late, lost or stuck? All green: no. Numbers link to the dashboards that say more.",
        rows=[_is_late(), _is_lost(), _is_stuck(), _objectives(), _flow(), _processes()],
    )
