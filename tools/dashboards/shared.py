"""What the dashboards of all services have in common: their calls, their links, their resources."""

from tools.dashboards.panels import COMPONENT, Panel, Row, buckets, graph, heat, row

OURS = "INTERNAL|UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|UNIMPLEMENTED|DATA_LOSS"
"""Codes that say that we failed, not the caller."""


def share(part: str, whole: str) -> str:
    """A quotient that is 0, and not nothing, while there is no traffic; none where a metric is missing."""
    return f"({part}) / clamp_min({whole}, 1e-9)"


def quantiles(histogram: str, *, by: str = "") -> list[tuple[str, str]]:
    """Its 50th, 99th and 99.9th percentile; all samples together, not averaged over replicas."""
    grouped = f"le, {by}" if by else "le"
    rates = f"sum by ({grouped}) (rate({buckets(histogram)}))"
    legend = f"{{{{{by}}}}} " if by else ""
    return [
        (f"histogram_quantile({q}, {rates})", legend + name)
        for name, q in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    ]


def failed_calls(by: str = "") -> str:
    """The share of calls that ended by our fault."""
    calls = f"rate(carillon_rpc_requests_total{{%s}}[]) {COMPONENT}{{}}"
    grouped = f"sum by (component) ({calls})" if by else f"sum({calls})"
    return share(grouped % f'code=~"{OURS}"', grouped % "")


def calls(service: str) -> Row:
    """How a service's RPCs go."""
    ours = f'rpc_service="carillon.{service}.v1.{service.title()}Service"'
    requests, failed = (f"rate(carillon_rpc_requests_total{{{ours}{more}}}[])" for more in ("", ', code!="OK"'))
    return row(
        "Calls (gRPC)",
        graph(
            "Calls",
            "The eight most frequent methods.",
            (f"topk(8, sum by (method) ({requests}))", "{{method}}"),
            unit="si:/s",
            stack=True,
        ),
        graph(
            "Calls that failed",
            "The six most frequent status codes. Red: our fault. Orange: limits. Grey: the caller's mistakes.",
            (f"topk(6, sum by (code) ({failed}))", "{{code}}"),
            unit="si:/s",
        ),
        graph(
            "Time to answer",
            "From a call's arrival to its end; of a stream, the whole stream.",
            *quantiles(f"carillon_rpc_duration_seconds{{{ours}}}"),
            unit="s",
            log=True,
        ),
        heat("Time to answer, spread", "All methods together.", f"carillon_rpc_duration_seconds{{{ours}}}"),
    )


def resources(service: str) -> Row:
    """What its processes use, and how they get on with Postgres, NATS and the clock."""
    ours = f'{COMPONENT}{{component="{service}"}}'
    return row("Resources", *_process(ours), *_peers(ours))


def _process(ours: str) -> list[Panel]:
    return [
        graph(
            "Processor",
            "Cores used by each process; one rarely gets beyond one. Rendering processes are not in it.",
            (f"rate(process_cpu_seconds_total{{}}[]) {ours}", "{{instance}}"),
            unit="short",
        ),
        graph(
            "Memory",
            "Resident; against the container's limit it ends in an OOM kill.",
            (f"process_resident_memory_bytes{{}} {ours}", "{{instance}}"),
            unit="bytes",
        ),
        graph(
            "File descriptors in use",
            "Share of the limit; connections are most of them.",
            (f"process_open_fds{{}} / process_max_fds{{}} {ours}", "{{instance}}"),
            unit="percentunit",
            limit=0.8,
        ),
        graph(
            "Up for",
            "How long each process has been running: a saw-tooth is a crash loop.",
            (f"(time() - process_start_time_seconds{{}}) {ours}", "{{instance}}"),
            unit="s",
        ),
    ]


def _peers(ours: str) -> list[Panel]:
    return [
        graph(
            "Postgres connections",
            "Of all replicas. Waiting for one above 0 for long: the pool is too small, or Postgres too slow.",
            (f"sum by (state) (carillon_postgres_pool_connections{{}} {ours})", "{{state}}"),
            (f"sum(carillon_postgres_pool_size{{}} {ours})", "limit"),
            (f"sum(carillon_postgres_pool_waiting{{}} {ours})", "waiting"),
        ),
        graph(
            "Postgres trouble",
            "Transactions ended by a passing error (they are tried again), waits given up, connections made.",
            (f"sum(rate(carillon_postgres_transient_errors_total{{}}[]) {ours})", "failures"),
            (f"sum(rate(carillon_postgres_pool_timeouts_total{{}}[]) {ours})", "timeouts"),
            (f"sum(rate(carillon_postgres_connections_opened_total{{}}[]) {ours})", "opened"),
            unit="si:/s",
        ),
        graph(
            "NATS connected",
            "1 or 0, for each process. Without it nothing leaves; Postgres keeps what is to be sent.",
            (f"carillon_nats_connected{{}} {ours}", "{{instance}}"),
        ),
        graph(
            "Clock beside Postgres's",
            "How far each machine's clock is from the database's, which business time follows.",
            (f"abs(carillon_clock_drift_seconds{{}}) {ours}", "{{instance}}"),
            unit="s",
            limit=1,
        ),
    ]
