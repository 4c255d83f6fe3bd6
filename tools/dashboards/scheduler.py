"""The scheduler: when timers fire, who holds which shards, what waits."""

from tools.dashboards.overview import timers_late
from tools.dashboards.panels import Dashboard, Row, graph, heat, number, rates, row
from tools.dashboards.shared import calls, quantiles, resources


def _now() -> Row:
    return row(
        "Now",
        number(
            "Late, last hour",
            "Share of timers that fired more than 1 s after they were due. The objective allows 0.1 %.",
            timers_late("1h"),
            unit="percentunit",
            warn=0.001,
            bad=0.0144,
        ),
        number(
            "Late by",
            "How far the latest shard is behind the clock.",
            "max(carillon_scheduler_watermark_lag_seconds{})",
            unit="s",
            warn=1,
            bad=5,
        ),
        number(
            "Shards without holder",
            "Nobody fires their timers. A few for the length of a lease (5 s) after a scheduler died.",
            "max(carillon_scheduler_shards_unheld{})",
            bad=1,
        ),
        number(
            "Holding back",
            "Schedulers that fire nothing, because a link or the backlog of events is full.",
            "sum(carillon_scheduler_firing_paused{})",
            bad=1,
        ),
        number(
            "Failed turns, last hour",
            "Transactions of the engine that did not commit; their shards are built anew.",
            'sum(increase(carillon_scheduler_turns_total{result="failed"}[1h]))',
            warn=1,
            bad=100,
        ),
        number(
            "Live schedulers",
            "Replicas that share the shards.",
            "max(carillon_scheduler_live_replicas{})",
            bad=1,
            below=True,
        ),
    )


def _traffic() -> Row:
    return row(
        "Traffic",
        graph(
            "Timers fired",
            "By what they do: tell people, publish an event, close a window, end a request, retry a delivery.",
            ("sum by (target) (rate(carillon_scheduler_timers_fired_total{}[]))", "{{target}}"),
            unit="si:/s",
            stack=True,
        ),
        rates(
            "Timers that ended without firing",
            "By state; done counts reported events.",
            "carillon_scheduler_timers_decided_total",
            by="state",
        ),
        rates(
            "Timers skipped",
            "By reason: missed while nobody ran, an overlapping occurrence, a condition, a service's answer.",
            "carillon_scheduler_timers_skipped_total",
            by="reason",
        ),
        graph(
            "Timers in and out",
            "Stored (successors and follow-ups included), due, and deleted after their retention.",
            ("sum(rate(carillon_scheduler_timers_accepted_total{}[]))", "accepted"),
            ("sum(rate(carillon_scheduler_timers_due_total{}[]))", "due"),
            ("sum(rate(carillon_scheduler_timers_forgotten_total{}[]))", "forgotten"),
            unit="si:/s",
        ),
    )


def _latency() -> Row:
    return row(
        "Latency",
        heat(
            "How late timers fire",
            "From the due time to the commit. The objective is 1 s.",
            "carillon_scheduler_lateness_seconds{}",
        ),
        graph(
            "How late timers fire",
            "The same as percentiles.",
            *quantiles("carillon_scheduler_lateness_seconds{}"),
            unit="s",
            log=True,
            limit=1,
        ),
        graph(
            "Behind the clock",
            "The latest shard of each replica. One high: that replica. All: Postgres, or a herd of timers.",
            ("carillon_scheduler_watermark_lag_seconds{}", "{{instance}}"),
            unit="s",
            log=True,
            limit=1,
        ),
        graph(
            "Time to an answer",
            "From asking a business service about a condition to its answer, or to giving up.",
            *quantiles("carillon_scheduler_answer_seconds{}"),
            unit="s",
            log=True,
        ),
    )


def _backlog() -> Row:
    return row(
        "Backlog",
        graph(
            "Timers in the wheels",
            "Read ahead, of each replica. The rest waits in Postgres.",
            ("carillon_scheduler_wheel_timers{}", "{{instance}}"),
        ),
        graph(
            "Frames waiting for their shard",
            "In memory. At the setting's limit JetStream keeps the others.",
            ("carillon_scheduler_mailbox_frames{}", "{{instance}}"),
        ),
        graph(
            "Events not yet published",
            "Committed, and not acknowledged by JetStream.",
            ("max(carillon_scheduler_events_unconfirmed{})", "waiting"),
        ),
        graph(
            "Oldest event not yet published",
            "Climbs while JetStream is away.",
            ("max(carillon_scheduler_oldest_unconfirmed_event_seconds{})", "waiting"),
            unit="s",
            log=True,
        ),
    )


def _shards() -> Row:
    return row(
        "Shards",
        graph(
            "Shards held",
            "By each replica; together they must be as many as there are.",
            ("carillon_scheduler_shards_held{}", "{{instance}}"),
            stack=True,
        ),
        graph(
            "Shards without holder",
            "As a replica last saw it in Postgres, and as the replicas' own numbers add up.",
            ("max(carillon_scheduler_shards_unheld{})", "free"),
            ("max(carillon_scheduler_shards{}) - sum(carillon_scheduler_shards_held{})", "not held"),
            limit=1,
        ),
        rates(
            "Shards taken over",
            "Rollouts and scaling do it. Without them: leases run out, because of Postgres or pauses.",
            "carillon_scheduler_takeovers_total",
            by="instance",
        ),
        graph(
            "Leases and fences",
            "Renewals that failed, and writes refused because the shard was another's by then.",
            ('sum(rate(carillon_scheduler_lease_renewals_total{result="failed"}[]))', "failures"),
            ("sum(rate(carillon_scheduler_fenced_writes_total{}[]))", "fenced"),
            unit="si:/s",
        ),
    )


def _failures() -> Row:
    return row(
        "Failures",
        rates(
            "Turns",
            "Transactions of the engine, by how they ended.",
            "carillon_scheduler_turns_total",
            by="result",
        ),
        rates(
            "Questions to business services",
            "By answer; dropped ones were not asked, for want of room.",
            "carillon_scheduler_questions_total",
            by="result",
        ),
        graph(
            "Events",
            "Published, published again, and not taken by JetStream.",
            ("sum(rate(carillon_scheduler_events_published_total{}[]))", "published"),
            ("sum(rate(carillon_scheduler_events_republished_total{}[]))", "republished"),
            ("sum(rate(carillon_scheduler_event_publish_failures_total{}[]))", "failures"),
            unit="si:/s",
        ),
        graph(
            "Pages read",
            "Of waiting timers, from Postgres into the wheels. Many with few timers fired: wheels too small.",
            ("sum(rate(carillon_scheduler_pages_total{}[]))", "waiting"),
            unit="si:/s",
        ),
    )


def dashboard() -> Dashboard:
    """Timers and shards."""
    return Dashboard(
        name="scheduler",
        title="Scheduler",
        description="When timers fire, and whether; who holds which shards; what waits.",
        service="scheduler",
        rows=[
            _now(),
            _traffic(),
            _latency(),
            _backlog(),
            _shards(),
            _failures(),
            calls("scheduler"),
            resources("scheduler"),
        ],
    )
