"""Digest: what is told to whom, which windows wait, and whether everything is accounted for."""

from tools.dashboards.panels import Dashboard, Row, graph, heat, number, rates, row
from tools.dashboards.shared import calls, quantiles, resources


def _now() -> Row:
    return row(
        "Now",
        number(
            "Unaccounted",
            "Items, notifications and deliveries that are missing, or there and should not be. Must be 0.",
            "max(carillon_digest_unaccounted{})",
            bad=1,
        ),
        number(
            "Last check was",
            "How old what Unaccounted does not show yet may be.",
            "min(carillon_digest_unaccounted_age_seconds{})",
            unit="s",
            warn=3600,
            bad=21600,
        ),
        number(
            "Timer overdue",
            "An open or held window whose time has come, but not its timer: look at the scheduler and its link.",
            'max(carillon_digest_overdue_seconds{state=~"open|held"})',
            unit="s",
            warn=30,
            bad=300,
        ),
        number(
            "Rendering overdue",
            "A window that waits to be rendered: look at processor, templates and formatting services.",
            'max(carillon_digest_overdue_seconds{state="closing"})',
            unit="s",
            warn=30,
            bad=300,
        ),
        number(
            "Oldest batch window",
            "Since the oldest window that waits for its batch's trigger was opened.",
            "max(carillon_digest_oldest_batch_window_seconds{})",
            unit="s",
            warn=86400,
            bad=172800,
        ),
        number(
            "Batches missed, last day",
            "Windows closed by their fallback, because their batch's trigger never came.",
            'sum(increase(carillon_digest_batch_windows_total{cause="fallback"}[1d]))',
            bad=1,
        ),
    )


def _traffic() -> Row:
    return row(
        "Traffic",
        graph(
            "Notifications and windows",
            "Notifications taken over, and windows opened for their items.",
            ("sum(rate(carillon_digest_notifications_total{}[]))", "accepted"),
            ("sum(rate(carillon_digest_windows_opened_total{}[]))", "opened"),
            unit="si:/s",
        ),
        rates(
            "Items",
            "By the state they entered.",
            "carillon_digest_items_total",
            by="state",
        ),
        graph(
            "Items that were not told",
            "By reason.",
            (
                'sum by (reason) (rate(carillon_digest_items_total{state="suppressed"}[]))',
                "{{reason}}",
            ),
            unit="si:/s",
        ),
        rates(
            "Windows closed",
            "By what came of them.",
            "carillon_digest_rendered_total",
            by="result",
        ),
    )


def _triggers() -> Row:
    return row(
        "Batches, outcomes, history",
        rates(
            "Batches",
            "Windows that began to close: on their batch's trigger, or without it, by their fallback.",
            "carillon_digest_batch_windows_total",
            by="cause",
        ),
        rates(
            "Triggers",
            "New runs, and the same again.",
            "carillon_digest_batch_runs_total",
            by="result",
        ),
        rates(
            "What the dispatcher reported",
            "Outcomes of deliveries.",
            "carillon_digest_delivery_outcomes_total",
            by="outcome",
        ),
        rates(
            "History deleted",
            "Rows that had been kept for their retention.",
            "carillon_digest_forgotten_total",
            by="what",
        ),
    )


def _latency() -> Row:
    return row(
        "Latency",
        heat(
            "Time to close windows",
            "A batch of them: claim, render, hand over, commit.",
            "carillon_digest_render_seconds{}",
        ),
        graph(
            "Time to close windows",
            "The same as percentiles.",
            *quantiles("carillon_digest_render_seconds{}"),
            unit="s",
            log=True,
        ),
        heat("Items in a window", "When it was closed.", "carillon_digest_window_items{}", unit="short"),
        graph(
            "Time to format",
            "What business services took for a request, repetitions included.",
            *quantiles("carillon_digest_formatting_seconds{}"),
            unit="s",
            log=True,
        ),
    )


def _backlog() -> Row:
    return row(
        "Backlog",
        graph(
            "Open windows",
            "They take items, by what closes them.",
            ("max by (kind) (carillon_digest_open_windows{})", "{{kind}}"),
            stack=True,
        ),
        graph(
            "Closing windows",
            "They wait to be rendered; held ones for the end of quiet hours, which is no fault.",
            ("max(carillon_digest_closing_windows{})", "closing"),
            ("max(carillon_digest_held_windows{})", "held"),
            ("sum(carillon_digest_formatting_windows{})", "waiting"),
        ),
        graph(
            "Overdue by",
            "Open, held: the timer has not come. Closing: not rendered yet.",
            ("max by (state) (carillon_digest_overdue_seconds{})", "{{state}}"),
            unit="s",
            log=True,
            limit=300,
        ),
        graph(
            "Oldest batch window",
            "Comes down with each trigger.",
            ("max(carillon_digest_oldest_batch_window_seconds{})", "external"),
            unit="s",
        ),
    )


def _failures() -> Row:
    return row(
        "Failures",
        graph(
            "Rendering",
            "Written by another template than meant; filters that could not decide; renderers killed.",
            ("sum(rate(carillon_digest_template_failures_total{}[]))", "template failures"),
            ("sum(rate(carillon_digest_filter_errors_total{}[]))", "filter errors"),
            ("sum(rate(carillon_digest_press_jams_total{}[]))", "jams"),
            unit="si:/s",
        ),
        rates(
            "Requests to formatting services",
            "Not asked: left alone for a while after failures, or not registered.",
            "carillon_digest_formatting_requests_total",
            by="result",
        ),
        rates(
            "Items in a format",
            "Written by the service now (asked) or before (cached), or by a template for it (fallback).",
            "carillon_digest_formatted_items_total",
            by="result",
        ),
        graph(
            "The ledger",
            "Items by state, and notifications, as the last complete round of checks counted them.",
            ("max by (state) (carillon_digest_ledger_items{})", "{{state}}"),
            ("max(carillon_digest_ledger_notifications{})", "notifications"),
            ("max(carillon_digest_unaccounted{})", "lost"),
        ),
    )


def dashboard() -> Dashboard:
    """Windows, digests and the ledger."""
    return Dashboard(
        name="digest",
        title="Digest",
        description="What is told to whom; which windows wait; whether everything is accounted for.",
        service="digest",
        rows=[
            _now(),
            _traffic(),
            _triggers(),
            _latency(),
            _backlog(),
            _failures(),
            calls("digest"),
            resources("digest"),
        ],
    )
