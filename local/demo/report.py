"""What is shown at the end, and var/demo/report.json with all of it."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from local.demo import story
from local.demo.accounts import Account, accounts, unaccounted
from local.demo.answers import Answers, Arrival
from local.demo.check import Difference, arrived, count_timers, resent
from local.demo.oracle import Expected, Message
from local.demo.plan import Plan

_SHOWN_DIFFERENCES = 20


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
        console.print(
            f"[red]Differs:[/red] {difference.what}: expected {difference.expected}, got {difference.actual}",
            highlight=False,
        )
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
        "messages": len(messages),
        "resent": resent(outcome.arrivals),
        "differences": [
            {"what": one.what, "expected": one.expected, "actual": one.actual} for one in outcome.differences
        ],
        "subscribers": _by_subscriber(list(messages.elements())),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def _summary(outcome: Outcome) -> str:
    again = resent(outcome.arrivals)
    told = f"{outcome.plan.flights:,} flights in {outcome.took_s:.1f} s; {len(outcome.arrivals) - again:,} messages"
    if again:
        told += f", {again} of them resent under the same id after a crash"
    if outcome.killed:
        told += f"; killed and started again: {', '.join(outcome.killed)}"
    return told + "."


def _books_table(outcome: Outcome) -> Table:
    columns = ("accepted", "immediate", "digested", "waiting", "suppressed", "cancelled", "dead", "sent", "failed")
    table = Table(title="Where everything is (items; sent and failed are messages)", title_justify="left")
    table.add_column("job")
    for column in (*columns, "unaccounted"):
        table.add_column(column, justify="right")
    books = outcome.books
    for account in books:
        table.add_row(account.job, *(f"{getattr(account, name):,}" for name in (*columns, "unaccounted")))
    table.add_section()
    totals = (f"{sum(getattr(account, name) for account in books):,}" for name in (*columns, "unaccounted"))
    table.add_row("all", *totals, style="bold")
    return table


def _trials_table(outcome: Outcome) -> Table:
    timers = count_timers(outcome.answers.timers)
    table = Table(title="Timers of the maintenance trials, and requests", title_justify="left")
    shown = {
        "trials": outcome.accepted["timelines"],
        "fired": timers["timers_fired"],
        "skipped": timers["timers_skipped"],
        "cancelled": timers["timers_cancelled"],
        "still scheduled": timers["timers_scheduled"],
        "requests": outcome.accepted["requests"],
        "nobody to ask": outcome.accepted["requests_refused"],
        "answers": outcome.accepted["responses"],
    }
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:,}" for value in shown.values()))
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
