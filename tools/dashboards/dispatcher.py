"""The dispatcher: what leaves, what waits, what failed and why."""

from tools.dashboards.overview import deliveries_late
from tools.dashboards.panels import Dashboard, Row, graph, heat, number, rates, row
from tools.dashboards.shared import calls, quantiles, resources


def _now() -> Row:
    return row(
        "Now",
        number(
            "Late, last hour",
            "Share of deliveries not handed over, nor put off with a reason, within 5 minutes. Allowed: 0.1 %.",
            deliveries_late("1h"),
            unit="percentunit",
            warn=0.001,
            bad=0.0144,
        ),
        number(
            "Oldest delivery waiting",
            "How long the longest-waiting delivery could have been sent.",
            "max(carillon_dispatcher_oldest_queued_seconds{})",
            unit="s",
            warn=60,
            bad=300,
        ),
        number(
            "Waiting or being sent",
            "All channels and replicas.",
            "sum(max by (lane) (carillon_dispatcher_queued_deliveries{}))",
            warn=10000,
            bad=100000,
        ),
        number(
            "Dead letters",
            "Given up or held; they wait for somebody who redrives them or lets them be.",
            "max(carillon_dispatcher_dead_letters{})",
            warn=1,
            bad=1000,
        ),
        number(
            "In doubt, last hour",
            "Attempts of which nobody knows whether they arrived.",
            "sum(increase(carillon_dispatcher_in_doubt_total{}[1h]))",
            warn=1,
            bad=100,
        ),
        number(
            "Destinations left alone",
            "They failed too often in a row; what is for them waits.",
            "sum(carillon_dispatcher_open_breakers{})",
            warn=1,
            bad=10,
        ),
    )


def _traffic() -> Row:
    return row(
        "Traffic",
        graph(
            "Deliveries taken in",
            "By channel.",
            ("sum by (channel) (rate(carillon_dispatcher_deliveries_accepted_total{}[]))", "{{channel}}"),
            unit="si:/s",
            stack=True,
        ),
        rates(
            "Deliveries ended",
            "By outcome.",
            "carillon_dispatcher_deliveries_ended_total",
            by="outcome",
        ),
        graph(
            "Deliveries that were not sent",
            "By reason, the eight most frequent.",
            (
                'topk(8, sum by (reason) (rate(carillon_dispatcher_deliveries_ended_total{outcome!="sent"}[])))',
                "{{reason}}",
            ),
            unit="si:/s",
        ),
        graph(
            "Unsubscribes and bounces",
            "Unsubscribes by result; bounces are addresses that turned out not to exist.",
            ("sum by (result) (rate(carillon_dispatcher_unsubscribes_total{}[]))", "{{result}}"),
            ("sum(rate(carillon_dispatcher_bounces_total{}[]))", "bounces"),
            unit="si:/s",
        ),
    )


def _latency() -> Row:
    return row(
        "Latency",
        heat(
            "Time to hand over",
            "From when a delivery could be sent until it was handed over, ended, or put off with a reason. "
            "The objective is 5 minutes.",
            "carillon_dispatcher_handover_seconds{}",
        ),
        graph(
            "Time to hand over",
            "The same as percentiles.",
            *quantiles("carillon_dispatcher_handover_seconds{}"),
            unit="s",
            log=True,
            limit=300,
        ),
        heat("Time of one attempt", "All channels together.", "carillon_dispatcher_attempt_seconds{}"),
        graph(
            "Mean time of one attempt",
            "By channel; one that is slow alone is its receivers' fault.",
            (
                "sum by (channel) (rate(carillon_dispatcher_attempt_seconds_sum{}[])) / "
                "clamp_min(sum by (channel) (rate(carillon_dispatcher_attempt_seconds_count{}[])), 1e-9)",
                "{{channel}}",
            ),
            unit="s",
            log=True,
        ),
    )


def _backlog() -> Row:
    return row(
        "Backlog",
        graph(
            "Deliveries waiting or being sent",
            "By lane, all replicas.",
            ("max by (lane) (carillon_dispatcher_queued_deliveries{})", "{{lane}}"),
            stack=True,
        ),
        graph(
            "Oldest delivery waiting",
            "By lane. High with few waiting: strict priorities starve LOW ones.",
            ("max by (lane) (carillon_dispatcher_oldest_queued_seconds{})", "{{lane}}"),
            unit="s",
            log=True,
            limit=300,
        ),
        graph(
            "Attempts under way",
            "Of each process.",
            ("carillon_dispatcher_attempts_under_way{}", "{{instance}}"),
        ),
        rates(
            "Held back",
            "Deliveries put off by a rate, or because their destination is left alone; each time counts.",
            "carillon_dispatcher_postponed_total",
            by="reason",
        ),
    )


def _failures() -> Row:
    return row(
        "Failures",
        graph(
            "Attempts that failed",
            "By reason, the eight most frequent.",
            (
                'topk(8, sum by (reason) (rate(carillon_dispatcher_attempts_total{reason!="sent"}[])))',
                "{{reason}}",
            ),
            unit="si:/s",
        ),
        rates(
            "Retries",
            "Attempts put off until a timer comes back, by channel.",
            "carillon_dispatcher_retries_total",
            by="channel",
        ),
        graph(
            "Destinations left alone",
            "By lane, all processes; each finds it out for itself.",
            ("sum by (lane) (carillon_dispatcher_open_breakers{})", "{{lane}}"),
        ),
        rates(
            "Breakers that opened",
            "By lane.",
            "carillon_dispatcher_breaker_openings_total",
            by="lane",
        ),
    )


def _left() -> Row:
    return row(
        "In doubt, dead, held",
        rates(
            "In doubt",
            "After a crash before the record, or because the reply was lost.",
            "carillon_dispatcher_in_doubt_total",
            by="cause",
        ),
        graph(
            "Claims that ran out",
            "Attempts recorded too late: the claim time is too short, or the process stood still.",
            ("sum(rate(carillon_dispatcher_lost_claims_total{}[]))", "lost"),
            unit="si:/s",
        ),
        graph(
            "Dead letters",
            "Dead or held, waiting for somebody.",
            ("max(carillon_dispatcher_dead_letters{})", "dead"),
        ),
        graph(
            "Dead letters in and out",
            "Given up or held, and sent anew.",
            ('sum(rate(carillon_dispatcher_deliveries_ended_total{outcome=~"dead|held"}[]))', "dead"),
            ("sum(rate(carillon_dispatcher_redriven_total{}[]))", "retries"),
            unit="si:/s",
        ),
    )


def dashboard() -> Dashboard:
    """Deliveries and attempts."""
    return Dashboard(
        name="dispatcher",
        title="Dispatcher",
        description="What leaves, what waits, what failed and why.",
        service="dispatcher",
        rows=[
            _now(),
            _traffic(),
            _latency(),
            _backlog(),
            _failures(),
            _left(),
            calls("dispatcher"),
            resources("dispatcher"),
        ],
    )
