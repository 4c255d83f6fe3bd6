"""Intake: what comes in, how fast it is answered, what is refused."""

from tools.dashboards.panels import COMPONENT, Dashboard, Row, graph, number, rates, row
from tools.dashboards.shared import OURS, calls, resources, share

_CALLS = 'rpc_service="carillon.intake.v1.IntakeService"'
_FAILED = share(
    f'sum(rate(carillon_rpc_requests_total{{{_CALLS}, code=~"{OURS}"}}[1h]))',
    f"sum(rate(carillon_rpc_requests_total{{{_CALLS}}}[1h]))",
)
_SLOWEST = f"histogram_quantile(0.99, sum by (le) (rate(carillon_rpc_duration_seconds_bucket{{{_CALLS}}}[5m])))"
_LINKS = f'{COMPONENT}{{component="intake"}}'


def _now() -> Row:
    return row(
        "Now",
        number(
            "Failed by our fault, last hour",
            "Share of calls.",
            _FAILED,
            unit="percentunit",
            warn=0.001,
            bad=0.01,
        ),
        number(
            "99 of 100 answered within",
            "Over five minutes; with wait_for APPLIED it is the way through the other services too.",
            _SLOWEST,
            unit="s",
            warn=1,
            bad=5,
        ),
        number(
            "Calls under way",
            "All replicas.",
            f"sum(carillon_rpc_in_flight{{{_CALLS}}})",
            warn=500,
            bad=5000,
        ),
        number(
            "Limited, last hour",
            "Calls refused because of their tenant's rate or backlog.",
            "sum(increase(carillon_intake_limited_calls_total{}[1h]))",
            warn=1,
            bad=1000,
        ),
        number(
            "Oldest frame not applied",
            "Accepted here, not yet applied by scheduler or digest.",
            f"max(carillon_link_oldest_unconfirmed_seconds{{}} {_LINKS})",
            unit="s",
            warn=10,
            bad=60,
            to="links",
        ),
        number(
            "Frames not applied",
            "New commands are refused at 100,000 for one link (a setting).",
            f"max(carillon_link_unconfirmed_frames{{}} {_LINKS})",
            warn=10000,
            bad=50000,
            to="links",
        ),
    )


def _traffic() -> Row:
    return row(
        "Traffic",
        graph(
            "Items accepted",
            "The eight most frequent methods; a call may hold 1,000 items.",
            (
                'topk(8, sum by (method) (rate(carillon_intake_items_total{outcome="accepted"}[])))',
                "{{method}}",
            ),
            unit="si:/s",
            stack=True,
        ),
        graph(
            "Items refused",
            "The callers' mistakes, by method.",
            ('topk(8, sum by (method) (rate(carillon_intake_items_total{outcome="refused"}[])))', "{{method}}"),
            unit="si:/s",
        ),
        graph(
            "Batches of streams under way",
            "Of each process.",
            ("carillon_intake_stream_batches{}", "{{instance}}"),
        ),
        rates(
            "Requests that ended",
            "With answers (closed), without (expired), or withdrawn.",
            "carillon_intake_closed_requests_total",
            by="state",
        ),
    )


def _backlog() -> Row:
    return row(
        "Backlog and failures",
        graph(
            "Frames not applied",
            "By receiver.",
            (f"max by (receiver) (carillon_link_unconfirmed_frames{{}} {_LINKS})", "{{receiver}}"),
        ),
        graph(
            "Oldest frame not applied",
            "By receiver.",
            (f"max by (receiver) (carillon_link_oldest_unconfirmed_seconds{{}} {_LINKS})", "{{receiver}}"),
            unit="s",
            log=True,
            limit=60,
        ),
        rates(
            "Limited calls",
            "Refused because of their tenant's rate or backlog.",
            "carillon_intake_limited_calls_total",
            by="limit",
        ),
        graph(
            "Repeated, and answered early",
            "Answered from their idempotency key; answered before they were applied; keys and requests forgotten.",
            ("sum(rate(carillon_intake_repeated_calls_total{}[]))", "repeated"),
            ("sum(rate(carillon_intake_not_yet_applied_total{}[]))", "not yet applied"),
            ("sum(rate(carillon_intake_pruned_keys_total{}[]))", "forgotten"),
            ("sum(rate(carillon_intake_forgotten_requests_total{}[]))", "forgotten requests"),
            unit="si:/s",
        ),
    )


def dashboard() -> Dashboard:
    """Commands and calls."""
    return Dashboard(
        name="intake",
        title="Intake",
        description="What comes in, how fast it is answered, what is refused.",
        service="intake",
        rows=[_now(), calls("intake"), _traffic(), _backlog(), resources("intake")],
    )
