"""The links between services: frames on their way through Postgres and NATS, and what stands in their way."""

from tools.dashboards.panels import COMPONENT, Dashboard, Row, Series, graph, heat, listing, number, rates, row
from tools.dashboards.shared import quantiles

_OF = f"{COMPONENT}{{}}"


def _rate(metric: str, other: str, legend: str) -> Series:
    return f"sum by (component, {other}) (rate({metric}{{}}[]) {_OF})", legend


def _sent(metric: str) -> Series:
    return _rate(metric, "receiver", "{{component}} → {{receiver}}")


def _received(metric: str) -> Series:
    return _rate(metric, "sender", "{{sender}} → {{component}}")


def _now() -> Row:
    return row(
        "Now",
        number(
            "Oldest frame on its way",
            "Committed by one service, not yet applied by the other.",
            "max(carillon_link_oldest_unconfirmed_seconds{})",
            unit="s",
            warn=10,
            bad=60,
        ),
        number(
            "Frames on their way",
            "All links.",
            f"sum(max by (component, receiver) (carillon_link_unconfirmed_frames{{}} {_OF}))",
            warn=10000,
            bad=50000,
        ),
        number(
            "Dead frames",
            "Put aside by their receiver, and not redriven.",
            f"sum(max by (component) (carillon_link_dead_frames_kept{{}} {_OF}))",
            bad=1,
        ),
        number(
            "Published again, last hour",
            "Frames whose receipt did not come in time. Harmless alone; many mean a slow or absent receiver.",
            "sum(increase(carillon_link_republished_frames_total{}[1h]))",
            warn=1000,
            bad=100000,
        ),
        number(
            "Processes without NATS",
            "What they commit waits in Postgres.",
            "count(carillon_nats_connected{}) - sum(carillon_nats_connected{})",
            bad=1,
        ),
        number(
            "Streams missing",
            "JetStream streams that were not there at somebody's last look.",
            "count(carillon_jetstream_stream_present{}) - sum(carillon_jetstream_stream_present{})",
            bad=1,
        ),
    )


def _traffic() -> Row:
    return row(
        "Traffic",
        graph(
            "Frames published",
            "Taken over by JetStream.",
            _sent("carillon_link_published_frames_total"),
            unit="si:/s",
        ),
        graph(
            "Frames applied",
            "For the first time.",
            _received("carillon_link_applied_frames_total"),
            unit="si:/s",
        ),
        graph(
            "Entries applied",
            "What the frames held: up to 1,000 each.",
            _received("carillon_link_applied_entries_total"),
            unit="si:/s",
        ),
        graph(
            "Frames confirmed",
            "Deleted on their receipt.",
            _sent("carillon_link_confirmed_frames_total"),
            unit="si:/s",
        ),
    )


def _latency() -> Row:
    return row(
        "Latency",
        heat("Time on the way", "From a frame's making to its application.", "carillon_link_delay_seconds{}"),
        graph(
            "Time on the way",
            "By sender: the 99th percentile, and half of the frames.",
            *quantiles("carillon_link_delay_seconds{}", by="sender")[:2],
            unit="s",
            log=True,
        ),
        heat("Time to apply", "What one fetch gave, commit included.", "carillon_link_apply_seconds{}"),
        graph(
            "Time to apply",
            "All receivers.",
            *quantiles("carillon_link_apply_seconds{}"),
            unit="s",
            log=True,
        ),
    )


def _backlog() -> Row:
    way = "{{component}} → {{receiver}}"
    unconfirmed = f"max by (component, receiver) (carillon_link_%s{{}} {_OF})"
    return row(
        "Backlog",
        graph(
            "Frames on their way",
            "Committed, and without a receipt.",
            (unconfirmed % "unconfirmed_frames", way),
        ),
        graph(
            "Oldest frame on its way",
            "Climbs with a slope of 1 while its receiver is away.",
            (unconfirmed % "oldest_unconfirmed_seconds", way),
            unit="s",
            log=True,
            limit=60,
        ),
        graph(
            "Dead frames",
            "Kept by their receiver until somebody redrives them.",
            (f"max by (component) (carillon_link_dead_frames_kept{{}} {_OF})", "{{component}}"),
            limit=1,
        ),
        graph(
            "Postgres connections in use",
            "Share of each service's pools; at 100 % everything waits.",
            (
                f'sum by (component) (carillon_postgres_pool_connections{{state="in_use"}} {_OF}) / '
                f"sum by (component) (carillon_postgres_pool_size{{}} {_OF})",
                "{{component}}",
            ),
            unit="percentunit",
            limit=0.9,
        ),
    )


def _failures() -> Row:
    return row(
        "Failures",
        graph(
            "Published again",
            "Their receipt did not come in time.",
            _sent("carillon_link_republished_frames_total"),
            unit="si:/s",
        ),
        graph(
            "Not taken by JetStream",
            "They wait in Postgres and are published again.",
            _sent("carillon_link_publish_failures_total"),
            unit="si:/s",
        ),
        graph(
            "Handed back",
            "After a passing failure of the receiver, such as Postgres.",
            _received("carillon_link_deferred_frames_total"),
            unit="si:/s",
        ),
        graph(
            "Put aside",
            "Frames that became dead.",
            _received("carillon_link_dead_frames_total"),
            unit="si:/s",
        ),
    )


def _peers() -> Row:
    return row(
        "Repetitions, NATS, traces",
        graph(
            "Came again",
            "Frames that had been applied before, and had no effects.",
            _received("carillon_link_duplicate_frames_total"),
            unit="si:/s",
        ),
        graph(
            "Connections to NATS lost and found",
            "Connections after each process's first.",
            (f"sum by (component) (rate(carillon_nats_reconnects_total{{}}[]) {_OF})", "{{component}}"),
            unit="si:/s",
        ),
        rates(
            "Spans of traces",
            "Taken by the collector, or not. None where no traces are made.",
            "carillon_trace_spans_total",
            by="result",
        ),
        listing(
            "Streams",
            "Whether each was there at the last look: 1 or 0.",
            "min by (stream) (carillon_jetstream_stream_present{})",
            ("stream",),
            value="there",
            unit="short",
        ),
    )


def _clocks() -> Row:
    def worst(metric: str) -> Series:
        return f"max by (component) (abs(carillon_clock_{metric}{{}}) {_OF})", "{{component}}"

    return row(
        "Clocks",
        graph(
            "Beside Postgres's",
            "How far each machine's own clock is from the database's. Business time follows the database.",
            worst("drift_seconds"),
            unit="s",
            log=True,
            limit=1,
        ),
        graph(
            "Corrected by",
            "How far business time had gone off since the measurement before.",
            worst("correction_seconds"),
            unit="s",
            log=True,
        ),
        graph(
            "Known no better than",
            "Half of a round trip to Postgres: where it is high, Postgres is slow for everything.",
            worst("uncertainty_seconds"),
            unit="s",
            log=True,
        ),
        graph("Last measured", "Every 10 s, unless Postgres is away.", worst("age_seconds"), unit="s", limit=60),
    )


def dashboard() -> Dashboard:
    """Frames between services."""
    return Dashboard(
        name="links",
        title="Links",
        description="Frames between services, on their way through Postgres and NATS, and what stands in their way.",
        rows=[_now(), _traffic(), _latency(), _backlog(), _failures(), _peers(), _clocks()],
    )
