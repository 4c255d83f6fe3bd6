"""What is shown at the end, and var/demo/report.json with all of it."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from local.demo import story
from local.demo.accounts import Account, accounts, unaccounted
from local.demo.answers import Answers, Arrival
from local.demo.check import Difference, arrived, count_timers, resent
from local.demo.oracle import Expected, Message
from local.demo.plan import Plan

_SHOWN_DIFFERENCES = 20
_SHOWN_ITEMS = 3
_ROWS = (
    ("commands accepted", "accepted"),
    ("items: sent at once", "immediate"),
    ("in digests", "digested"),
    ("waiting in open windows", "waiting"),
    ("suppressed", "suppressed"),
    ("cancelled", "cancelled"),
    ("dead", "dead"),
    ("unaccounted", "unaccounted"),
    ("messages sent", "sent"),
    ("failed", "failed"),
)
_SECTIONS = ("accepted", "unaccounted")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """All there is to say about one run."""

    plan: Plan
    expected: Expected
    accepted: Mapping[str, int]
    answers: Answers
    arrivals: Sequence[Arrival]
    differences: Sequence[Difference]
    killed: Sequence[str]
    took_s: float
    rested_s: float

    @property
    def books(self) -> list[Account]:
        """One account per job."""
        return accounts(self.plan, self.accepted, self.answers)

    @property
    def unaccounted(self) -> int:
        """Items that are nowhere."""
        return unaccounted(self.books, self.answers.ledger)

    @property
    def is_exact(self) -> bool:
        """Whether all is as it must be."""
        return not self.differences and self.unaccounted == 0


def print_report(outcome: Outcome, directory: Path, console: Console) -> None:
    """The tables, the differences, and where to look."""
    console.print(_books_table(outcome))
    console.print(_trials_table(outcome))
    for difference in outcome.differences[:_SHOWN_DIFFERENCES]:
        told = f"{difference.what}: expected {_brief(difference.expected)}, got {_brief(difference.actual)}"
        console.print(f"[red]Differs:[/red] {escape(told)}", highlight=False)
    if (left := len(outcome.differences) - _SHOWN_DIFFERENCES) > 0:
        console.print(f"… and {left} more in report.json")
    console.print(_summary(outcome), highlight=False)
    verdict = "agrees exactly" if not outcome.differences else f"differs in {len(outcome.differences)} places"
    colour = "green" if outcome.is_exact else "red"
    console.print(f"[{colour}]The CSV {verdict}; unaccounted = {outcome.unaccounted}.[/{colour}]")
    mailbox = directory / "mailbox"
    console.print(
        f"Mails are in {mailbox}; to read them in a browser: python -m local.mailbox --directory {mailbox}\n"
        f"Everything else is in {directory / 'report.json'}.",
        highlight=False,
    )


def write_report(outcome: Outcome, path: Path) -> None:
    """All of it as JSON."""
    messages = arrived(outcome.answers, outcome.arrivals)
    report = {
        "flights": outcome.plan.flights,
        "end": outcome.expected.end.isoformat(),
        "took_s": round(outcome.took_s, 1),
        "waited_for_rest_s": round(outcome.rested_s, 1),
        "killed": list(outcome.killed),
        "accepted": dict(outcome.accepted),
        "jobs": [asdict(account) | {"unaccounted": account.unaccounted} for account in outcome.books],
        "unaccounted": outcome.unaccounted,
        "ledger": _ledger(outcome.answers),
        "timers": dict(count_timers(outcome.answers.timers)),
        "expected": dict(outcome.expected.counts),
        "messages": messages.total(),
        "parts": len(outcome.arrivals) - resent(outcome.arrivals),
        "resent": resent(outcome.arrivals),
        "differences": [
            {"what": one.what, "expected": one.expected, "actual": one.actual} for one in outcome.differences
        ],
        "subscribers": _by_subscriber(list(messages.elements())),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > _SHOWN_ITEMS:
        return f"{', '.join(value[:_SHOWN_ITEMS])} and {len(value) - _SHOWN_ITEMS} more"
    return str(value)


def _summary(outcome: Outcome) -> str:
    again = resent(outcome.arrivals)
    told = (
        f"{outcome.plan.flights:,} flights in {outcome.took_s:.1f} s; {len(outcome.arrivals) - again:,} mails and hooks"
    )
    if again:
        told += f", {again} of them resent under the same id after a crash"
    if outcome.killed:
        told += f"; killed and started again: {', '.join(outcome.killed)}"
    return told + "."


def _books_table(outcome: Outcome) -> Table:
    books = outcome.books
    table = Table(title="Where everything is", title_justify="left", title_style="bold", min_width=60)
    table.add_column("")
    for job in (*(account.job for account in books), "all"):
        table.add_column(job, justify="right")
    for label, name in _ROWS:
        values = [getattr(account, name) for account in books]
        table.add_row(label, *(f"{value:,}" for value in (*values, sum(values))), end_section=name in _SECTIONS)
    return table


def _trials_table(outcome: Outcome) -> Table:
    timers, accepted = count_timers(outcome.answers.timers), outcome.accepted
    table = Table(title="Behind it", title_justify="left", title_style="bold", min_width=60)
    table.add_column("")
    table.add_column("all", justify="right")
    for label, value, ends in (
        ("maintenance trials started", accepted["timelines"], False),
        ("their timers: fired", timers["timers_fired"], False),
        ("skipped, because the condition did not hold", timers["timers_skipped"], False),
        ("cancelled", timers["timers_cancelled"], False),
        ("still scheduled", timers["timers_scheduled"], True),
        ("rebooking requests", accepted["requests"], False),
        ("refused, because nobody else flies the route", accepted["requests_refused"], False),
        ("answers", accepted["responses"], False),
    ):
        table.add_row(label, f"{value:,}", end_section=ends)
    return table


def _ledger(answers: Answers) -> dict[str, Any]:
    ledger = answers.ledger
    return {
        "notifications": ledger.notifications,
        "items": [{"state": one.state, "reason": one.suppressed_reason, "items": one.items} for one in ledger.items],
        "digests": [
            {"outcome": one.outcome, "digests": one.digests, "items": one.items, "deliveries": one.deliveries}
            for one in ledger.digests
        ],
        "unaccounted": ledger.unaccounted,
    }


def _by_subscriber(messages: Sequence[Message]) -> dict[str, list[dict[str, Any]]]:
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for message in sorted(messages):
        if message.cadence == story.IMMEDIATE:
            found[message.subscriber].append({"item": message.items[0] if message.items else ""})
        else:
            found[message.subscriber].append(
                {"cadence": message.cadence, "closes": message.closes, "items": list(message.items)}
            )
    return found
